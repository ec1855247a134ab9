"""Fates of features and their activity in both models, in sentences; "" if there is nothing to say."""

from __future__ import annotations

import math

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.comparison.arms import Roles
from saeffect.diffing.cross_activity import activity_changes
from saeffect.diffing.matched_null import ONE_PLACEBO
from saeffect.report.context import ReportContext
from saeffect.report.words.numbers import LEVEL, count, fixed, has_interval, interval, joined, percent, signed

__all__ = ["CALLED", "MEASURES", "called_features", "cross_sentence", "cross_summary", "fate_sentences", "fate_summary"]

CALLED = ("moved", "gone", "absorbed", "new")
"""Fates that single features can be called, since seeds of one model do not show them."""
MEASURES = {
    "decoder cosine": "Matched by what they write (decoder cosine)",
    "activation correlation": "Matched by when they fire (activation correlation)",
}
"""Headings of the measures of similarity."""
_JUDGED = {
    "decoder cosine": "by the direction of their decoder rows",
    "activation correlation": "by when they fire",
}


def fate_sentences(counts: pd.DataFrame, roles: Roles) -> list[str]:
    """Fates of the features, a sentence per measure; none if nothing was matched."""
    if counts.empty:
        return []
    return [
        _fates(_JUDGED.get(str(measure), str(measure)), rows, roles)
        for measure, rows in counts.groupby("measure", sort=False)
    ]


def _fates(how: str, rows: pd.DataFrame, roles: Roles) -> str:
    found = {(str(row["side"]), str(row["fate"])): row for row in rows.to_dict("records")}
    gone, new = found["control", "gone"], found["treatment", "new"]
    if math.isnan(gone["called"]):
        return f"Which features {roles.treatment} kept or lost, judged {how}, cannot be said: {gone['reason']}."
    called = {key: count(row["called"]) for key, row in found.items() if not math.isnan(row["called"])}
    words = [f"{called['control', fate]} {fate}" for fate in ("kept", "moved", "gone")]
    if ("control", "absorbed") in called:
        words.append(f"{called['control', 'absorbed']} absorbed by others")
    text = (
        f"Of {count(gone['n_features'])} features of {roles.control} that can be judged {how}, {joined(words)}; of "
        f"those of {roles.treatment}, {called['treatment', 'new']} are new."
    )
    # By similarity alone: the same rule for fine-tuning and for other seeds.
    parts = [
        f"{fixed(row['n_treatment'], 0)} {what} against {fixed(row['n_placebo'], 0)} in an SAE of another seed (excess "
        f"{signed(row['excess'], 0)}, {LEVEL} {signed(row['low'], 0)} to {signed(row['high'], 0)})"
        for row, what in (
            (gone, "features without a counterpart"),
            (new, "features that match nothing of the control's"),
        )
        if not math.isnan(row["low"])
    ]
    if parts:
        text += f" By similarity alone there are {joined(parts)}."
        if ONE_PLACEBO in (gone["reason"], new["reason"]):
            text += " With one other seed that interval does not hold the noise of SAE training."
    return text


def cross_sentence(cross: pd.DataFrame, roles: Roles, alpha: float) -> str:
    """Which features of the control's SAE fire more and which less in the fine-tuned model."""
    if cross.empty:
        return ""
    tested = cross[cross["q"].notna()]
    if tested.empty:
        reasons = cross.loc[cross["reason"] != "", "reason"]
        why = str(reasons.mode().iloc[0]) if len(reasons) else "no feature could be tested"
        return f"Whether features of {roles.control}'s SAE fire more in {roles.treatment} cannot be said: {why}."
    found = tested[tested["q"] <= alpha]
    more, less = found[found["difference"] > 0], found[found["difference"] < 0]
    text = (
        f"{roles.control}'s SAE applied to both models on the same text: of {count(len(tested))} features that fire, "
        f"{count(len(more))} fire more strongly in {roles.treatment} and {count(len(less))} more weakly (q ≤ {alpha:g})"
    )
    if "is_domain" in cross and bool(cross["is_domain"].any()):
        n_domain, n_more, n_less = (count(rows["is_domain"].sum()) for rows in (tested, more, less))
        text += f"; of the {n_domain} domain features among them {n_more} more and {n_less} less"
    return f"{text}. Any further training changes a little everywhere, so read the sizes."


def fate_summary(comparison: Comparison, context: ReportContext) -> str:
    """How many more features than between seeds have no counterpart, and how many single ones differ beyond noise."""
    counts = comparison.matches.fate_counts
    if counts.empty or not counts["n_placebo"].notna().any():
        return ""
    parts = []
    rows = counts[(counts["side"] == "control") & (counts["fate"] == "gone")]
    for row in rows[rows["n_placebo"].notna()].to_dict("records"):
        ends = interval(row["low"], row["high"], 0) if has_interval(row) else f"no interval: {row['reason']}"
        parts.append(
            f"{MEASURES[row['measure']]}, {count(row['n_treatment'])} of {count(row['n_features'])} features of the "
            f"control have no counterpart in the treatment, {signed(row['excess'], 0)} {ends} against another seed of "
            "the same model."
        )
    called = called_features(counts)
    single = (
        f"Single features that stand out by either measure (q ≤ {context.alpha:g}): {called}."
        if called
        else f"No single feature stands out as moved, gone or new (q ≤ {context.alpha:g})."
    )
    return " ".join([*parts, single])


def called_features(counts: pd.DataFrame) -> str:
    """How many features are called moved, gone, absorbed and new, from the fate counts; "" for none."""
    sums = counts[counts["fate"].isin(CALLED)].groupby("fate", sort=False)["called"].sum()
    return ", ".join(f"{count(n)} {fate}" for fate, n in sums.items() if n)


def cross_summary(comparison: Comparison, context: ReportContext) -> str:
    """How many domain features fire more, beside all others, in two sentences; or why that cannot be said."""
    cross = comparison.matches.cross_activity
    if cross.empty:
        return "The control's SAE was not applied to the fine-tuned model, so which features fire more cannot be said."
    if not cross["q"].notna().any():
        reason = next((reason for reason in cross["reason"] if reason), "no feature could be tested")
        return f"Which features fire more cannot be said: {reason}."
    changes = activity_changes(cross, alpha=context.alpha)
    more, less, domain = changes.more, changes.less, changes.domain
    parts = [
        f"Of {count(len(more))} features that fire, {count(more.sum())} fire more strongly in the fine-tuned model "
        f"and {count(less.sum())} more weakly (q ≤ {context.alpha:g})."
    ]
    if domain.any() and not domain.all():
        parts.append(
            f"Of the {count(domain.sum())} {context.domain} features {percent(more[domain].mean())} fire more and "
            f"{percent(less[domain].mean())} less; of all others {percent(more[~domain].mean())} and "
            f"{percent(less[~domain].mean())}."
        )
    parts.append("Any further training moves the activations of many features a little, so read the sizes.")
    return " ".join(parts)
