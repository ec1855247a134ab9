"""The answer in one paragraph, to be forwarded as it stands.

Which features changed, by how much, how sure that is, against which placebo, and whether it is more than other seeds
of the SAE show. Every number is read off a table; what is not known is said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.evidence_words import short_name
from saeffect.comparison.findings import Findings
from saeffect.comparison.judgement import Judgement
from saeffect.comparison.most_changed import most_changed
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
    sentences = []
    for quantity, one in judged.items():
        rows = found.contrasts[
            (found.contrasts["quantity"] == quantity) & (found.contrasts["comparison"] == "fine-tuning")
        ]
        if one.status == "undefined" or rows.empty:
            continue
        sentences.append(_values(rows.iloc[0], one, first=not sentences))
    if not sentences:
        return []
    noise = (
        f"The yardstick is {joined(list(roles.placebos))}, the unchanged model with an SAE trained from another seed: "
        "it was not fine-tuned, so what differs there is chance."
        if roles.placebos
        else "There is no placebo arm, so nothing shows how much two SAEs of one model differ by chance."
    )
    return [sentences[0], noise, *_beside_noise(judged), *sentences[1:]]


def _values(row: pd.Series, one: Judgement, *, first: bool) -> str:
    before, after = float(row["value_a"]), float(row["value_b"])
    write = percent if one.change.unit == "share" else (lambda value: number(value, 3))
    where = f" in {one.change.a} and {write(after)} in {one.change.b}"
    if first:
        where = f" before fine-tuning ({one.change.a}) and {write(after)} after it ({one.change.b})"
    verdict = {
        "beyond": ", more than SAE seeds alone show",
        "noise": ", not clearly more than SAE seeds alone show",
        "unclear": ", so it cannot be said whether it changed",
        "unseparated": ", which cannot be told from the noise of SAE training",
    }.get(one.status, "")
    subject = _SUBJECTS.get(one.quantity, f"The {short_name(one.quantity)} is")
    return f"{subject} {write(before)}{where} ({interval(one.change)}){verdict}."


_SUBJECTS = {
    "domain_share": "The share of features that belong to the domain is",
    "pass_rate": "The share of steered features that move texts towards their words more than their placebos do is",
    "coherence_mean": "The mean coherence of the domain features is",
    "effect": "The mean effect of steering is",
}


def _beside_noise(judged: Mapping[str, Judgement]) -> list[str]:
    """What retraining alone gives for the first quantity that has an interval, and what all seeds together show."""
    one = next((one for one in judged.values() if one.status != "undefined"), None)
    if one is None:
        return []
    sentences = []
    noise = [f"{interval(gap, short=True)} in {gap.b}" for gap in one.retraining if gap.defined]
    if noise:
        sentences.append(f"There the same difference is {joined(noise)}.")
    if one.seeds is not None:
        sure = (
            "which excludes zero"
            if one.seeds.sign == one.change.sign and one.change.sign
            else "which includes zero"
            if one.seeds.sign == 0
            else "which points the other way"
        )
        sentences.append(
            f"Over all SAE seeds of both models, noise of SAE training included, it is {interval(one.seeds)}, {sure}."
        )
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
        f"With an SAE of the unchanged model put in the fine-tuned one's place, these tests raised {whole(findings)} "
        f"false alarm{'' if findings == 1 else 's'} in {whole(tests)} trials{few}."
    )


def _of_activity(
    arms: Mapping[str, ArmTables], roles: Roles, cross: pd.DataFrame, alpha: float
) -> list[str]:
    """Domain features against all others, and the most changed ones by name."""
    if cross.empty or "is_domain" not in cross or not cross["q"].notna().any():
        return []
    tested = cross[cross["q"].notna()]
    domain = tested["is_domain"].astype(bool)
    more = (tested["q"] <= alpha) & (tested["difference"] > 0)
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
    return [f"{text}. Most changed among them: {joined(named)}."]


def _named(features: pd.DataFrame, changed: pd.DataFrame) -> list[str]:
    tokens = features.set_index("feature")["top_tokens"]
    parts = []
    for row in changed.head(_EXAMPLES).itertuples():
        if row.feature not in tokens.index:
            continue
        words = ", ".join(printable_token(str(token)).strip() for token in list(tokens[row.feature])[:_TOKENS])
        if row.mean_control > 0:
            size = f"{number(row.mean_treatment / row.mean_control, 2)} times as strongly"
        else:
            size = "where it was silent before"
        parts.append(f"feature {row.feature} ({words}), {size}")
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
        f"{whole(int(gone['n_features']))} features, 95 % interval {low} to {high})."
    )


def _of_threats(found: Findings) -> str:
    flaws = list(found.design.loc[found.design["status"] == "flaw", "field"])
    if flaws:
        return f"The arms also differ in {joined(flaws)}, so fine-tuning need not be the cause."
    serious = [] if found.threats.empty else list(found.threats.loc[found.threats["severity"] == "serious", "threat"])
    if serious:
        return f"{whole(len(serious))} serious threat{'s' if len(serious) > 1 else ''} to this answer " \
               f"{'are' if len(serious) > 1 else 'is'} listed below."  # fmt: skip
    return "Nothing that was recorded about the arms differs besides the model and what the design asks for."
