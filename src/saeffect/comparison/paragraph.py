"""The answer in one paragraph, to be forwarded as it stands.

Which features changed, by how much, how sure that is, against which placebo, and whether it is more than other seeds
of the SAE show. Every number is read off a table; what is not known is said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.evidence_words import over_all_saes, short_name
from saeffect.comparison.fate_counts import ONE_PLACEBO
from saeffect.comparison.findings import Findings
from saeffect.comparison.judgement import ALL_SEEDS, Judgement
from saeffect.comparison.most_changed import activity_changes, most_changed
from saeffect.comparison.wording import interval, joined, number, percent, whole
from saeffect.text.tokens import printable_token

__all__ = ["paragraph"]

_EXAMPLES, _TOKENS = 3, 3


def paragraph(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    found: Findings,
    judged: Mapping[str, Judgement],
    *,
    alpha: float,
) -> str:
    """The answer in about eight sentences; nothing in it is markup.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        found: All tables.
        judged: Judgements of the declared quantities, by name, in the order of the study.
        alpha: Highest q of a finding about a single feature.
    """
    sentences = [
        *_of_quantities(found, judged, roles),
        _of_alarms(found.calibration, judged),
        *_of_activity(arms, roles, found.matches.cross_activity, alpha),
        _of_fates(found.matches.fate_counts, roles),
        _of_threats(found),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _of_quantities(found: Findings, judged: Mapping[str, Judgement], roles: Roles) -> list[str]:
    """The first quantity with everything about it; of the others how they changed."""
    quantities = set(found.contrasts["quantity"])
    known = {name: one for name, one in judged.items() if one.status != "undefined" and name in quantities}
    if not known:
        why = "; ".join(dict.fromkeys(one.change.reason for one in judged.values() if one.change.reason))
        return [f"None of the declared quantities can be compared ({why or 'no interval'})."]
    name, first = next(iter(known.items()))
    write, (before, after) = _writer(first), _values(found.contrasts, first)
    mean = ", on average over SAEs," if first.by_seeds else ""
    saes = [f", {n} SAEs" if first.by_seeds else "" for n in first.n_saes]
    text = (
        f"{_SUBJECTS.get(name, f'The {short_name(name)} is')}{mean} {write(before)} before fine-tuning "
        f"({roles.control}{saes[0]}) and {write(after)} after it ({roles.treatment}{saes[1]}): {interval(first.told)}"
    )
    sentences = [f"{text}{_VERDICTS[first.status]}.", *_beside_noise(first, roles)]
    others = {other: one for other, one in known.items() if other != name}
    for status in ("beyond", "noise", "unclear", "unseparated"):
        some = [_changed(found.contrasts, one) for one in others.values() if one.status == status]
        if some:
            sentences.append(f"{_OTHERS[status]} {joined(some)}.")
    return sentences


def _values(contrasts: pd.DataFrame, one: Judgement) -> tuple[float, float]:
    """What the difference that is told is a difference of."""
    quantity, comparison = (f"{one.quantity}_seeds", ALL_SEEDS) if one.by_seeds else (one.quantity, "fine-tuning")
    row = contrasts[(contrasts["quantity"] == quantity) & (contrasts["comparison"] == comparison)].iloc[0]
    return float(row["value_a"]), float(row["value_b"])


_SUBJECTS = {
    "domain_share": "The share of the SAE's features that belong to the domain is",
    "pass_rate": "The share of steered features that pass against their placebos is",
    "coherence_mean": "The mean coherence of the domain features is",
    "effect": "The mean effect of steering is",
}
_VERDICTS = {
    "beyond": ", more than SAE seeds alone show",
    "noise": ", not clearly more than SAE seeds alone show",
    "unclear": ", so we cannot tell whether it changed",
    "unseparated": ", which cannot be told from the noise of SAE training",
}
_OTHERS = {
    "beyond": "More than SAE seeds alone show is also the change of",
    "noise": "Not clearly more than SAE seeds show is the change of",
    "unclear": "Nor can we tell whether there is a change in",
    "unseparated": "From the noise of SAE training nobody can tell the change of",
}


def _writer(one: Judgement) -> Callable[[float], str]:
    return percent if one.change.unit == "share" else (lambda value: number(value, 3))


def _changed(contrasts: pd.DataFrame, one: Judgement) -> str:
    write, (before, after) = _writer(one), _values(contrasts, one)
    saes = f", {one.n_saes[1]} SAEs against {one.n_saes[0]}" if one.by_seeds else ""
    return f"the {short_name(one.quantity)} ({write(before)} to {write(after)}; {interval(one.told)}{saes})"


def _beside_noise(one: Judgement, roles: Roles) -> list[str]:
    """What retraining alone gives, and what all seeds together show."""
    sentences = []
    noise = [f"{interval(gap)} ({gap.b})" for gap in one.retraining if gap.defined]
    if noise:
        sentences.append(
            "For comparison, merely training the SAE of the unchanged model again from another seed gives "
            f"{joined(noise)}."
        )
    elif not roles.placebos and one.seeds is None:
        sentences.append("There is no placebo arm, so how much two SAEs of one model differ by chance is unknown.")
    if one.by_seeds:
        return ["That interval holds the noise of SAE training.", *sentences]
    if one.seeds is not None:
        sentences.append(over_all_saes(one))
    return sentences


def _of_alarms(calibration: pd.DataFrame, judged: Mapping[str, Judgement]) -> str:
    """How often the headline's own tests cry wolf."""
    if calibration.empty:
        return ""
    rows = calibration[calibration["test"].isin(list(judged)) & (calibration["tests"] > 0)]
    if rows.empty:
        return ""
    findings, tests = int(rows["findings"].sum()), int(rows["tests"].sum())
    few = ", too few to notice rare ones" if tests < 60 else ""
    return (
        f"Where nothing was fine-tuned (an SAE of the unchanged model in the treatment's place) these tests raised "
        f"{whole(findings)} false alarm{'' if findings == 1 else 's'} in {whole(tests)} trials{few}."
    )


