"""The comparison in plain sentences: the headline, what was found, and what it does not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles, roles_of
from saeffect.comparison.findings import Answer, Comparison
from saeffect.comparison.judgement import PRIMARY, Judgement, Status, judge
from saeffect.report.words.evidence import (
    calibration_sentence,
    cross_sentence,
    fate_sentences,
    over_all_saes,
    over_saes,
    power_sentence,
    too_many_alarms,
)
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import LEVEL, count, difference, fixed, joined, percent, signed
from saeffect.report.words.paragraph import paragraph
from saeffect.report.words.threat import threat_table
from saeffect.report.words.threats import threats

__all__ = ["answer", "with_answer"]

_NAMES = {
    "domain_share": "the share of domain features",
    "pass_rate": "the share of tested features that pass",
    "coherence_mean": "the mean coherence of domain features",
    "effect": "the mean effect of steering",
}


_OUTCOMES = {
    "similarity": "similarity of the text to its top tokens",
    "off_list": "share of off-list domain words in the text",
    "keyword_score": "share of its top tokens among the text's words",
    "direct_effect": "log-probability of its top tokens",
}


def with_answer(
    found: Comparison, arms: Mapping[str, ArmTables], *, tests: Sequence[str], min_matches: int, alpha: float
) -> Comparison:
    """The comparison with its threats and its answer.

    Args:
        found: What `saeffect.comparison.compare` gave for these arms.
        arms: The arms by name.
        tests: As they were handed to `compare`, like the others.
        min_matches: Top tokens in the vocabulary that make a feature count under a projection.
        alpha: Highest q at which a feature passed, and of findings about single features.
    """
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    ordered = {name: arms[name] for name in roles.ordered}
    found = replace(found, threats=threat_table(threats(ordered, roles, found, tests)))
    words = answer(ordered, roles, found, tests=tests, min_matches=min_matches, alpha=alpha)
    return replace(found, answer=words)


def answer(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    found: Comparison,
    *,
    tests: Sequence[str],
    min_matches: int,
    alpha: float,
) -> Answer:
    """Put the tables into words.

    Nothing is called a change by fine-tuning unless `judge` finds it beyond SAE noise, and every
    difference comes with its interval: that over all SAEs where both models have several. What has no interval is
    named, with the reason.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        found: All tables.
        tests: The declared quantities: the headline speaks of these.
        min_matches: Top tokens in the vocabulary that make a feature count.
        alpha: Highest q at which a feature passed.
    """
    first, second = found.table1.set_index("arm"), found.table2.set_index("arm")
    known = set(found.contrasts["quantity"])
    declared = [name for name in tests if name in known]
    judged = {quantity: judge(found.contrasts, quantity) for quantity in (*PRIMARY, "effect", *declared)}
    outcome = _outcome(arms)
    tested = any(int(first.loc[name, "tested"]) for name in roles.ordered)
    sentences = [
        _domain_counts(first, roles),
        _scale_counts(first, roles, min_matches),
        _difference(judged["domain_share"], roles),
        _passes(first, judged["pass_rate"], roles, alpha),
        _coherence(second, judged["coherence_mean"], roles),
    ]
    if tested:
        sentences.append(_effects(first, judged["effect"], roles, outcome))
    sentences += [
        *fate_sentences(found.matches.fate_counts, roles),
        cross_sentence(found.matches.cross_activity, roles, alpha),
        calibration_sentence(found.calibration),
        power_sentence(found.power, roles, outcome),
    ]
    short = paragraph(arms, roles, found, {name: judged[name] for name in declared}, alpha=alpha)
    return Answer(
        headline=_headline([judged[quantity] for quantity in declared], first, roles, found),
        paragraph=short.text,
        traces=short.traces,
        sentences=[sentence for sentence in sentences if sentence],
        caveats=[str(threat) for threat in found.threats["threat"]] if len(found.threats) else [],
    )


def _headline(judged: list[Judgement], table1: pd.DataFrame, roles: Roles, found: Comparison) -> str:
    def having(status: Status) -> list[Judgement]:
        return [one for one in judged if one.status == status]

    if not any(int(table1.loc[name, "domain_features"]) for name in (roles.control, roles.treatment)):
        return (
            "Nothing can be said about fine-tuning: "
            f"neither {roles.control} nor {roles.treatment} has a domain feature."
        )
    if beyond := having("beyond"):
        return _headline_beyond(beyond, [one for one in judged if one not in beyond], found)
    if unseparated := having("unseparated"):
        why = "since the placebo shows no noise to compare with" if roles.placebos else "without a placebo arm"
        return (
            f"Control and treatment differ in the {_named(unseparated)}, but {why} "
            "we cannot tell fine-tuning from SAE noise."
        )
    if noise := having("noise"):
        return (
            f"We cannot credit fine-tuning with a change: control and treatment differ in the {_named(noise)}, "
            "but not clearly by more than retraining the SAE gives."
        )
    if unclear := having("unclear"):
        verb = f"{LEVEL} of the change includes" if len(unclear) == 1 else f"{LEVEL}s of the changes include"
        return f"We cannot tell whether fine-tuning changed the {_named(unclear)}: the {verb} zero."
    return "Nothing can be said about fine-tuning: no quantity of the headline has an interval in both arms."


def _headline_beyond(beyond: list[Judgement], others: list[Judgement], found: Comparison) -> str:
    flaws = list(found.design.loc[found.design["status"] == "flaw", "field"])
    subject = "The treatment's features differ from the control's" if flaws else "Fine-tuning changed the features"
    text = f"{subject} by more than retraining the SAE does: {joined([_changed(one) for one in beyond])}."
    if others:
        names = " or the ".join(short_name(one.quantity) for one in others)
        text += f" The same cannot be said of the {names}."
    if flaws:
        text += f" But the design is flawed ({joined(flaws)}), so fine-tuning need not be the cause."
    if unreliable := too_many_alarms(found.calibration, [one.quantity for one in beyond]):
        names = joined([f"the {short_name(one)}" for one in unreliable])
        text += f" And SAEs of the control's model, put in the treatment's place, differ as often in {names}."
    return text


def _changed(one: Judgement) -> str:
    up = one.told.estimate > 0
    more = "larger" if up else "smaller"
    words = {
        "domain_share": f"a {'larger' if up else 'smaller'} share of them are domain features",
        "pass_rate": f"a {'larger' if up else 'smaller'} share of the tested ones pass",
        "coherence_mean": f"the domain features are {'more' if up else 'less'} coherent",
    }.get(one.quantity, f"the {short_name(one.quantity)} is {more}")
    return f"{words} ({difference(one.told)}{over_saes(one)})"


def _named(judged: list[Judgement]) -> str:
    return joined([short_name(one.quantity) for one in judged])


def _domain_counts(table1: pd.DataFrame, roles: Roles) -> str:
    parts = []
    for name in roles.ordered:
        found, total = int(table1.loc[name, "domain_features"]), int(table1.loc[name, "n_features"])
        share = f" ({percent(found / total)})" if total else ""
        parts.append(f"{count(found)} of {count(total)} in {name}{share}")
    return f"Domain features: {joined(parts)}."


def _scale_counts(table1: pd.DataFrame, roles: Roles, min_matches: int) -> str:
    dot, cosine = (
        joined([f"{count(int(table1.loc[name, column]))} in {name}" for name in roles.ordered])
        for column in ("matches_dot", "matches_cosine")
    )
    tokens = f"{min_matches} top token{'s' if min_matches != 1 else ''}"
    return (
        f"Counting every feature with at least {tokens} in the vocabulary: {dot} under the dot product "
        f"(the paper's scale), and {cosine} under the cosine."
    )


def _passes(table1: pd.DataFrame, judged: Judgement, roles: Roles, alpha: float) -> str:
    counted = [name for name in roles.ordered if int(table1.loc[name, "tested"])]
    if not counted:
        reasons = list(dict.fromkeys(str(reason) for reason in table1["reason"]))
        why = f" ({'; '.join(reasons)})"
        return f"No feature was tested by steering{why}, so nothing can be said about what the features cause."
    ours, papers = [], []
    for name in counted:
        row = table1.loc[name]
        ours.append(
            f"{count(int(row['passed']))} of {count(int(row['tested']))} in {name} ({percent(float(row['pass_rate']))})"
        )
        papers.append(f"{count(int(row['paper_passed']))} in {name}")
    text = (
        "Tested against placebos, these features passed at "
        f"q \N{LESS-THAN OR EQUAL TO} {alpha:g}: {joined(ours)}; "
        f"by the paper's rule, one steered sample against one unsteered: {joined(papers)}."
    )
    missing = [name for name in roles.ordered if name not in counted]
    if missing:
        text += f" None was tested in {joined(missing)}."
    return f"{text} {_difference(judged, roles)}"


def _coherence(table2: pd.DataFrame, judged: Judgement, roles: Roles) -> str:
    parts = []
    for name in roles.ordered:
        row = table2.loc[name]
        middle = float(row["mean"])
        if math.isnan(middle):
            parts.append(f"undefined in {name}")
            continue
        parts.append(f"{fixed(middle, 3)} in {name}{_ends(row['mean_low'], row['mean_high'])}")
    return f"Mean coherence of the domain features: {joined(parts)}. {_difference(judged, roles)}"


def _ends(low: float, high: float) -> str:
    """An interval in brackets; nothing where there is none."""
    return "" if math.isnan(low) else f" ({fixed(low, 3)} to {fixed(high, 3)})"


def _outcome(arms: Mapping[str, ArmTables]) -> str:
    """What the effects are effects on."""
    for arm in arms.values():
        if arm.effects is not None and len(arm.effects) and "outcome" in arm.effects:
            name = str(arm.effects["outcome"].iloc[0])
            return _OUTCOMES.get(name, name.replace("_", " "))
    return _OUTCOMES["similarity"]


def _effects(table1: pd.DataFrame, judged: Judgement, roles: Roles, outcome: str) -> str:
    parts = []
    for name in roles.ordered:
        row = table1.loc[name]
        if math.isnan(float(row["effect_mean"])):
            continue
        ends = _ends(row["effect_low"], row["effect_high"])
        parts.append(f"{signed(row['effect_mean'], 3)} in {name}{ends}")
    if not parts:
        return "The effect of steering is undefined in every arm."
    return (
        f"Beyond what placebos do, steering a feature moved the {outcome} by {joined(parts)} on average. "
        f"{_difference(judged, roles)}"
    )


def _difference(judged: Judgement, roles: Roles) -> str:
    """Treatment against control, the same for SAE noise, and what follows."""
    name = _NAMES[judged.quantity]
    change = judged.change
    if judged.status == "undefined":
        return f"Between {change.a} and {change.b}, {name} cannot be compared: {change.reason or 'no interval'}."
    text = f"From {change.a} to {change.b}, {name} differs by {difference(change)}."
    if judged.seeds is not None:
        text += f" {over_all_saes(judged, short=True)}"
    noise = [f"{difference(gap, short=True)} ({gap.b} minus {gap.a})" for gap in judged.retraining if gap.defined]
    if noise:
        text += f" Retraining the SAE alone gives {joined(noise)}."
    return f"{text} {_verdict(judged, roles)}"


def _verdict(judged: Judgement, roles: Roles) -> str:
    if judged.by_seeds:
        return _verdict_of_seeds(judged)
    if judged.status == "unclear":
        return "The interval of the difference includes zero: we cannot tell whether fine-tuning changed it."
    if judged.status == "unseparated":
        if roles.placebos:
            reasons = [gap.reason for gap in (*judged.retraining, *judged.beyond) if gap.reason]
            why = reasons[0] if reasons else "no interval"
            if all(gap.defined for gap in (*judged.retraining, *judged.beyond)):
                why = "it equals the control here, which does not show how much SAEs of one model differ"
            return f"The placebo cannot be compared ({why}), so this may be SAE noise."
        return "Without a placebo arm we cannot tell whether this is fine-tuning or SAE noise."
    apart = joined([f"{gap.b} minus {gap.a}: {difference(gap, short=True)}" for gap in judged.beyond])
    apart = f" ({apart})" if judged.beyond else ""
    if judged.status == "beyond":
        return f"The difference is more than that noise{apart}."
    return (
        f"That is not clearly more than this noise{apart}: {_chance_of_noise(judged)}, so we cannot credit fine-tuning "
        "with it."
    )


def _verdict_of_seeds(judged: Judgement) -> str:
    """Where both models have several SAEs, these decide."""
    if judged.status == "beyond":
        return f"Over all SAEs that is more than the noise of SAE training ({_chance_of_noise(judged)})."
    if judged.status == "unclear":
        return "Both intervals include zero: we cannot tell whether fine-tuning changed it."
    return (
        "Over all SAEs that is not clearly more than the noise of SAE training "
        f"({_chance_of_noise(judged)}), so we cannot credit fine-tuning with it."
    )


def _chance_of_noise(judged: Judgement) -> str:
    """How often seeds alone would set the SAEs so far apart."""
    if math.isnan(judged.p):
        return "how much SAEs of one model differ is not known"
    return f"noise alone would give as much with p = {fixed(judged.p, 3)}"
