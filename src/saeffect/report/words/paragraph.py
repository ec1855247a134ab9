"""The answer in one short paragraph, to be forwarded as it stands.

What changed, by how much, how sure that is, beside which placebo, and what steering says, in about ninety words.
Every number is read off a row of a table, and the paragraph knows which. What it leaves out stands in
`Answer.sentences` and in the sections of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.findings import Comparison, Trace
from saeffect.comparison.judgement import ALL_SEEDS, Gap, Judgement, judge, told_row
from saeffect.diffing.cross_activity import activity_changes, most_changed
from saeffect.lm.tokens import printable_token
from saeffect.report.words.evidence import over_saes
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import bracketed, count, fixed, joined, percent

__all__ = ["Paragraph", "paragraph"]

_EXAMPLES, _TOKENS = 2, 2


@dataclass
class Paragraph:
    """Text that remembers which table each of its numbers was read off."""

    text: str = ""
    traces: list[Trace] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Add words."""
        self.text += text

    def cite(self, text: str, table: str, **row: Any) -> None:
        """Add a number, with the row that it was read off."""
        self.traces.append(Trace(start=len(self.text), text=text, table=table, row=row))
        self.text += text


def paragraph(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    found: Comparison,
    judged: Mapping[str, Judgement],
    *,
    alpha: float,
) -> Paragraph:
    """The answer in a few sentences; nothing in it is markup.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        found: All tables.
        judged: Judgements of the declared quantities, by name, in the order of the study.
        alpha: Highest q of a finding about a single feature.
    """
    text = Paragraph()
    _quantities(text, found, judged, roles, _steering_control(arms))
    if not int(found.table1["tested"].sum()):
        steered = any(arm.effects is not None and len(arm.effects) for arm in arms.values())
        said = "No steered feature could be tested" if steered else "No feature was steered"
        why = next((f" ({arm.unsteered})" for arm in arms.values() if arm.unsteered), "")
        text.say(f" {said}{why}, so what the features cause is not known.")
    _activity(text, arms, roles, found.matches.cross_activity, alpha)
    _fates(text, found.matches.fate_counts)
    _threats(text, found)
    return text


def _quantities(
    text: Paragraph, found: Comparison, judged: Mapping[str, Judgement], roles: Roles, control: str
) -> None:
    """The first quantity beside its placebo, the others in a sentence each."""
    compared = set(found.contrasts.loc[found.contrasts["comparison"] == "fine-tuning", "quantity"])
    known = {name: one for name, one in judged.items() if one.status != "undefined" and name in compared}
    if not known:
        why = "; ".join(dict.fromkeys(one.change.reason for one in judged.values() if one.change.reason))
        text.say(f"None of the declared quantities can be compared ({why or 'no interval'}).")
    for place, one in enumerate(known.values()):
        if place == 0:
            _first(text, one, told_row(found.contrasts, one), roles, control)
        else:
            _other(text, one, told_row(found.contrasts, one), control)
    if "pass_rate" not in judged and "pass_rate" in compared:  # steering has its say in any case
        steered = judge(found.contrasts, "pass_rate")
        if steered.status != "undefined":
            _other(text, steered, told_row(found.contrasts, steered), control, ", not declared beforehand")


def _first(text: Paragraph, one: Judgement, row: pd.Series[Any], roles: Roles, control: str) -> None:
    write, name = _writer(one), one.quantity
    before, between = _SUBJECTS.get(name, (f"The {short_name(name)} is ", ""))
    text.say(before)
    _cite(text, write(float(row["value_a"])), row)
    text.say(between.format(control=control) + " before fine-tuning and ")
    _cite(text, write(float(row["value_b"])), row)
    text.say(" after: ")
    _cite(text, bracketed(one.told, full=True), row)
    text.say(over_saes(one))
    if one.seeds is not None and not one.by_seeds:
        text.say("; SAE noise included ")
        _cite_gap(text, one.seeds, f"{name}_seeds", ALL_SEEDS)
    for place, gap in enumerate(gap for gap in one.retraining if gap.defined):
        text.say("; retraining the unchanged model's SAE gives " if place == 0 else ", ")
        _cite_gap(text, gap, name, "retraining")
        text.say(f" ({gap.b})")
    if not roles.placebos and one.seeds is None:
        text.say("; there is no placebo arm to show what retraining the SAE alone gives")
    text.say(".")


def _other(text: Paragraph, one: Judgement, row: pd.Series[Any], control: str, remark: str = "") -> None:
    write = _writer(one)
    words = _OTHERS.get(one.quantity, ("The " + short_name(one.quantity) + " goes from ", " to ", ""))
    before, between, after = (word.format(control=control) for word in words)
    text.say(" " + before)
    _cite(text, write(float(row["value_a"])), row)
    text.say(between)
    _cite(text, write(float(row["value_b"])), row)
    text.say(after + " (")
    _cite_gap(text, one.told, str(row["quantity"]), str(row["comparison"]))
    text.say(f"{over_saes(one)}{remark}).")


