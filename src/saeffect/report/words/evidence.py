"""Calibration, power, regression, fates and activity in both models, in sentences; "" if there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from saeffect.comparison.arms import Roles
from saeffect.comparison.calibration import WITHIN
from saeffect.diffing.cross_activity import activity_changes
from saeffect.diffing.matched_null import ONE_PLACEBO
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import (
    count,
    fixed,
    has_interval,
    interval,
    is_defined,
    joined,
    percent,
    plural,
    signed,
)
from saeffect.steering.outcomes import OUTCOMES

__all__ = [
    "CALLED",
    "MEASURES",
    "calibration_verdict",
    "called_features",
    "coherence_sentence",
    "cross_summary",
    "fate_summary",
    "power_sentence",
    "size",
    "too_many_alarms",
]


def calibration_verdict(table: pd.DataFrame) -> str:
    """Whether the false-alarm rates allow the findings to be believed, in a few sentences."""
    if table.empty:
        return (
            "How often these tests raise false alarms was not measured, so nothing here can be checked against chance."
        )
    tested = table[(table["tests"] > 0) & table["rate"].notna()]
    if tested.empty:
        stand_in = "no SAE of the control's model can stand in for the treatment"
        reason = next((reason for reason in table["reason"] if reason), stand_in)
        return f"It cannot be said how often these tests raise false alarms: {reason}."
    declared = table[table["declared"].astype(bool)]
    if len(declared) and not (declared["tests"] > 0).any():
        reason = next((reason for reason in declared["reason"] if reason), "no reason was recorded")
        return f"It cannot be said how often the declared tests raise false alarms: {reason}."
    excessive = tested[tested["verdict"] != WITHIN]
    if len(excessive):
        tests = zip(excessive["test"], excessive["rule"], strict=True)
        names = "; ".join(dict.fromkeys(f"{short_name(test)} ({rule})" for test, rule in tests))
        text = f"Not to be believed, since they raise more false alarms than they promise: {names}."
    else:
        text = "No test raised more false alarms than it promises."
        between_saes = tested.loc[tested["unit"] != "features", "tests"]
        if len(between_saes) and between_saes.max() < 60:
            text += (
                f" Between whole SAEs there were at most {plural(int(between_saes.max()), 'trial')} a test, so this "
                "would show a test that is badly miscalibrated, not one that is slightly so."
            )
    unjudged = int((table["tests"] == 0).sum())
    if unjudged:
        text += f" {count(unjudged)} of {count(len(table))} tests could not be tried; the table says why."
    return text


def too_many_alarms(calibration: pd.DataFrame, quantities: Iterable[str]) -> list[str]:
    """The quantities whose test raised more false alarms than its nominal rate."""
    if calibration.empty:
        return []
    excessive = set(calibration.loc[(calibration["tests"] > 0) & (calibration["verdict"] != WITHIN), "test"])
    return [name for name in quantities if name in excessive]


def power_sentence(power: pd.DataFrame, roles: Roles, outcome: str) -> str:
    """The smallest differences detected with 80 % power; `outcome` is the outcome of steering."""
    if power.empty:
        return ""
    defined = power[power["detectable"].notna() & ~power["test"].str.startswith(("feature in", "only feature"))]
    if defined.empty:
        return "What difference this study could have found cannot be said: no test has units and spread in both arms."
    parts = [f"{size(row)} in the {short_name(row['test'])}" for row in defined.to_dict("records")]
    text = f"With four chances in five this study would have found a difference of {joined(parts)}."
    alone = power[power["test"] == f"feature in {roles.treatment}"]
    if len(alone) and math.isfinite(alone["detectable"].iloc[0]):
        limit = fixed(alone["detectable"].iloc[0])
        text += (
            f" A single steered feature had to move the {OUTCOMES[outcome].measures} by {limit} to be found on its own."
        )
    only = power[power["test"].str.startswith("only feature") & power["test"].str.endswith(f" in {roles.treatment}")]
    if len(only) and str(only["reason"].iloc[0]).startswith("with "):
        text += f" Were it the only one to work, it could not be found: {only['reason'].iloc[0]}."
    return text


def size(row: dict[Any, Any]) -> str:
    """The detectable difference of a row of the power table, with its unit if it is a share."""
    value = row["detectable"]
    return f"{fixed(100 * value, 1)} percentage points" if row["unit"] == "share" else fixed(value)


def coherence_sentence(table: pd.DataFrame) -> str:
    """The paper's open question: do coherent features have stronger effects? `table` is the regression."""
    row = next((row for row in table.to_dict("records") if row["term"] == "coherence"), None)
    if row is None or not is_defined(row["estimate"]):
        reason = row["reason"] if row and row["reason"] else "no feature was steered"
        return f"Whether coherent features have stronger effects cannot be said: {reason}."
    step = 0.1 * float(row["estimate"])
    if not has_interval(row):
        return (
            f"A coherence higher by 0.1 goes with an effect of {signed(step)}, but this has no interval "
            f"({row['reason'] or 'no reason was recorded'}), so nothing follows from it."
        )
    ends = interval(0.1 * row["low"], 0.1 * row["high"])
    if row["low"] > 0:
        return (
            "Yes, here more coherent features have stronger effects: a coherence higher by 0.1 goes with an effect "
            f"larger by {fixed(step)} {ends}, other properties being equal. That is association; nothing here shows "
            "that coherence is the cause."
        )
    if row["high"] < 0:
        return (
            "Here more coherent features have weaker effects: a coherence higher by 0.1 goes with an effect smaller by "
            f"{fixed(-step)} ({ends} in the effect), other properties being equal."
        )
    return (
        f"It cannot be said: a coherence higher by 0.1 goes with a change of the effect of {signed(step)} {ends}, and "
        "that interval includes zero."
    )


