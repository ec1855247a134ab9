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

_N_EXAMPLES = 2


@dataclass
class Paragraph:
    """Text that records the table row of each of its numbers."""

    text: str = ""
    traces: list[CitedNumber] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.text += text

    def cite(self, text: str, table: str, **row: Any) -> None:
        """Add a number and its table row."""
        self.traces.append(CitedNumber(start=len(self.text), text=text, table=table, row=row))
        self.text += text


def paragraph(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    comparison: Comparison,
    judged: Mapping[str, Judgement],
    declared: Sequence[str],
    *,
    alpha: float,
) -> Paragraph:
    """The answer in a few sentences of plain text, with the declared quantities in the given order."""
    text = Paragraph()
    _quantities(text, comparison, judged, declared, (roles, _steering_control(arms)))
    if not comparison.table1["tested"].any():
        steered = any(arm.effects is not None and len(arm.effects) for arm in arms.values())
        outcome = "No steered feature could be tested" if steered else "No feature was steered"
        reason = next((f" ({arm.unsteered})" for arm in arms.values() if arm.unsteered), "")
        text.add(f" {outcome}{reason}, so what the features cause is not known.")
    _activity_sentence(text, arms[roles.control], comparison.matches.cross_activity, alpha)
    _fate_sentence(text, comparison.matches.fate_counts)
    _threat_sentence(text, comparison)
    return text


def _quantities(
    text: Paragraph,
    comparison: Comparison,
    judged: Mapping[str, Judgement],
    declared: Sequence[str],
    reference: tuple[Roles, str],
) -> None:
    """The first quantity with its placebo, then a sentence each; the pass rate is added even if undeclared."""
    roles, control = reference
    defined = [name for name in declared if judged[name].status != "undefined"]
    if not defined:
        reasons = dict.fromkeys(judged[name].change.reason for name in declared if judged[name].change.reason)
        text.add(f"None of the declared quantities can be compared ({'; '.join(reasons) or 'no interval'}).")
    for i, name in enumerate(defined):
        row = headline_row(comparison.contrasts, judged[name])
        if i == 0:
            _first_quantity(text, judged[name], row, roles, control)
        else:
            _next_quantity(text, judged[name], row, control)
    if "pass_rate" not in declared and judged["pass_rate"].status != "undefined":
        row = headline_row(comparison.contrasts, judged["pass_rate"])
        _next_quantity(text, judged["pass_rate"], row, control, ", not declared beforehand")


def _first_quantity(text: Paragraph, judgement: Judgement, row: pd.Series[Any], roles: Roles, control: str) -> None:
    name = judgement.quantity
    before, between = wording(name).first
    _cite(text, before, row, "value_a", between.format(control=control) + " before fine-tuning and ")
    _cite(text, "", row, "value_b", " after: ")
    text.cite(bracketed(judgement.headline, judgement.unit, full=True), "contrasts", **_row_key(row))
    text.add(over_saes(judgement))
    if judgement.seeds is not None and not judgement.by_seeds:
        text.add("; SAE noise included ")
        key = {"quantity": f"{name}_seeds", "comparison": ALL_SEEDS, "a": judgement.control, "b": judgement.treatment}
        text.cite(bracketed(judgement.seeds, judgement.unit), "contrasts", **key)
    noise = {placebo: by_seed for placebo, by_seed in judgement.retraining.items() if by_seed.defined}
    for i, (placebo, by_seed) in enumerate(noise.items()):
        text.add("; retraining the unchanged model's SAE gives " if i == 0 else ", ")
        key = {"quantity": name, "comparison": "retraining", "a": judgement.control, "b": placebo}
        text.cite(bracketed(by_seed, judgement.unit), "contrasts", **key)
        text.add(f" ({placebo})")
    if not roles.placebos and judgement.seeds is None:
        text.add("; there is no placebo arm to show what retraining the SAE alone gives")
    text.add(".")


