"""Fates, cross-activity, calibration and power in sentences."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from saeffect.comparison.arms import Roles
from saeffect.comparison.calibration import WITHIN
from saeffect.comparison.judgement import Judgement
from saeffect.diffing.matched_null import ONE_PLACEBO
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import LEVEL, count, difference, fixed, joined, percent, signed

__all__ = [
    "calibration_sentence",
    "cross_sentence",
    "fate_sentences",
    "over_all_saes",
    "over_saes",
    "power_sentence",
    "too_many_alarms",
]

_MEASURES = {
    "decoder cosine": "by the direction of their decoder rows",
    "activation correlation": "by when they fire",
}


def fate_sentences(counts: pd.DataFrame, roles: Roles) -> list[str]:
    """What became of the features, a sentence a measure; none where nothing was matched."""
    if counts.empty:
        return []
    sentences = [
        _fates(_MEASURES.get(str(measure), str(measure)), rows, roles)
        for measure, rows in counts.groupby("measure", sort=False)
    ]
    return [sentence for sentence in sentences if sentence]


def _fates(how: str, rows: pd.DataFrame, roles: Roles) -> str:
    found = {(str(row["side"]), str(row["fate"])): row for row in rows.to_dict("records")}
    gone = found["control", "gone"]
    if math.isnan(float(gone["called"])):
        return f"Which features {roles.treatment} kept or lost, judged {how}, cannot be said: {gone['reason']}."
    called = {key: int(row["called"]) for key, row in found.items() if not math.isnan(float(row["called"]))}
    n_features = count(int(gone["n_features"]))
    words = [
        f"{count(called['control', 'kept'])} kept",
        f"{count(called['control', 'moved'])} moved",
        f"{count(called['control', 'gone'])} gone",
    ]
    if "control" in {side for side, fate in called if fate == "absorbed"}:
        words.append(f"{count(called['control', 'absorbed'])} absorbed by others")
    text = f"Of {n_features} features of {roles.control} that can be judged {how}, {joined(words)}"
    text += f"; of those of {roles.treatment}, {count(called['treatment', 'new'])} are new."
    excess = _excess(gone, found["treatment", "new"])
    return f"{text} {excess}" if excess else text


def _excess(gone: dict[str, Any], new: dict[str, Any]) -> str:
    """Without a counterpart by similarity alone, beside what other seeds show: the same rule for both."""
    parts = []
    for row, words in ((gone, "features without a counterpart"), (new, "features that match nothing of the control's")):
        if math.isnan(float(row["low"])):
            continue
        low, high = signed(float(row["low"]), 0), signed(float(row["high"]), 0)
        parts.append(
            f"{fixed(float(row['n_treatment']), 0)} {words} against {fixed(float(row['n_placebo']), 0)} in an SAE of "
            f"another seed (excess {signed(float(row['excess']), 0)}, {LEVEL} {low} to {high})"
        )
    if not parts:
        return ""
    remark = ""
    if ONE_PLACEBO in (str(gone["reason"]), str(new["reason"])):
        remark = " With one other seed that interval does not hold the noise of SAE training."
    return f"By similarity alone there are {joined(parts)}.{remark}"


def cross_sentence(cross: pd.DataFrame, roles: Roles, alpha: float) -> str:
    """Which features of the control's SAE fire more and which less in the fine-tuned model; "" if not measured."""
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
        f"{count(len(more))} fire more strongly in {roles.treatment} and {count(len(less))} more weakly "
        f"(q \N{LESS-THAN OR EQUAL TO} {alpha:g})"
    )
    if "is_domain" in cross and bool(cross["is_domain"].any()):
        domain = tested["is_domain"]
        n_more, n_less = int(more["is_domain"].sum()), int(less["is_domain"].sum())
        n_domain = count(int(domain.sum()))
        text += f"; of the {n_domain} domain features among them {count(n_more)} more and {count(n_less)} less"
    return f"{text}. Any further training changes a little everywhere, so read the sizes."


def over_saes(one: Judgement) -> str:
    """Whose difference it is, where it is not that of one SAE from one other."""
    return f", {one.n_saes[1]} SAEs against {one.n_saes[0]}" if one.by_seeds else ""


