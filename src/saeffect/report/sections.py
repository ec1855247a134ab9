"""Sentences of the page's sections beside their tables: chance, steering, fates, regression, threats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pandas as pd

from saeffect.comparison import Answer, CitedNumber, Comparison
from saeffect.comparison.arms import roles_of
from saeffect.report.context import ReportContext, SteeringResults
from saeffect.report.tables.steering import baseline_sentences
from saeffect.report.words.evidence import (
    calibration_verdict,
    coherence_sentence,
    cross_summary,
    fate_summary,
    power_sentence,
)
from saeffect.report.words.names import dose_words
from saeffect.report.words.numbers import is_defined, joined, plural
from saeffect.report.words.threats import SEVERITIES
from saeffect.steering.outcomes import OUTCOMES
from saeffect.steering.placebos import control_label

__all__ = [
    "Evidence",
    "Piece",
    "SteeringSection",
    "evidence",
    "gravest",
    "steering_section",
    "threat_summary",
    "traced_paragraph",
]


@dataclass(frozen=True)
class Evidence:
    """The sentences of each section on evidence; "" for none. `stagewise`: why features were not followed through
    continued training; `gravest`: the threats quoted beside the answer; `limits`: by section, what cannot be concluded
    and why.
    """

    calibration: str
    power: str
    fates: str
    cross: str
    stagewise: str
    regression: str
    threats: str
    gravest: tuple[str, ...]
    limits: Mapping[str, str]


def evidence(comparison: Comparison, context: ReportContext) -> Evidence:
    """The sentences of the sections; for a missing table, the reason."""
    arms = comparison.table1[["arm", "role"]].itertuples(index=False)
    deciding = context.steering.deciding if context.steering else "similarity"
    stagewise = (
        "Features were not followed through training: the treatment's SAE was not trained on from the control's, so "
        "their numbers do not correspond."
    )
    fates = fate_summary(comparison.matches.fate_counts, context.alpha)
    return Evidence(
        calibration=calibration_verdict(comparison.calibration),
        power=power_sentence(comparison.power, roles_of(dict(arms)), deciding),
        fates=fates,
        cross=cross_summary(comparison.matches.cross_activity, context.alpha, context.domain),
        stagewise="" if len(comparison.matches.stagewise) else stagewise,
        regression=coherence_sentence(comparison.regression),
        threats=threat_summary(comparison.threats),
        gravest=tuple(gravest(comparison.threats)),
        limits=_limits(comparison, fates),
    )


def _limits(comparison: Comparison, fates: str) -> dict[str, str]:
    limits = {"chance": "", "fates": "", "regression": ""}
    fate_counts, calibration = comparison.matches.fate_counts, comparison.calibration
    if fate_counts.empty:
        limits["fates"] = "Features were not matched in this study, so nothing is known about which became which."
    elif not fate_counts["n_placebo"].notna().any():
        limits["fates"] = (
            f"{fates} The similarity of each feature to its nearest is in comparison/fates_control.parquet."
        )
    # Calibration needs a null pair for a declared test (for any test, if none is declared).
    declared = calibration[calibration["declared"].astype(bool)] if len(calibration) else calibration
    tests = declared if len(declared) else calibration
    if tests.empty or not (tests["tests"] > 0).any():
        limits["chance"] = calibration_verdict(calibration)
    if comparison.regression.empty or not comparison.regression["estimate"].notna().any():
        limits["regression"] = coherence_sentence(comparison.regression)
    return limits


def threat_summary(threats: pd.DataFrame) -> str:
    """The number of threats of each severity, in a sentence above the list."""
    counts = {name: int((threats["severity"] == name).sum()) for name in SEVERITIES}
    numbers = joined([f"{n} {name}" for name, n in counts.items() if n])
    noun = "threat" if len(threats) == 1 else "threats"
    reassurance = "" if counts["serious"] else " None of them is known to overturn the answer."
    return f"{numbers} {noun}, found by rule in the tables of this study.{reassurance}"


def gravest(threats: pd.DataFrame) -> list[str]:
    """The threats quoted beside the answer: up to five serious ones, or else the first three."""
    serious = threats.loc[threats["severity"] == "serious", "threat"]
    return [str(threat) for threat in (serious[:5] if len(serious) else threats["threat"][:3])]


@dataclass(frozen=True)
class Piece:
    """A part of the paragraph: its text, the id that it links to ("" for none), and the table row it comes from."""

    text: str
    anchor: str = ""
    source: str = ""


def traced_paragraph(answer: Answer, anchors: Collection[str]) -> tuple[Piece, ...]:
    """The answer's paragraph; each number links to its row or else its table, if in `anchors` (ids of the page)."""
    text, pieces, end = answer["paragraph"], [], 0
    for trace in answer["traces"]:
        anchor = next((name for name in _candidate_anchors(trace) if name in anchors), "")
        selection = ", ".join(f"{column} = {value}" for column, value in trace["row"].items())
        pieces.append(Piece(text[end : trace["start"]]))
        pieces.append(Piece(trace["text"], anchor, f"comparison/{trace['table']}.parquet, {selection}"))
        end = trace["start"] + len(trace["text"])
    return tuple(piece for piece in (*pieces, Piece(text[end:])) if piece.text)