def _next_quantity(text: Paragraph, judgement: Judgement, row: pd.Series[Any], control: str, remark: str = "") -> None:
    before, between, after = (words.format(control=control) for words in wording(judgement.quantity).goes)
    _cite(text, " " + before, row, "value_a", between)
    _cite(text, "", row, "value_b", after + " (")
    size = bracketed(judgement.headline, judgement.unit)
    text.cite(size, "contrasts", **_row_key(row), a=judgement.control, b=judgement.treatment)
    text.add(f"{over_saes(judgement)}{remark}).")


def over_saes(judgement: Judgement) -> str:
    """The numbers of SAEs behind the difference; "" if it is that of single SAEs."""
    return f", {judgement.n_saes[1]} SAEs against {judgement.n_saes[0]}" if judgement.by_seeds else ""


def _row_key(row: pd.Series[Any]) -> dict[str, str]:
    return {"quantity": str(row["quantity"]), "comparison": str(row["comparison"])}


def _cite(text: Paragraph, before: str, row: pd.Series[Any], column: str, after: str) -> None:
    text.add(before)
    value = float(row[column])
    text.cite(percent(value) if row["unit"] == "share" else fixed(value), "contrasts", **_row_key(row))
    text.add(after)


def _steering_control(arms: Mapping[str, ArmTables]) -> str:
    placebos = (arm.effects["placebo"].iloc[0] for arm in arms.values() if arm.effects is not None and len(arm.effects))
    return next((f"{control_label(str(placebo))}s" for placebo in placebos), "their placebos")


def _activity_sentence(text: Paragraph, control: ArmTables, cross: pd.DataFrame, alpha: float) -> None:
    if cross.empty:
        return
    changes = activity_changes(cross, alpha=alpha)
    more, domain = changes.more, changes.domain
    if not domain.any():
        return
    text.add(" On the same text ")
    text.cite(percent(float(more[domain].mean())), "cross_activity", is_domain=True)
    text.add(" of domain features fire more afterwards" + (", beyond null fine-tunes" if "q_nulls" in cross else ""))
    if (~domain).any():
        text.add(" (others: ")
        text.cite(percent(float(more[~domain].mean())), "cross_activity", is_domain=False)
        text.add(")")
    tokens = control.features.set_index("feature")["top_tokens"]
    changed = most_changed(cross, alpha=alpha, domain_only=True).head(_N_EXAMPLES)
    for i, row in enumerate(changed[changed["feature"].isin(tokens.index)].to_dict("records")):
        size = (
            f"{fixed(row['mean_treatment'] / row['mean_control'], 1)}×" if row["mean_control"] > 0 else "silent before"
        )
        words = first_tokens(tokens[row["feature"]], longest=None)
        text.add(", most changed: " if i == 0 else " and ")
        text.cite(f"{row['feature']} ({words}; {size})", "cross_activity", feature=int(row["feature"]))
    text.add(".")


def _fate_sentence(text: Paragraph, counts: pd.DataFrame) -> None:
    if counts.empty:
        return
    measure = str(counts["measure"].iloc[0])
    rows = counts[counts["measure"] == measure]
    gone = rows[(rows["side"] == "control") & (rows["fate"] == "gone")].iloc[0]
    if math.isnan(float(gone["called"])):
        return
    called = int(rows.loc[rows["fate"].isin(["moved", "gone", "new", "absorbed"]), "called"].fillna(0).sum())
    text.add(" ")
    words = "No single feature is" if not called else "1 feature is" if called == 1 else f"{count(called)} features are"
    text.cite(words, "fate_counts", measure=measure)
    text.add(" gone, moved or new beyond SAE noise.")


def _threat_sentence(text: Paragraph, comparison: Comparison) -> None:
    flaws = list(comparison.design.loc[comparison.design["status"] == "flaw", "field"])
    if flaws:
        text.add(f" The arms also differ in {joined(flaws)}, so fine-tuning need not be the cause.")
    elif serious := int((comparison.threats["severity"] == "serious").sum()):
        text.add(" ")
        text.cite(count(serious), "threats", severity="serious")
        text.add(f" serious threat{'s' if serious > 1 else ''} to this answer {'are' if serious > 1 else 'is'} known.")
