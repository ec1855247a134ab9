"""The comparison in plain sentences: the headline, the results and their limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles, roles_of
from saeffect.comparison.findings import Answer, Comparison
from saeffect.comparison.judgement import Judgement
from saeffect.comparison.quantities import wording
from saeffect.report.words.evidence import (
    calibration_verdict,
    cross_summary,
    fate_summary,
    power_sentence,
    too_many_alarms,
)
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import LEVEL, count, difference, fixed, joined, percent, plural, signed
from saeffect.report.words.paragraph import over_saes, paragraph
from saeffect.report.words.threats import threat_table, threats
from saeffect.steering.outcomes import OUTCOMES

__all__ = ["with_answer"]

_ONE_SAE = "One SAE reads both models: what changed is how they use its features, and no second SAE is compared."


def with_answer(
    comparison: Comparison, arms: Mapping[str, ArmTables], *, tests: Sequence[str], min_matches: int, alpha: float
) -> Comparison:
    """The comparison (of `saeffect.comparison.compare`, for these arms and settings) with its threats and its answer.

    A change is credited to fine-tuning only if its judgement says so. Every difference has its interval, over all SAEs
    where both models have several; a difference without one has the reason.
    """
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    arms = {name: arms[name] for name in roles.ordered}
    judged = comparison.judged
    declared = [judged[name] for name in tests if name in judged]
    comparison = replace(comparison, threats=threat_table(threats(arms, roles, comparison, tests)))
    summary = paragraph(arms, roles, comparison, judged, [judgement.quantity for judgement in declared], alpha=alpha)
    table1, table2 = comparison.table1.set_index("arm"), comparison.table2.set_index("arm")
    steered = [arm.effects for arm in arms.values() if arm.effects is not None and len(arm.effects)]
    outcome = next((str(effects["outcome"].iloc[0]) for effects in steered if "outcome" in effects), "similarity")
    sentences = [
        _domain_count_sentence(table1, roles),
        _scale_count_sentence(table1, roles, min_matches),
        _difference_sentences(judged["domain_share"], roles),
        _pass_sentence(table1, judged["pass_rate"], roles, alpha),
        _coherence_sentence(table2, judged["coherence_mean"], roles),
        _effect_sentence(table1, judged["effect"], roles, outcome) if table1["tested"].any() else "",
        fate_summary(comparison.matches.fate_counts, alpha),
        cross_summary(comparison.matches.cross_activity, alpha) if len(comparison.matches.cross_activity) else "",
        calibration_verdict(comparison.calibration) if len(comparison.calibration) else "",
        power_sentence(comparison.power, roles, outcome),
    ]
    answer = Answer(
        learned="",
        headline=_ONE_SAE if arms[roles.treatment].facts.same_sae else _headline(declared, table1, roles, comparison),
        paragraph=summary.text,
        traces=summary.traces,
        sentences=[sentence for sentence in sentences if sentence],
        caveats=[str(threat) for threat in comparison.threats["threat"]],
    )
    return replace(comparison, answer=answer)


def _headline(declared: list[Judgement], table1: pd.DataFrame, roles: Roles, comparison: Comparison) -> str:
    if not table1.loc[[roles.control, roles.treatment], "domain_features"].any():
        return (
            "Nothing can be said about fine-tuning: "
            f"neither {roles.control} nor {roles.treatment} has a domain feature."
        )
    by_status: dict[str, list[Judgement]] = {}
    for judgement in declared:
        by_status.setdefault(judgement.status, []).append(judgement)
    if beyond := by_status.get("beyond"):
        return _headline_beyond(beyond, [judgement for judgement in declared if judgement not in beyond], comparison)
    names = {status: joined([short_name(j.quantity) for j in judged]) for status, judged in by_status.items()}
    if "unseparated" in names:
        reason = "since the placebo shows no noise to compare with" if roles.placebos else "without a placebo arm"
        return (
            f"Control and treatment differ in the {names['unseparated']}, but {reason} "
            "we cannot tell fine-tuning from SAE noise."
        )
    if "noise" in names:
        return (
            f"We cannot credit fine-tuning with a change: control and treatment differ in the {names['noise']}, "
            "but not clearly by more than retraining the SAE gives."
        )
    if "unclear" in names:
        is_single = len(by_status["unclear"]) == 1
        verb = f"{LEVEL} of the change includes" if is_single else f"{LEVEL}s of the changes include"
        return f"We cannot tell whether fine-tuning changed the {names['unclear']}: the {verb} zero."
    return "Nothing can be said about fine-tuning: no quantity of the headline has an interval in both arms."


def _headline_beyond(beyond: list[Judgement], uncredited: list[Judgement], comparison: Comparison) -> str:
    flaws = list(comparison.design.loc[comparison.design["status"] == "flaw", "field"])
    subject = "The treatment's features differ from the control's" if flaws else "Fine-tuning changed the features"
    changes = []
    for judgement in beyond:
        phrases, change = wording(judgement.quantity), judgement.headline
        clause = phrases.larger if change.value > 0 else phrases.smaller
        changes.append(f"{clause} ({difference(change, judgement.unit)}{over_saes(judgement)})")
    text = f"{subject} by more than retraining the SAE does: {joined(changes)}."
    if uncredited:
        names = " or the ".join(short_name(judgement.quantity) for judgement in uncredited)
        text += f" The same cannot be said of the {names}."
    if flaws:
        text += f" But the design is flawed ({joined(flaws)}), so fine-tuning need not be the cause."
    if unreliable := too_many_alarms(comparison.calibration, [judgement.quantity for judgement in beyond]):
        names = joined([f"the {short_name(name)}" for name in unreliable])
        text += f" And SAEs of the control's model, put in the treatment's place, differ as often in {names}."
    return text


def _domain_count_sentence(table1: pd.DataFrame, roles: Roles) -> str:
    parts = []
    for name in roles.ordered:
        n, total = int(table1.loc[name, "domain_features"]), int(table1.loc[name, "n_features"])
        share = f" ({percent(n / total)})" if total else ""
        parts.append(f"{count(n)} of {count(total)} in {name}{share}")
    return f"Domain features: {joined(parts)}."


def _scale_count_sentence(table1: pd.DataFrame, roles: Roles, min_matches: int) -> str:
    dot, cosine = (
        joined([f"{count(table1.loc[name, column])} in {name}" for name in roles.ordered])
        for column in ("matches_dot", "matches_cosine")
    )
    return (
        f"Counting every feature with at least {plural(min_matches, 'top token')} in the vocabulary: {dot} under the "
        f"dot product (the paper's scale), and {cosine} under the cosine."
    )


def _pass_sentence(table1: pd.DataFrame, judged: Judgement, roles: Roles, alpha: float) -> str:
    tested = [name for name in roles.ordered if table1.loc[name, "tested"]]
    if not tested:
        reasons = "; ".join(dict.fromkeys(str(reason) for reason in table1["reason"]))
        return f"No feature was tested by steering ({reasons}), so nothing can be said about what the features cause."
    our_test, paper_rule = [], []
    for name in tested:
        row = table1.loc[name]
        our_test.append(f"{count(row['passed'])} of {count(row['tested'])} in {name} ({percent(row['pass_rate'])})")
        paper_rule.append(f"{count(row['paper_passed'])} in {name}")
    missing = [name for name in roles.ordered if name not in tested]
    return (
        f"Tested against placebos, these features passed at q ≤ {alpha:g}: {joined(our_test)}; "
        f"by the paper's rule, one steered sample against one unsteered: {joined(paper_rule)}."
        f"{f' None was tested in {joined(missing)}.' if missing else ''} {_difference_sentences(judged, roles)}"
    )


def _coherence_sentence(table2: pd.DataFrame, judged: Judgement, roles: Roles) -> str:
    parts = []
    for name in roles.ordered:
        row = table2.loc[name]
        value = "undefined" if math.isnan(row["mean"]) else fixed(row["mean"])
        parts.append(f"{value} in {name}{_interval_text(row['mean_low'], row['mean_high'])}")
    return f"Mean coherence of the domain features: {joined(parts)}. {_difference_sentences(judged, roles)}"


def _effect_sentence(table1: pd.DataFrame, judged: Judgement, roles: Roles, outcome: str) -> str:
    rows = {name: table1.loc[name] for name in roles.ordered}
    parts = [
        f"{signed(row['effect_mean'])} in {name}{_interval_text(row['effect_low'], row['effect_high'])}"
        for name, row in rows.items()
        if not math.isnan(row["effect_mean"])
    ]
    if not parts:
        return "The effect of steering is undefined in every arm."
    return (
        f"Beyond what placebos do, steering a feature moved the {OUTCOMES[outcome].measures} by {joined(parts)} on "
        f"average. {_difference_sentences(judged, roles)}"
    )


def _interval_text(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" ({fixed(low)} to {fixed(high)})"


def _difference_sentences(judged: Judgement, roles: Roles) -> str:
    """Treatment minus control, the same for SAE noise, and the verdict."""
    phrase, change = wording(judged.quantity).phrase, judged.change
    if judged.status == "undefined":
        reason = change.reason or "no interval"
        return f"Between {judged.control} and {judged.treatment}, {phrase} cannot be compared: {reason}."
    size = difference(change, judged.unit)
    text = f"From {judged.control} to {judged.treatment}, {phrase} differs by {size}.{_all_saes_sentence(judged)}"
    noise = [
        f"{difference(by_seed, judged.unit, short=True)} ({placebo} minus {judged.control})"
        for placebo, by_seed in judged.retraining.items()
        if by_seed.defined
    ]
    if noise:
        text += f" Retraining the SAE alone gives {joined(noise)}."
    return f"{text} {_verdict_sentence(judged, roles)}"


def _all_saes_sentence(judged: Judgement) -> str:
    """The difference over all SAEs of both models, and whether its interval excludes zero; "" without any."""
    if judged.seeds is None:
        return ""
    n_a, n_b = judged.n_saes
    subject = f"Over all SAEs of both models ({n_b} against {n_a})"
    if min(n_a, n_b) == 1:
        single, n_others, model = (judged.treatment, n_a, "control") if n_b == 1 else (judged.control, n_b, "treatment")
        subject = f"Taking {single}'s SAE to scatter as the {n_others} SAEs of the {model}'s model do,"
    verb = "excludes" if judged.seeds.sign else "includes"
    size = difference(judged.seeds, judged.unit, short=True)
    return f" {subject} it is {size}; that holds the noise of SAE training and {verb} zero."


def _verdict_sentence(judged: Judgement, roles: Roles) -> str:
    noise = "how much SAEs of one model differ is not known"
    if not math.isnan(judged.p):  # probability of so large a difference between seeds
        noise = f"noise alone would give as much with p = {fixed(judged.p)}"
    if judged.by_seeds:  # where both models have several SAEs, these decide
        if judged.status == "beyond":
            return f"Over all SAEs that is more than the noise of SAE training ({noise})."
        if judged.status == "unclear":
            return "Both intervals include zero: we cannot tell whether fine-tuning changed it."
        return (
            f"Over all SAEs that is not clearly more than the noise of SAE training ({noise}), so we cannot credit "
            "fine-tuning with it."
        )
    if judged.status == "unclear":
        return "The interval of the difference includes zero: we cannot tell whether fine-tuning changed it."
    if judged.status == "unseparated" and not roles.placebos:
        return "Without a placebo arm we cannot tell whether this is fine-tuning or SAE noise."
    to_placebos = (*judged.retraining.values(), *judged.beyond.values())
    if judged.status == "unseparated":
        reason = next((estimate.reason for estimate in to_placebos if estimate.reason), "no interval")
        if all(estimate.defined for estimate in to_placebos):
            reason = "it equals the control here, which does not show how much SAEs of one model differ"
        return f"The placebo cannot be compared ({reason}), so this may be SAE noise."
    sizes = [
        f"{judged.treatment} minus {placebo}: {difference(estimate, judged.unit, short=True)}"
        for placebo, estimate in judged.beyond.items()
    ]
    beyond = f" ({joined(sizes)})" if sizes else ""
    if judged.status == "beyond":
        return f"The difference is more than that noise{beyond}."
    return f"That is not clearly more than this noise{beyond}: {noise}, so we cannot credit fine-tuning with it."
