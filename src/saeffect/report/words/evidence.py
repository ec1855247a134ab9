"""Fates, cross-activity, calibration and power in sentences; "" if there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from saeffect.comparison.arms import Roles
from saeffect.comparison.calibration import WITHIN
from saeffect.diffing.matched_null import ONE_PLACEBO
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import LEVEL, count, fixed, joined, percent, signed
from saeffect.steering.outcomes import OUTCOMES

__all__ = ["calibration_sentence", "cross_sentence", "fate_sentences", "power_sentence", "size", "too_many_alarms"]

_MEASURES = {
    "decoder cosine": "by the direction of their decoder rows",
    "activation correlation": "by when they fire",
}


def fate_sentences(counts: pd.DataFrame, roles: Roles) -> list[str]:
    """Fates of the features, a sentence per measure; none if nothing was matched."""
    if counts.empty:
        return []
    return [
        _fates(_MEASURES.get(str(measure), str(measure)), rows, roles)
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