CALLED = ("moved", "gone", "absorbed", "new")
"""Fates that are called for single features: those that go beyond differences between seeds."""
MEASURES = {
    "decoder cosine": "Matched by what they write (decoder cosine)",
    "activation correlation": "Matched by when they fire (activation correlation)",
}
"""Headings of the measures of similarity."""


def fate_summary(counts: pd.DataFrame, alpha: float) -> str:
    """The excess of features without a counterpart over another seed, and the number of called features."""
    if counts.empty:
        return ""
    if not counts["n_placebo"].notna().any():
        return f"No feature can be called kept, moved, gone or new: {counts['reason'].iloc[0]}."
    parts = []
    rows = counts[(counts["side"] == "control") & (counts["fate"] == "gone")]
    for row in rows[rows["n_placebo"].notna()].to_dict("records"):
        ends = interval(row["low"], row["high"], 0) if has_interval(row) else f"no interval: {row['reason']}"
        parts.append(
            f"{MEASURES[row['measure']]}, {count(row['n_treatment'])} of {count(row['n_features'])} features of the "
            f"control have no counterpart in the treatment, {signed(row['excess'], 0)} {ends} against another seed of "
            "the same model."
        )
    if (rows["reason"] == ONE_PLACEBO).any():
        parts.append("With one other seed these intervals do not hold the noise of SAE training.")
    called = called_features(counts)
    single_features = (
        f"Single features that stand out by either measure (q ≤ {alpha:g}): {called}."
        if called
        else f"No single feature stands out as moved, gone or new (q ≤ {alpha:g})."
    )
    return " ".join([*parts, single_features])


def called_features(counts: pd.DataFrame) -> str:
    """Numbers of features called moved, gone, absorbed and new, from the fate counts; "" for none."""
    sums = counts[counts["fate"].isin(CALLED)].groupby("fate", sort=False)["called"].sum()
    return ", ".join(f"{count(n)} {fate}" for fate, n in sums.items() if n)


def cross_summary(cross: pd.DataFrame, alpha: float, domain: str = "domain") -> str:
    """Shares of domain features and of all others that fire more, in two sentences; or why they are unknown."""
    if cross.empty:
        return "The control's SAE was not applied to the fine-tuned model, so which features fire more cannot be said."
    if not cross["q"].notna().any():
        reason = next((reason for reason in cross["reason"] if reason), "no feature could be tested")
        return f"Which features fire more cannot be said: {reason}."
    changes = activity_changes(cross, alpha=alpha)
    more, less, in_domain = changes.more, changes.less, changes.domain
    n_nulls = int(cross["n_nulls"].iloc[0]) if "n_nulls" in cross else 0
    beyond = f", both over rows of text and against {plural(n_nulls, 'null fine-tune')}" if n_nulls else ""
    parts = [
        f"Of {count(len(more))} features that fire, {count(more.sum())} fire more strongly in the fine-tuned model "
        f"and {count(less.sum())} more weakly (q ≤ {alpha:g}{beyond})."
    ]
    if in_domain.any() and not in_domain.all():
        parts.append(
            f"Of the {count(in_domain.sum())} {domain} features {percent(more[in_domain].mean())} fire more and "
            f"{percent(less[in_domain].mean())} less; of all others {percent(more[~in_domain].mean())} and "
            f"{percent(less[~in_domain].mean())}."
        )
    parts.append(
        "Features of one fine-tune move together, so how many there are is no evidence by itself: that is judged by "
        "groups, above."
        if n_nulls
        else "Any further training moves the activations of many features a little, so read the sizes."
    )
    return " ".join(parts)
