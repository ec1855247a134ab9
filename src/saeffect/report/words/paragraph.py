"""The answer in one paragraph of about ninety words; each number is stored with its table row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.findings import CitedNumber, Comparison
from saeffect.comparison.judgement import ALL_SEEDS, Judgement, headline_row
from saeffect.comparison.quantities import wording
from saeffect.diffing.cross_activity import activity_changes, most_changed
from saeffect.report.words.names import first_tokens
from saeffect.report.words.numbers import bracketed, count, fixed, joined, percent
from saeffect.steering.placebos import control_label

__all__ = ["Paragraph", "over_saes", "paragraph"]

_EXAMPLES = 2


@dataclass
class Paragraph:
    """Text that records the table row of each of its numbers."""

    text: str = ""
    traces: list[CitedNumber] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.text += text

    def cite(self, text: str, table: str, **row: Any) -> None:
        """Add a number and its table row."""
        self.traces.append(CitedNumber(start=len(self.text), text=text, table=table, row=row))
        self.text += text


def paragraph(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    found: Comparison,
    judged: Mapping[str, Judgement],
    declared: Sequence[str],
    *,
    alpha: float,
) -> Paragraph:
    """The answer in a few sentences of plain text, with the declared quantities in the given order."""
    text = Paragraph()
    _quantities(text, found, judged, declared, (roles, _steering_control(arms)))
    if not found.table1["tested"].any():
        steered = any(arm.effects is not None and len(arm.effects) for arm in arms.values())
        said = "No steered feature could be tested" if steered else "No feature was steered"
        why = next((f" ({arm.unsteered})" for arm in arms.values() if arm.unsteered), "")
        text.say(f" {said}{why}, so what the features cause is not known.")
    _activity(text, arms[roles.control], found.matches.cross_activity, alpha)
    _fates(text, found.matches.fate_counts)
    _threats(text, found)
    return text


def _quantities(
    text: Paragraph,
    found: Comparison,
    judged: Mapping[str, Judgement],
    declared: Sequence[str],
    against: tuple[Roles, str],
) -> None:
    """The first quantity beside its placebo, then one sentence each; the pass rate comes even if undeclared."""
    roles, control = against
    known = [name for name in declared if judged[name].status != "undefined"]
    if not known:
        reasons = dict.fromkeys(judged[name].change.reason for name in declared if judged[name].change.reason)
        text.say(f"None of the declared quantities can be compared ({'; '.join(reasons) or 'no interval'}).")
    for place, name in enumerate(known):
        row = headline_row(found.contrasts, judged[name])
        if place == 0:
            _first(text, judged[name], row, roles, control)
        else:
            _other(text, judged[name], row, control)
    if "pass_rate" not in declared and judged["pass_rate"].status != "undefined":
        row = headline_row(found.contrasts, judged["pass_rate"])
        _other(text, judged["pass_rate"], row, control, ", not declared beforehand")


def _first(text: Paragraph, judgement: Judgement, row: pd.Series[Any], roles: Roles, control: str) -> None:
    name = judgement.quantity
    before, between = wording(name).first
    _cite(text, before, row, "value_a", between.format(control=control) + " before fine-tuning and ")
    _cite(text, "", row, "value_b", " after: ")
    text.cite(bracketed(judgement.headline, judgement.unit, full=True), "contrasts", **_place(row))
    text.say(over_saes(judgement))
    if judgement.seeds is not None and not judgement.by_seeds:
        text.say("; SAE noise included ")
        over = {"quantity": f"{name}_seeds", "comparison": ALL_SEEDS, "a": judgement.control, "b": judgement.treatment}
        text.cite(bracketed(judgement.seeds, judgement.unit), "contrasts", **over)
    noise = {placebo: by_seed for placebo, by_seed in judgement.retraining.items() if by_seed.defined}
    for place, (placebo, by_seed) in enumerate(noise.items()):
        text.say("; retraining the unchanged model's SAE gives " if place == 0 else ", ")
        where = {"quantity": name, "comparison": "retraining", "a": judgement.control, "b": placebo}
        text.cite(bracketed(by_seed, judgement.unit), "contrasts", **where)
        text.say(f" ({placebo})")
    if not roles.placebos and judgement.seeds is None:
        text.say("; there is no placebo arm to show what retraining the SAE alone gives")
    text.say(".")


def _other(text: Paragraph, judgement: Judgement, row: pd.Series[Any], control: str, remark: str = "") -> None:
    before, between, after = (words.format(control=control) for words in wording(judgement.quantity).goes)
    _cite(text, " " + before, row, "value_a", between)
    _cite(text, "", row, "value_b", after + " (")
    size = bracketed(judgement.headline, judgement.unit)
    text.cite(size, "contrasts", **_place(row), a=judgement.control, b=judgement.treatment)
    text.say(f"{over_saes(judgement)}{remark}).")


def over_saes(judgement: Judgement) -> str:
    """How many SAEs the difference is over; "" if it is that of single SAEs."""
    return f", {judgement.n_saes[1]} SAEs against {judgement.n_saes[0]}" if judgement.by_seeds else ""


def _place(row: pd.Series[Any]) -> dict[str, str]:
    return {"quantity": str(row["quantity"]), "comparison": str(row["comparison"])}


def _cite(text: Paragraph, before: str, row: pd.Series[Any], column: str, after: str) -> None:
    text.say(before)
    value = float(row[column])
    text.cite(percent(value) if row["unit"] == "share" else fixed(value), "contrasts", **_place(row))
    text.say(after)


def _steering_control(arms: Mapping[str, ArmTables]) -> str:
    placebos = (arm.effects["placebo"].iloc[0] for arm in arms.values() if arm.effects is not None and len(arm.effects))
    return next((f"{control_label(str(placebo))}s" for placebo in placebos), "their placebos")


def _activity(text: Paragraph, control: ArmTables, cross: pd.DataFrame, alpha: float) -> None:
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
    tokens = control.features.set_index("feature")["top_tokens"]
    changed = most_changed(cross, alpha=alpha, domain_only=True).head(_EXAMPLES)
    for place, row in enumerate(changed[changed["feature"].isin(tokens.index)].to_dict("records")):
        size = (
            f"{fixed(row['mean_treatment'] / row['mean_control'], 1)}×" if row["mean_control"] > 0 else "silent before"
        )
        words = first_tokens(tokens[row["feature"]], longest=None)
        text.say(", most changed: " if place == 0 else " and ")
        text.cite(f"{row['feature']} ({words}; {size})", "cross_activity", feature=int(row["feature"]))
    text.say(".")


def _fates(text: Paragraph, counts: pd.DataFrame) -> None:
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
    elif serious := int((found.threats["severity"] == "serious").sum()):
        text.say(" ")
        text.cite(count(serious), "threats", severity="serious")
        text.say(f" serious threat{'s' if serious > 1 else ''} to this answer {'are' if serious > 1 else 'is'} known.")