def _cite(text: Paragraph, words: str, row: pd.Series[Any]) -> None:
    text.cite(words, "contrasts", quantity=str(row["quantity"]), comparison=str(row["comparison"]))


def _cite_gap(text: Paragraph, gap: Gap, name: str, comparison: str) -> None:
    text.cite(bracketed(gap), "contrasts", quantity=name, comparison=comparison, a=gap.a, b=gap.b)


_SUBJECTS = {
    "domain_share": ("Domain features make up ", " of the SAE"),
    "pass_rate": ("Of the steered features ", " pass against {control}"),
    "coherence_mean": ("The mean coherence of domain features is ", ""),
    "effect": ("The mean effect of steering is ", ""),
}
_OTHERS = {
    "domain_share": ("The share of domain features goes from ", " to ", ""),
    "pass_rate": ("Steered, ", " of features pass against {control} before and ", " after"),
    "coherence_mean": ("The domain features' mean coherence goes from ", " to ", ""),
    "effect": ("The mean effect of steering goes from ", " to ", ""),
}
_CONTROLS = {
    "matched": "matched placebos",
    "random": "random directions",
    "shuffled": "shuffled references",
}


def _steering_control(arms: Mapping[str, ArmTables]) -> str:
    """What the steered features had to beat."""
    for arm in arms.values():
        if arm.effects is not None and len(arm.effects):
            return _CONTROLS.get(str(arm.effects["placebo"].iloc[0]), "their placebos")
    return "their placebos"


def _writer(one: Judgement) -> Callable[[float], str]:
    return percent if one.change.unit == "share" else (lambda value: fixed(value, 3))


def _activity(text: Paragraph, arms: Mapping[str, ArmTables], roles: Roles, cross: pd.DataFrame, alpha: float) -> None:
    """Domain features against all others, and the most changed ones by name."""
    if cross.empty:
        return
    changes = activity_changes(cross, alpha=alpha)
    more, domain = changes.more, changes.domain
    if not domain.any():
        return
    text.say(" On the same text ")
    text.cite(percent(float(more[domain].mean())), "cross_activity", is_domain=True)
    text.say(" of domain features fire more afterwards")
    if (~domain).any():
        text.say(" (others: ")
        text.cite(percent(float(more[~domain].mean())), "cross_activity", is_domain=False)
        text.say(")")
    tokens = arms[roles.control].features.set_index("feature")["top_tokens"]
    changed = most_changed(cross, alpha=alpha, domain_only=True)
    shown = [row for row in changed.head(_EXAMPLES).to_dict("records") if row["feature"] in tokens.index]
    for place, row in enumerate(shown):
        text.say(", most changed: " if place == 0 else " and ")
        text.cite(_named(row, tokens[row["feature"]]), "cross_activity", feature=int(row["feature"]))
    text.say(".")


def _named(row: Mapping[Any, Any], tokens: list[str]) -> str:
    shown = [printable_token(str(token)).strip() for token in tokens]
    words = ", ".join(list({word.lower(): word for word in reversed(shown)}.values())[::-1][:_TOKENS])
    size = f"{fixed(row['mean_treatment'] / row['mean_control'], 1)}×" if row["mean_control"] > 0 else "silent before"
    return f"{row['feature']} ({words}; {size})"


def _fates(text: Paragraph, counts: pd.DataFrame) -> None:
    """Single features beyond what seeds show; the first measure speaks."""
    if counts.empty:
        return
    measure = str(counts["measure"].iloc[0])
    rows = counts[counts["measure"] == measure]
    gone = rows[(rows["side"] == "control") & (rows["fate"] == "gone")].iloc[0]
    if math.isnan(float(gone["called"])):
        return
    called = int(rows.loc[rows["fate"].isin(["moved", "gone", "new", "absorbed"]), "called"].fillna(0).sum())
    text.say(" ")
    words = "No single feature is" if not called else "1 feature is" if called == 1 else f"{count(called)} features are"
    text.cite(words, "fate_counts", measure=measure)
    text.say(" gone, moved or new beyond SAE noise.")


def _threats(text: Paragraph, found: Comparison) -> None:
    flaws = list(found.design.loc[found.design["status"] == "flaw", "field"])
    if flaws:
        text.say(f" The arms also differ in {joined(flaws)}, so fine-tuning need not be the cause.")
        return
    serious = 0 if found.threats.empty else int((found.threats["severity"] == "serious").sum())
    if serious:
        text.say(" ")
        text.cite(count(serious), "threats", severity="serious")
        text.say(f" serious threat{'s' if serious > 1 else ''} to this answer {'are' if serious > 1 else 'is'} known.")
