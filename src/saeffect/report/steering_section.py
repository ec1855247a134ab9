"""The section on steering, in words and tables: what was done, what decides, what simpler means do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext, SteeringResults
from saeffect.report.tables.baseline import baseline_sentences, baseline_table
from saeffect.report.tables.outcome import CONTROL_TERMS, OUTCOME_TERMS, outcome_table
from saeffect.report.tables.study import dose_table
from saeffect.report.tables.together import together_table
from saeffect.report.tables.view import TableView
from saeffect.report.words.names import control_words, dose_words, outcome_words
from saeffect.report.words.numbers import count, is_defined
from saeffect.steering.outcomes import OUTCOMES

__all__ = ["SteeringSection", "steering_section", "steering_views"]

_TWO_SIDED = frozenset(name for name, measure in OUTCOMES.items() if measure.alternative == "two-sided")
View = tuple[TableView | None, tuple[str, ...], str]


@dataclass(frozen=True)
class SteeringSection:
    """Sentences of the section: how it was done, what cannot be concluded, the baselines, the dose.

    `caveat` is what must be known before the answer is quoted; "" for nothing.
    """

    lead: str
    caveat: str
    limits: tuple[str, ...]
    baselines: tuple[str, ...]
    doses: tuple[str, ...]


def steering_section(comparison: Comparison, context: ReportContext) -> SteeringSection:
    """What the section says in words; see `steering_views` for its tables."""
    results = context.steering
    tested = {str(row["arm"]): int(row["tested"]) for row in comparison.table1.to_dict("records")}
    return SteeringSection(
        lead=_lead(results) if results is not None and any(tested.values()) else "",
        caveat=_caveat(results) if any(tested.values()) else "",
        limits=_limits(results, tested),
        baselines=baseline_sentences(comparison, context),
        doses=_doses(results, context),
    )


def steering_views(comparison: Comparison, context: ReportContext) -> list[View]:
    """The section's tables in page order, each with its name and the terms that it uses; terms alone have no table."""
    results = context.steering
    shown = _outcomes_shown(results)
    controls = {name for table in _tables(results) for name in table["placebo"].unique()}
    outcome_terms = tuple(OUTCOME_TERMS[name] for name in shown if name in OUTCOME_TERMS)
    control_terms = tuple(term for name, term in CONTROL_TERMS.items() if name in controls)
    steered = bool((comparison.table1["tested"] > 0).any())
    baselines = {name for table in results.baseline_effects.values() for name in table["baseline"]} if results else ()
    baseline_terms = {"prompt": "naming_prompt", "mean_difference": "mean_difference"}
    return [
        (
            None,
            ("forest", "interval", "pass", "q", *(("common_noise",) if results else ())) if steered else (),
            "forest",
        ),
        (
            outcome_table(comparison, context),
            ("declared", "exploratory", *control_terms, "reversed", "paper_rule", *outcome_terms),
            "outcomes",
        ),
        (
            baseline_table(comparison, context),
            tuple(term for name, term in baseline_terms.items() if name in baselines),
            "baselines",
        ),
        (together_table(comparison, context), ("together",), "together"),
        (dose_table(context), ("dose", "gain", "fluency", "dose_score", "perplexity", "distinct_2"), "doses"),
    ]


def _tables(results: SteeringResults | None) -> list[pd.DataFrame]:
    return [table for table in results.outcome_effects.values() if len(table)] if results is not None else []


def _outcomes_shown(results: SteeringResults | None) -> list[str]:
    found = [str(name) for table in _tables(results) for name in table["outcome"].unique()]
    return results.in_order(list(dict.fromkeys(found))) if results is not None else []


def _lead(results: SteeringResults) -> str:
    texts = ""
    if results.n_prompts and results.samples:
        prompts = f"{count(results.n_prompts)} prompt{'' if results.n_prompts == 1 else 's'}"
        texts = f", on {prompts} × {count(results.samples)} text{'' if results.samples == 1 else 's'}"
    others = [outcome_words(name).title for name in results.outcomes[1:]]
    also = f" Declared beside it: {', '.join(others)}." if others else ""
    reading = (
        " A feature passes for an effect below zero: it had been bringing its concept in." if _below(results) else ""
    )
    return (
        f"Features were steered {dose_words(results)}{texts}. What decides is the "
        f"{outcome_words(results.deciding).title} of steered texts minus that under the "
        f"{control_words(results.placebo)}, declared before the run.{also} What is marked exploratory was not.{reading}"
    )


def _below(results: SteeringResults) -> bool:
    """Whether the test looks for effects below zero."""
    return results.operator == "ablate" and results.deciding not in _TWO_SIDED


def _caveat(results: SteeringResults | None) -> str:
    if results is None or not _below(results):
        return ""
    return (
        "Features were switched off, which takes their concept away: a feature passes for an effect below zero. One "
        "that is off on these prompts changes no text and cannot pass, so a pass rate near 0 does not say that "
        "features do nothing where they fire."
    )


def _limits(results: SteeringResults | None, tested: Mapping[str, int]) -> tuple[str, ...]:
    """What cannot be concluded, one sentence each."""
    if not any(tested.values()) and (results is None or not _tables(results)):
        why = f" ({results.dose_note})" if results is not None and results.dose is None and results.dose_note else ""
        return (f"No feature was steered{why}, so nothing can be said about what the features cause.",)
    found = []
    if results is not None and not results.placebos:
        found.append(
            "The study steers along no placebo: that a text changes cannot be told from what any push of that size "
            "does, and no feature can pass."
        )
    if results is not None and results.n_prompts * results.samples == 1:
        found.append("There is one prompt and one text: a single pair shows no spread, so no feature has an interval.")
    elif results is not None and results.n_prompts == 1:
        found.append("There is one prompt: whether the effects hold on any other cannot be said.")
    for arm, n in tested.items():
        if n == 0:
            found.append(f"No feature of {arm} was tested: nothing can be said about what its features cause.")
        elif n == 1:
            found.append(f"One feature of {arm} was tested: the arm's mean has no interval.")
    return tuple(found)


def _doses(results: SteeringResults | None, context: ReportContext) -> tuple[str, ...]:
    if results is None:
        return ()
    if results.dose is None:
        return (f"No dose was chosen: {results.dose_note}.",) if results.dose_note else ()
    if results.operator == "ablate":
        return ("An ablation has one dose, so there is no dose-response curve.",)
    if context.doses is None and results.dose_response is None:
        return (
            f"One dose, {results.dose:g}, was set in the study file and none searched for, so there is no "
            "dose-response curve: whether another would do more is not known.",
        )
    found = ["One dose serves every arm: arms steered at different strengths could not be compared."]
    own = [(arm, dose) for arm, dose in results.best_doses.items() if is_defined(dose)]
    if own:
        listed = ", ".join(f"{arm} {dose:g}" for arm, dose in own)
        found.append(f"Each arm's own best dose in the search: {listed}; the one used: {results.dose:g}.")
    if results.dose_note:
        found.append(f"A reservation: {results.dose_note}.")
    return tuple(found)
