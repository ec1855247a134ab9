"""Calibration, power and the regression on coherence in sentences; "" if there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.comparison.arms import Roles
from saeffect.comparison.calibration import WITHIN
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
    "calibration_sentence",
    "calibration_verdict",
    "coherence_sentence",
    "power_sentence",
    "size",
    "too_many_alarms",
]


def calibration_sentence(calibration: pd.DataFrame) -> str:
    """What the comparison finds where there is nothing to find."""
    if calibration.empty:
        return ""
    tried = calibration[(calibration["tests"] > 0) & (calibration["test"] != "cross-activity")]
    if tried.empty:
        reasons = calibration.loc[calibration["reason"] != "", "reason"]
        why = str(reasons.iloc[0]) if len(reasons) else "nothing can stand in for the treatment"
        return f"How often this comparison finds something where there is nothing could not be checked: {why}."
    declared = tried[tried["declared"]]
    shown = declared if len(declared) else tried
    parts = [
        f"{count(row['findings'])} of {count(row['tests'])} for {short_name(row['test'])} ({row['rule']})"
        for row in shown.to_dict("records")
    ]
    text = (
        "With SAEs of the control's model in the treatment's place, where there is nothing to find, the tests found: "
        f"{joined(parts)}."
    )
    bad = [
        f"{short_name(row['test'])} ({percent(row['rate'])}, {percent(row['nominal'])} promised)"
        for row in tried[tried["verdict"] != WITHIN].to_dict("records")
    ]
    if bad:
        return f"{text} Too many alarms: {joined(bad)}. What these tests find in the treatment is not to be believed."
    few = int(shown["tests"].min())
    often = f", though with {few} test{'' if few == 1 else 's'} only frequent alarms would show" if few < 20 else ""
    return f"{text} No test raised more alarms than its nominal rate allows{often}."


def calibration_verdict(comparison: Comparison) -> str:
    """In a few plain sentences: may the findings be believed?"""
    table = comparison.calibration
    if table.empty:
        return (
            "How often these tests raise false alarms was not measured, so nothing here can be checked against chance."
        )
    known = table[(table["tests"] > 0) & table["rate"].notna()]
    if known.empty:
        stand_in = "no SAE of the control's model can stand in for the treatment"
        why = next((reason for reason in table["reason"] if reason), stand_in)
        return f"It cannot be said how often these tests raise false alarms: {why}."
    declared = table[table["declared"].astype(bool)]
    if len(declared) and not (declared["tests"] > 0).any():
        why = next((reason for reason in declared["reason"] if reason), "no reason was recorded")
        return f"It cannot be said how often the declared tests raise false alarms: {why}."
    bad = known[known["verdict"] != WITHIN]
    if len(bad):
        tests = zip(bad["test"], bad["rule"], strict=True)
        names = "; ".join(dict.fromkeys(f"{short_name(test)} ({rule})" for test, rule in tests))
        text = f"Not to be believed, since they raise more false alarms than they promise: {names}."
    else:
        text = "No test raised more false alarms than it promises."
        between_saes = known.loc[known["unit"] != "features", "tests"]
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
    """The quantities whose test raised more alarms than its nominal rate where there was nothing to find."""
    if calibration.empty:
        return []
    bad = set(calibration.loc[(calibration["tests"] > 0) & (calibration["verdict"] != WITHIN), "test"])
    return [name for name in quantities if name in bad]


def power_sentence(power: pd.DataFrame, roles: Roles, outcome: str) -> str:
    """The smallest differences that would probably have been found; `outcome` is the outcome of steering."""
    if power.empty:
        return ""
    known = power[power["detectable"].notna() & ~power["test"].str.startswith(("feature in", "only feature"))]
    if known.empty:
        return "What difference this study could have found cannot be said: no test has units and spread in both arms."
    parts = [f"{size(row)} in the {short_name(row['test'])}" for row in known.to_dict("records")]
    text = f"With four chances in five this study would have found a difference of {joined(parts)}."
    single = power[power["test"] == f"feature in {roles.treatment}"]
    if len(single) and math.isfinite(single["detectable"].iloc[0]):
        least = fixed(single["detectable"].iloc[0])
        text += (
            f" A single steered feature had to move the {OUTCOMES[outcome].measures} by {least} to be found on its own."
        )
    only = power[power["test"].str.startswith("only feature") & power["test"].str.endswith(f" in {roles.treatment}")]
    if len(only) and str(only["reason"].iloc[0]).startswith("with "):
        text += f" Were it the only one to work, it could not be found: {only['reason'].iloc[0]}."
    return text


def size(row: dict[Any, Any]) -> str:
    """The detectable difference of a row of the power table, with its unit if it is a share."""
    value = row["detectable"]
    return f"{fixed(100 * value, 1)} percentage points" if row["unit"] == "share" else fixed(value)


def coherence_sentence(comparison: Comparison) -> str:
    """The paper's open question: do coherent features have stronger effects?"""
    table = comparison.regression
    row = next((row for row in table.to_dict("records") if row["term"] == "coherence"), None)
    if row is None or not is_defined(row["estimate"]):
        why = row["reason"] if row and row["reason"] else "no feature was steered"
        return f"Whether coherent features have stronger effects cannot be said: {why}."
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