def over_all_saes(judged: Judgement, *, short: bool = False) -> str:
    """The difference over all SAEs of both models, and whether its interval leaves zero out; "" without one."""
    if judged.seeds is None:
        return ""
    size = difference(judged.seeds, short=short)
    ends = "excludes" if judged.seeds.sign else "includes"
    n_a, n_b = judged.n_saes
    if min(n_a, n_b) == 1:
        one, others, model = (judged.seeds.b, n_a, "control") if n_b == 1 else (judged.seeds.a, n_b, "treatment")
        return (
            f"Taking {one}'s SAE to scatter as the {others} SAEs of the {model}'s model do, it is {size}; that "
            f"holds the noise of SAE training and {ends} zero."
        )
    return (
        f"Over all SAEs of both models ({judged.n_saes[1]} against {judged.n_saes[0]}) it is {size}; that holds "
        f"the noise of SAE training and {ends} zero."
    )


def calibration_sentence(calibration: pd.DataFrame) -> str:
    """What the comparison finds where there is nothing to find."""
    if calibration.empty:
        return ""
    judged = calibration[(calibration["tests"] > 0) & (calibration["test"] != "cross-activity")]
    if judged.empty:
        reasons = calibration.loc[calibration["reason"] != "", "reason"]
        why = str(reasons.iloc[0]) if len(reasons) else "nothing can stand in for the treatment"
        return f"How often this comparison finds something where there is nothing could not be checked: {why}."
    declared = judged[judged["declared"]]
    shown = declared if len(declared) else judged
    parts = [
        f"{count(int(row.findings))} of {count(int(row.tests))} for {short_name(str(row.test))} ({row.rule})"
        for row in shown.itertuples()
    ]
    text = (
        "With SAEs of the control's model in the treatment's place, where there is nothing to find, the tests found: "
        f"{joined(parts)}."
    )
    bad = judged[judged["verdict"] != WITHIN]
    if bad.empty:
        few = int(shown["tests"].min())
        often = f", though with {few} test{'' if few == 1 else 's'} only frequent alarms would show" if few < 20 else ""
        return f"{text} No test raised more alarms than its nominal rate allows{often}."
    named = joined(
        [
            f"{short_name(str(row.test))} ({percent(row.rate)}, {percent(row.nominal)} promised)"
            for row in bad.itertuples()
        ]
    )
    return f"{text} Too many alarms: {named}. What these tests find in the treatment is not to be believed."


def too_many_alarms(calibration: pd.DataFrame, quantities: list[str]) -> list[str]:
    """Those of the quantities whose test raised more alarms than its nominal rate where nothing was to be found."""
    if calibration.empty:
        return []
    bad = set(calibration.loc[(calibration["tests"] > 0) & (calibration["verdict"] != WITHIN), "test"])
    return [name for name in quantities if name in bad]


def power_sentence(power: pd.DataFrame, roles: Roles, outcome: str = "similarity") -> str:
    """The smallest differences that would probably have been found; `outcome` is what steering was to move."""
    if power.empty:
        return ""
    known = power[power["detectable"].notna() & ~power["test"].str.startswith(("feature in", "only feature"))]
    if known.empty:
        return "What difference this study could have found cannot be said: no test has units and spread in both arms."
    parts = [f"{_amount(row)} in the {short_name(str(row.test))}" for row in known.itertuples()]
    text = f"With four chances in five this study would have found a difference of {joined(parts)}."
    singles = power[power["test"] == f"feature in {roles.treatment}"]
    if len(singles) and math.isfinite(float(singles["detectable"].iloc[0])):
        size = fixed(float(singles["detectable"].iloc[0]), 3)
        text += f" A single steered feature had to move the {outcome} by {size} to be found on its own."
    only = power[power["test"].str.startswith("only feature") & power["test"].str.endswith(f" in {roles.treatment}")]
    if len(only) and str(only["reason"].iloc[0]).startswith("with "):
        text += f" Were it the only one to work, it could not be found: {only['reason'].iloc[0]}."
    return text


def _amount(row: Any) -> str:
    if row.unit == "share":
        return f"{fixed(100 * row.detectable, 1)} percentage points"
    return fixed(row.detectable, 3)
