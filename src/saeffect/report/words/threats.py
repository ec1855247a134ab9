"""Threats to the answer, found by rule in the tables, with severity and remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd
from scipy.special import stdtrit

from saeffect.comparison.arms import ArmTables, Roles, top_token_coverage, untested_reason
from saeffect.comparison.findings import Comparison
from saeffect.comparison.judgement import ALPHA, Judgement
from saeffect.report.words.evidence import size, too_many_alarms
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import count, fixed, joined, percent

__all__ = ["SEVERITIES", "Severity", "Threat", "threat_table", "threats"]

Severity = Literal["serious", "moderate", "minor"]
SEVERITIES: tuple[Severity, ...] = ("serious", "moderate", "minor")
"""Serious: the answer may be wrong. Moderate: it is less certain than its interval. Minor: it is less general."""

# Below these values a poor fit is a serious, or a moderate, threat.
_POOR_FIT = {"explained_variance": (0.5, 0.7), "ce_loss_score": (0.8, 0.9)}
_MANY_DEAD = 0.2
# Share of top tokens that the word vectors have; below it, coherence covers less than half of them.
_LOW_COVERAGE = 0.5
# From this many SAEs on, a change of about two standard deviations exceeds noise.
_MIN_SAES = 5
_MIN_TESTED = 20
# Shares of texts without a similarity: limits of moderate and serious threats.
_SOME_UNDEFINED, _MANY_UNDEFINED = 0.05, 0.2
_NUMBER_WORDS = {1: "one quantity", 2: "two quantities", 3: "three quantities"}


@dataclass(frozen=True)
class Threat:
    """A problem in full sentences, its severity and remedy, and the table and columns that show it."""

    threat: str
    severity: Severity
    remedy: str
    source: str


def threat_table(threats: Sequence[Threat]) -> pd.DataFrame:
    """Threats as a table, in the same order: `severity`, `threat`, `remedy`, `source`."""
    return pd.DataFrame([asdict(threat) for threat in threats], columns=["severity", "threat", "remedy", "source"])


def threats(arms: Mapping[str, ArmTables], roles: Roles, comparison: Comparison, tests: Sequence[str]) -> list[Threat]:
    """Limits of this comparison, then those of every such comparison, sorted by severity."""
    judged = comparison.judged
    declared = [judged[name] for name in tests if name in judged]
    unsorted = (
        *_alarm_threats(comparison.calibration),
        *_design_threats(comparison.design),
        *_text_threats(arms),
        *_gate_threats(arms),
        *_noise_threats(declared, one_sae=arms[roles.treatment].facts.same_sae),
        *_seed_threats(arms, roles),
        *_testing_threats(arms, comparison.table1.set_index("arm")),
        *_undefined_similarity_threats(arms),
        *_trial_threats(arms),
        *_coverage_threats(arms),
        *_coherence_threats(comparison.table2.set_index("arm"), roles),
        *_selection_threats(arms),
        *_scope_threats(comparison, tests),
    )
    return sorted(unsorted, key=lambda threat: SEVERITIES.index(threat.severity))


def _alarm_threats(calibration: pd.DataFrame) -> Iterator[Threat]:
    source = "comparison/calibration.parquet: verdict"
    names = [] if calibration.empty else too_many_alarms(calibration, dict.fromkeys(calibration["test"]))
    if names:
        yield Threat(
            "Where there is nothing to find, these tests found something more often than they promise: "
            f"{', '.join(short_name(test) for test in names)}. Their findings in the treatment are not to be believed.",
            "serious",
            "Disregard what these tests find, or train more SAEs of the control's model until they keep their promise.",
            source,
        )
    elif calibration.empty or not (calibration["declared"] & (calibration["tests"] > 0)).any():
        yield Threat(
            "Nobody knows how often these tests find something where there is nothing to find: no two SAEs of the "
            "control's model could stand in for control and treatment.",
            "moderate",
            "Train two more SAEs of the control's model from other seeds, one as a placebo arm and one under "
            "more_saes.",
            source,
        )


def _design_threats(design: pd.DataFrame) -> Iterator[Threat]:
    for field, matters in design.loc[design["status"] == "flaw", ["field", "matters"]].itertuples(index=False):
        yield Threat(
            f"Design flaw ({field}). {matters}",
            "serious",
            "Make the arms equal in it and run again; until then the difference may come from it.",
            f"comparison/design.parquet: {field}",
        )
    unknown = list(design.loc[design["status"] == "unknown", "field"])
    if unknown:
        yield Threat(
            f"Not recorded for every arm, so not checked: {joined(unknown)}.",
            "moderate",
            "Record it beside the SAE (training.json), or train the SAEs here.",
            "comparison/design.parquet: status",
        )


def _text_threats(arms: Mapping[str, ArmTables]) -> Iterator[Threat]:
    short = next((arm.text_shortage for arm in arms.values() if arm.text_shortage), "")
    if short:
        yield Threat(
            f"The text has only {short}: activity, examples and matches are of few tokens, and features that seldom "
            "fire may seem dead.",
            "moderate",
            "Give the study more text.",
            "arms/*/gate.json: text_shortage",
        )


def _gate_threats(arms: Mapping[str, ArmTables]) -> Iterator[Threat]:
    words = {
        "explained_variance": "reproduces {share} of the variance of its model's activations",
        "ce_loss_score": "keeps {share} of its model's predictive power",
    }
    for field, (worst, poor) in _POOR_FIT.items():
        values = {name: getattr(arm.facts, field) for name, arm in arms.items()}
        # An undefined value counts as the worst.
        low = {name: float(value) for name, value in values.items() if value is not None and not float(value) >= poor}
        shares = {name: "an undefined share" if math.isnan(value) else percent(value) for name, value in low.items()}
        if low:
            parts = joined([f"{name}'s SAE {words[field].format(share=share)}" for name, share in shares.items()])
            yield Threat(
                f"{parts}: what it leaves out cannot show as a feature.",
                "moderate" if all(value >= worst for value in low.values()) else "serious",
                "Train the SAE longer or wider, at a hook where it fits.",
                f"comparison/design.parquet: {field}",
            )
    dead = [
        f"{percent(arm.facts.dead_share)} in {name}"
        for name, arm in arms.items()
        if arm.facts.dead_share is not None and arm.facts.dead_share > _MANY_DEAD
    ]
    if dead:
        yield Threat(
            f"Many features never fired on the study's text ({joined(dead)}); about these nothing can be said.",
            "moderate",
            "Give the study more text, or train the SAE with a remedy for dead features.",
            "comparison/design.parquet: dead_share",
        )


def _noise_threats(declared: Sequence[Judgement], *, one_sae: bool) -> Iterator[Threat]:
    if one_sae:
        yield Threat(
            "One SAE reads both models, so what only an SAE of the fine-tuned model would show is not looked for.",
            "moderate",
            "Train an SAE of the fine-tuned model and give it to the treatment.",
            "comparison/design.parquet: seed",
        )
    elif declared and all(not judgement.retraining and judgement.seeds is None for judgement in declared):
        yield Threat(
            "There is no placebo arm (the control's model with an SAE of another seed), "
            "so SAE noise is unknown and no difference can be credited to fine-tuning.",
            "serious",
            "Train an SAE of the control's model from another seed and add it as an arm with role: placebo.",
            "comparison/design.parquet: role",
        )
    few: dict[tuple[int, int], list[str]] = {}
    for judgement in declared:
        if judgement.seeds is not None and sum(judgement.n_saes) < _MIN_SAES:
            few.setdefault(judgement.n_saes, []).append(short_name(judgement.quantity))
    for (n_a, n_b), names in sorted(few.items()):
        reach = float(stdtrit(n_a + n_b - 2, 1 - ALPHA / 2)) * math.sqrt(1 / n_a + 1 / n_b)
        saes = ["one SAE" if n == 1 else f"{n} SAEs" for n in (n_a, n_b)]
        yield Threat(
            f"Few SAEs show how much SAEs of one model differ ({saes[0]} of the control's model, {saes[1]} of the "
            f"treatment's): a change of the {joined(names)} is credited to fine-tuning only if it is more than "
            f"{fixed(reach, 1)} standard deviations of such SAEs. Smaller changes go unnoticed; one in twenty such "
            "studies still credits fine-tuning wrongly.",
            "moderate",
            "Train further SAEs of both models from other seeds and name them under more_saes; what needs steering "
            "(the pass rate, effects) needs placebo arms.",
            "comparison/contrasts.parquet: p_noise, saes_a, saes_b",
        )


def _seed_threats(arms: Mapping[str, ArmTables], roles: Roles) -> Iterator[Threat]:
    single = [name for name in (roles.control, roles.treatment) if arms[name].seeds is None]
    if single:
        yield Threat(
            f"There is one SAE of {joined(single)}, so intervals do not hold the noise of SAE training: another seed "
            "would have given other features.",
            "moderate",
            "Train further SAEs from other seeds and name them under more_saes.",
            "comparison/contrasts.parquet: saes_a, saes_b",
        )


def _testing_threats(arms: Mapping[str, ArmTables], table1: pd.DataFrame) -> Iterator[Threat]:
    tested = {name: int(table1.loc[name, "tested"]) for name in arms}
    domain = {name: int(table1.loc[name, "domain_features"]) for name in arms}
    source = "comparison/table1.parquet: tested, domain_features"
    untested = [name for name, n in tested.items() if not n]
    if untested:
        reasons = "; ".join(dict.fromkeys(untested_reason(arms[name]) for name in untested))
        yield Threat(
            f"No feature of {joined(untested)} was tested by steering: {reasons}.",
            "moderate",
            "Steer features of every arm, or make no claim about what features cause.",
            source,
        )
    few = [f"{count(n)} in {name}" for name, n in tested.items() if 0 < n < _MIN_TESTED]
    if few:
        yield Threat(
            f"Few features were tested ({joined(few)}), so pass rates and effects are rough.",
            "moderate",
            "Raise steering.max_features.",
            source,
        )
    partly = [f"{count(n)} of {count(domain[name])} in {name}" for name, n in tested.items() if 0 < n < domain[name]]
    if partly:
        yield Threat(
            f"Not every domain feature was tested ({joined(partly)}): pass rates and effects are those of the "
            "tested ones.",
            "minor",
            "Raise steering.max_features.",
            source,
        )


def _undefined_similarity_threats(arms: Mapping[str, ArmTables]) -> Iterator[Threat]:
    """Texts without a similarity: the test leaves them out, though steering may have broken them."""
    texts = {name: arm.interventions for name, arm in arms.items()}
    shares = {name: trials["similarity"].isna().mean() for name, trials in texts.items() if trials is not None}
    shares = {name: float(share) for name, share in shares.items() if not math.isnan(share)}
    worst = max(shares.values(), default=0.0)
    if worst:
        parts = joined([f"{percent(share)} of texts in {name}" for name, share in shares.items()])
        yield Threat(
            f"Similarity was undefined in {parts}: no word of the text, or of the feature's top tokens, has a vector. "
            "Such pairs are left out, so effects are those of the others.",
            "serious" if worst > _MANY_UNDEFINED else "moderate" if worst > _SOME_UNDEFINED else "minor",
            "Read the texts. Where steering breaks them, use a smaller dose; where they are of another language, use "
            "word vectors that know it, or declare another outcome.",
            "arms/*/interventions.parquet: similarity",
        )


def _trial_threats(arms: Mapping[str, ArmTables]) -> Iterator[Threat]:
    if any(not untested_reason(arm) for arm in arms.values()):
        yield Threat(
            "The paper's rule passes about half of all features whose steering does nothing at all.",
            "minor",
            "Read our pass rate; the paper's stands beside it for comparison only.",
            "comparison/table1.parquet: paper_rate",
        )
        yield Threat(
            "A feature that passes moved the texts of these prompts more than its placebos did on average. "
            "The test counts every prompt (every text, where prompts are few) as independent and does not say how "
            "often one fixed placebo would pass too; read pass rates against each other, not as a share of "
            "features that work.",
            "minor",
            "Compare pass rates between arms; steer with more prompts.",
            "arms/*/effects.parquet: n_pairs, p",
        )
    source = "arms/*/interventions.parquet: dose"
    doses = {name: _steered_doses(arm) for name, arm in arms.items()}
    if any(len(arm_doses) > 1 for arm_doses in doses.values()):
        yield Threat(
            "The paper's Table 1 pools the trials of several doses.", "moderate", "Read effects dose by dose.", source
        )
    elif len(set().union(*doses.values())) > 1:
        parts = joined([f"{dose:g} in {name}" for name, arm_doses in doses.items() for dose in arm_doses])
        yield Threat(
            f"The arms were steered at different doses ({parts}), so their effects are not alike.",
            "serious",
            "Steer every arm at one dose.",
            source,
        )


def _steered_doses(arm: ArmTables) -> list[float]:
    trials = arm.interventions
    return [] if trials is None else sorted(set(trials.loc[trials["condition"] == "steered", "dose"].astype(float)))


def _coverage_threats(arms: Mapping[str, ArmTables]) -> Iterator[Threat]:
    shares = {name: top_token_coverage(arm) for name, arm in arms.items()}
    low = [f"{percent(share)} in {name}" for name, share in shares.items() if share < _LOW_COVERAGE]
    if low:
        yield Threat(
            f"The word vectors know few of the features' top tokens ({joined(low)}): they and the vocabulary judge "
            "features by the lesser part of what these promote, so coherence and the number of domain features are too "
            "low.",
            "serious",
            "If the model writes many languages, rank only tokens of the vectors' script (features.tokens: latin) or "
            "those that they know (features.tokens: embeddings); otherwise give vectors and a vocabulary of the "
            "model's language.",
            "arms/*/coherence.parquet: n_known; arms/*/features.parquet: top_tokens",
        )


def _coherence_threats(table2: pd.DataFrame, roles: Roles) -> Iterator[Threat]:
    n_undefined = {name: int(table2.loc[name, "n_undefined"]) for name in roles.ordered}
    if any(n_undefined.values()):
        parts = joined([f"{count(n)} in {name}" for name, n in n_undefined.items()])
        yield Threat(
            f"Coherence is undefined for some domain features ({parts}); they are left out of its mean, not counted "
            "as 0.",
            "minor",
            "Use word vectors that know more of the top tokens.",
            "comparison/table2.parquet: n_undefined",
        )


def _selection_threats(arms: Mapping[str, ArmTables]) -> Iterator[Threat]:
    verdicts = [arm.selection.filter(items=["n_yes", "n_no", "n_unsure"]).to_numpy() for arm in arms.values()]
    if not any(counts.any() for counts in verdicts):
        yield Threat(
            "No person has judged the features: domain features are those that the vocabulary picks.",
            "moderate",
            "Let people judge them blindly, name their verdicts under selection.verdicts, and run the study again.",
            "arms/*/selection.parquet: n_yes, n_no",
        )


def _scope_threats(comparison: Comparison, tests: Sequence[str]) -> Iterator[Threat]:
    n = int(((comparison.contrasts["comparison"] == "fine-tuning") & comparison.contrasts["low"].notna()).sum())
    yield Threat(
        f"The table holds {n} contrasts of control with treatment: of such intervals, about one in twenty "
        f"misses zero by chance. The headline looks at {_NUMBER_WORDS.get(len(tests), f'{len(tests)} quantities')} "
        f"fixed in advance ({', '.join(short_name(name) for name in tests)}) and corrects for their number.",
        "minor",
        "Take contrasts that were not declared as questions for another study.",
        "comparison/contrasts.parquet: declared",
    )
    yield Threat(
        "Intervals are over the features of these SAEs, taken as independent of each other, unless they are said "
        "to be over SAE seeds. They do not cover other prompts, texts or vocabularies.",
        "minor",
        "Repeat the study with another text, other prompts and another vocabulary.",
        "comparison/contrasts.parquet: remark",
    )
    if not comparison.matches.fate_counts.empty:
        yield Threat(
            "Features are matched on the study's text and only where they fire there. A feature that is called "
            "gone may live on in several others, which is looked for among those that fire with it.",
            "minor",
            "Match on more text.",
            "comparison/fates_control.parquet: fate",
        )
    if not comparison.matches.cross_activity.empty and "q_nulls" not in comparison.matches.cross_activity:
        yield Threat(
            "That a feature of the control's SAE fires more in the fine-tuned model has no placebo here: any "
            "further training, on any text, moves the activations of many features a little.",
            "moderate",
            "Make null fine-tunes (saeffect finetune RECIPE --null 20 --study STUDY); without them, read the sizes, "
            "and domain features against all others.",
            "comparison/cross_activity.parquet: difference, is_domain",
        )
    power = comparison.power  # declared tests whose observed difference is below what they detect
    underpowered = [
        f"{short_name(row['test'])} {size(row)}"
        for row in power.to_dict("records")
        if "feature " not in row["test"] and abs(row["observed"]) < row["detectable"]
    ]
    if underpowered:
        yield Threat(
            f"Smaller differences than these would mostly have been missed: {joined(underpowered)}. "
            "That such a test found nothing does not mean that there is nothing.",
            "minor",
            "More SAEs of either model, and more features tested, make smaller differences visible.",
            "comparison/power.parquet: detectable, observed",
        )