def _candidate_anchors(trace: CitedNumber) -> tuple[str, ...]:
    row, table = trace["row"], trace["table"]
    if table == "contrasts":
        quantity = str(row["quantity"])
        return f"row-glance-{quantity.removesuffix('_seeds')}", f"row-contrasts-{quantity}", "table-contrasts"
    if table == "cross_activity":
        of_feature = (f"row-cross-{row['feature']}", "table-cross") if "feature" in row else ()
        return (*of_feature, "activity-summary")
    return {"fate_counts": ("table-fates",), "threats": ("table-threats",)}[table]


@dataclass(frozen=True)
class SteeringSection:
    """Sentences on steering; `caveat` belongs beside any quotation of the answer ("" for none)."""

    lead: str
    caveat: str
    limits: tuple[str, ...]
    baselines: tuple[str, ...]
    doses: tuple[str, ...]


def steering_section(comparison: Comparison, context: ReportContext) -> SteeringSection:
    """The sentences of the section on steering."""
    results = context.steering
    tested = {str(row["arm"]): int(row["tested"]) for row in comparison.table1.to_dict("records")}
    with_tests = results if any(tested.values()) else None
    return SteeringSection(
        lead=_lead(with_tests) if with_tests is not None else "",
        caveat=_ABLATION_CAVEAT if with_tests is not None and _lowers(with_tests) else "",
        limits=_steering_limits(results, tested),
        baselines=baseline_sentences(comparison, context),
        doses=_doses(results, context),
    )


def _lead(results: SteeringResults) -> str:
    n_texts = ""
    if results.n_prompts and results.samples:
        n_texts = f", on {plural(results.n_prompts, 'prompt')} × {plural(results.samples, 'text')}"
    declared = [OUTCOMES[name].label for name in results.outcomes[1:]]
    also = f" Declared beside it: {', '.join(declared)}." if declared else ""
    reading = (
        " A feature passes for an effect below zero: it had been bringing its concept in." if _lowers(results) else ""
    )
    return (
        f"Features were steered {dose_words(results)}{n_texts}. What decides is the "
        f"{OUTCOMES[results.deciding].label} of steered texts minus that under the "
        f"{control_label(results.placebo)}, declared before the run.{also} What is marked exploratory was not.{reading}"
    )


def _lowers(results: SteeringResults) -> bool:
    """Whether the test looks for effects below zero."""
    return results.operator == "ablate" and OUTCOMES[results.deciding].alternative != "two-sided"


_ABLATION_CAVEAT = (
    "Features were switched off, which takes their concept away: a feature passes for an effect below zero. One "
    "that is off on these prompts changes no text and cannot pass, so a pass rate near 0 does not say that "
    "features do nothing where they fire."
)


def _steering_limits(results: SteeringResults | None, tested: Mapping[str, int]) -> tuple[str, ...]:
    measured = results is not None and any(len(table) for table in results.outcome_effects.values())
    if not any(tested.values()) and not measured:
        reason = f" ({results.dose_note})" if results is not None and results.dose is None and results.dose_note else ""
        return (f"No feature was steered{reason}, so nothing can be said about what the features cause.",)
    limits = []
    if results is not None and not results.placebos:
        limits.append(
            "The study steers along no placebo: that a text changes cannot be told from what any push of that size "
            "does, and no feature can pass."
        )
    if results is not None and results.n_prompts * results.samples == 1:
        limits.append("There is one prompt and one text: a single pair shows no spread, so no feature has an interval.")
    elif results is not None and results.n_prompts == 1:
        limits.append("There is one prompt: whether the effects hold on any other cannot be said.")
    for arm, n in tested.items():
        if n == 0:
            limits.append(f"No feature of {arm} was tested: nothing can be said about what its features cause.")
        elif n == 1:
            limits.append(f"One feature of {arm} was tested: the arm's mean has no interval.")
    return tuple(limits)


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
    sentences = ["One dose serves every arm: arms steered at different strengths could not be compared."]
    best = [(arm, dose) for arm, dose in results.best_doses.items() if is_defined(dose)]
    if best:
        doses = ", ".join(f"{arm} {dose:g}" for arm, dose in best)
        sentences.append(f"Each arm's own best dose in the search: {doses}; the one used: {results.dose:g}.")
    if results.dose_note:
        sentences.append(f"A reservation: {results.dose_note}.")
    return tuple(sentences)