def _of_activity(arms: Mapping[str, ArmTables], roles: Roles, cross: pd.DataFrame, alpha: float) -> list[str]:
    """Domain features against all others, and the most changed ones by name."""
    if cross.empty:
        return []
    changes = activity_changes(cross, alpha=alpha)
    more, domain = changes.more, changes.domain
    if not domain.any():
        return []
    text = (
        f"On the same text {whole(int(more[domain].sum()))} of the {whole(int(domain.sum()))} domain features of "
        f"{roles.control}'s SAE fire more strongly in the fine-tuned model (q \N{LESS-THAN OR EQUAL TO} {alpha:g})"
    )
    if (~domain).any():
        text += f", {percent(float(more[domain].mean()))} against {percent(float(more[~domain].mean()))} of all others"
    named = _named(arms[roles.control].features, most_changed(cross, alpha=alpha, domain_only=True))
    if not named:
        return [f"{text}."]
    return [
        f"{text}; the most changed are {joined(named)}. "
        "How much of this any other fine-tuning would do was not measured."
    ]


def _named(features: pd.DataFrame, changed: pd.DataFrame) -> list[str]:
    tokens = features.set_index("feature")["top_tokens"]
    parts = []
    for row in changed.head(_EXAMPLES).itertuples():
        if row.feature not in tokens.index:
            continue
        shown = [printable_token(str(token)).strip() for token in tokens[row.feature]]
        words = ", ".join(list({word.lower(): word for word in reversed(shown)}.values())[::-1][:_TOKENS])
        size = f"{number(row.mean_treatment / row.mean_control, 1)}×" if row.mean_control > 0 else "silent before"
        parts.append(f"feature {row.feature} ({words}; {size})")
    return parts


def _of_fates(counts: pd.DataFrame, roles: Roles) -> str:
    """Excess of features without a counterpart over what seeds show; the first measure speaks."""
    if counts.empty:
        return ""
    rows = counts[counts["measure"] == counts["measure"].iloc[0]]
    gone = rows[(rows["side"] == "control") & (rows["fate"] == "gone")].iloc[0]
    if math.isnan(float(gone["called"])):
        return ""
    called = int(rows.loc[rows["fate"].isin(["moved", "gone", "new", "absorbed"]), "called"].fillna(0).sum())
    text = (
        "No single feature can be called gone, moved or new beyond what SAE seeds show"
        if not called
        else f"{whole(called)} single features are gone, moved or new beyond what SAE seeds show"
    )
    if math.isnan(float(gone["low"])):
        return f"{text}."
    low, high = (number(float(gone[end]), 0, signed=True) for end in ("low", "high"))
    share = percent(float(gone["n_treatment"]) / int(gone["n_features"]))
    usual = percent(float(gone["n_placebo"]) / int(gone["n_features"]))
    return (
        f"{text}: {share} of {roles.control}'s features have no counterpart in the fine-tuned model's SAE, but {usual} "
        f"have none in another SAE of the same model either (excess {number(float(gone['excess']), 0, signed=True)} of "
        f"{whole(int(gone['n_features']))} features, 95 % interval {low} to {high}"
        f"{', without the noise of SAE training' if str(gone['reason']) == ONE_PLACEBO else ''})."
    )


def _of_threats(found: Findings) -> str:
    flaws = list(found.design.loc[found.design["status"] == "flaw", "field"])
    if flaws:
        return f"The arms also differ in {joined(flaws)}, so fine-tuning need not be the cause."
    serious = [] if found.threats.empty else list(found.threats.loc[found.threats["severity"] == "serious", "threat"])
    if serious:
        return f"{whole(len(serious))} serious threat{'s' if len(serious) > 1 else ''} to this answer " \
               f"{'are' if len(serious) > 1 else 'is'} listed below."  # fmt: skip
    if (found.design["status"] == "unknown").any():
        return ""
    return "The design check found no other difference between the arms that matters."
