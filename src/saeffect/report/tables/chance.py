"""What chance gives: false alarms beside findings, expected numbers, and what could have been found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.comparison.calibration import WITHIN
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView, difference_unit
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import amount, count, fixed, is_defined, percent, undefined

__all__ = ["calibration_table", "calibration_verdict", "chance_table", "power_table", "rule_label", "test_label"]

_RULES = {
    "p at most alpha": "p ≤ {alpha:g}",
    "q at most alpha": "q ≤ {alpha:g}",
    "a feature is called at q at most alpha": "any called, q ≤ {alpha:g}",
}


def test_label(test: str) -> str:
    """A test of the calibration or power table as a heading.

    Example:
        >>> test_label("domain_share"), test_label("feature in treatment")
        ('Share of domain features', 'Feature in treatment')
    """
    name = short_name(test)
    return name[:1].upper() + name[1:]


def rule_label(rule: str, alpha: float) -> str:
    """What counts as a finding, with the study's alpha in it.

    Example:
        >>> rule_label("p at most alpha", 0.05), rule_label("more than SAE noise", 0.05)
        ('p ≤ 0.05', 'more than SAE noise')
    """
    return _RULES.get(rule, rule).format(alpha=alpha)


def calibration_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """Each test where there is nothing to find, and beside it the same test on the treatment.

    Tests that the study declared come first; others that could not be tried go into the note.
    """
    table = comparison.calibration
    if table.empty:
        return None
    declared = table["declared"].astype(bool)
    shown = table[declared | (table["tests"] > 0)].sort_values("declared", ascending=False, kind="stable")
    rows = [
        Row(
            test_label(str(row["test"])),
            (
                _of(row["findings"], row["tests"], row["unit"], row),
                Cell(percent(row["nominal"], 0)),
                _verdict(row),
                _of(row["treatment_findings"], row["treatment_tests"], "", row),
            ),
            sub=rule_label(str(row["rule"]), context.alpha),
            strong=bool(row["declared"]),
        )
        for row in shown.to_dict("records")
    ]
    return TableView(
        name="calibration",
        caption="False alarms where there is nothing to find, beside the findings",
        source="comparison/calibration.parquet, one row per test and rule",
        columns=(
            Column("False alarms", "an SAE of the control's model in the treatment's place", role="placebo"),
            Column("Promised", "at most"),
            Column("Verdict", is_text=True),
            Column("Findings", "in the treatment itself", role="treatment"),
        ),
        rows=tuple(rows),
        corner="Test, and what counts as a finding",
        stacks=True,
        note="Bold: tests that the study declared beforehand. "
        + _not_tried(table[~declared & (table["tests"] == 0)], context.alpha),
    )


def _not_tried(rows: pd.DataFrame, alpha: float) -> str:
    """The exploratory tests that nothing could be tried on, by reason."""
    parts = []
    for reason, some in rows.groupby("reason", sort=False):
        names = "; ".join(
            f"{short_name(str(one.test))}, {rule_label(str(one.rule), alpha)}" for one in some.itertuples()
        )
        parts.append(f"{names} ({reason})")
    return f"Could not be tried: {'; '.join(parts)}." if parts else ""


def calibration_verdict(comparison: Comparison) -> str:
    """One or two plain sentences: may the findings be believed?"""
    table = comparison.calibration
    if table.empty:
        return (
            "How often these tests raise false alarms was not measured, so nothing here can be checked against chance."
        )
    known = table[(table["tests"] > 0) & table["rate"].notna()]
    if known.empty:
        reasons = [reason for reason in table["reason"] if reason]
        why = reasons[0] if reasons else "no SAE of the control's model can stand in for the treatment"
        return f"It cannot be said how often these tests raise false alarms: {why}."
    declared = table[table["declared"].astype(bool)]
    if len(declared) and not (declared["tests"] > 0).any():
        why = next((reason for reason in declared["reason"] if reason), "no reason was recorded")
        return f"It cannot be said how often the declared tests raise false alarms: {why}."
    bad = known[known["verdict"] != WITHIN]
    unjudged = table[table["tests"] == 0]
    if len(bad):
        names = "; ".join(dict.fromkeys(f"{short_name(str(row.test))} ({row.rule})" for row in bad.itertuples()))
        text = f"Not to be believed, since they raise more false alarms than they promise: {names}."
    else:
        text = "No test raised more false alarms than it promises."
        few = int(known.loc[known["unit"] != "features", "tests"].max()) if (known["unit"] != "features").any() else 0
        if 0 < few < 60:
            text += (
                f" Between whole SAEs there were at most {count(few)} trials a test, so this would show a test that "
                "often cries wolf, not one that does so a little too often."
            )
    if len(unjudged):
        text += f" {count(len(unjudged))} of {count(len(table))} tests could not be tried; the table says why."
    return text


def _of(findings: Any, tests: Any, unit: Any, row: Mapping[Any, Any]) -> Cell:
    if not is_defined(tests) or not tests:
        return Cell(undefined(str(row["reason"] or "it was not tested")), tone="muted", is_text=True)
    text = f"{count(findings)} of {count(tests)}"
    subs = [str(unit)] if unit else []
    rate = float(findings) / float(tests)
    if unit and is_defined(row["low"]):
        subs.append(f"{percent(rate)} [{fixed(100 * row['low'], 1)}, {fixed(100 * row['high'], 1)}]")
    elif float(tests) > 1:
        subs.append(percent(rate))
    return Cell(text, sub=" · ".join(subs))


def _verdict(row: Mapping[Any, Any]) -> Cell:
    """A promise counts as kept only where the data are enough to say so."""
    if row["verdict"] == "more alarms than nominal":
        return Cell("too many alarms", tone="warn", is_text=True)
    if row["verdict"] != WITHIN or not is_defined(row["high"]):
        return Cell("cannot be judged", tone="muted", is_text=True)
    if row["high"] <= row["nominal"]:
        return Cell("keeps its promise", tone="good", is_text=True)
    return Cell("no excess seen", sub="too few trials to be sure", is_text=True)


def chance_table(comparison: Comparison) -> TableView | None:
    """Findings beside the number that chance would give; None where there is nothing to say."""
    if comparison.by_chance.empty:
        return None
    rows = []
    for row in comparison.by_chance.to_dict("records"):
        found = Cell(count(row["found"]), sub=f"of {count(row['among'])}")
        if is_defined(row["expected"]):
            text = ("at most " if row["bound"] else "") + _number(row["expected"])
            both = is_defined(row["low"]) and is_defined(row["high"])
            sub = f"[{_number(row['low'])}, {_number(row['high'])}]" if both else str(row["reason"])
            expected = Cell(text, sub=sub)
        else:
            expected = Cell(undefined(str(row["reason"])), tone="muted", is_text=True)
        label = str(row["finding"])
        rows.append(Row(label[:1].upper() + label[1:], (found, expected, _outside(row),
                        Cell(str(row["chance"]), tone="muted", is_text=True))))  # fmt: skip
    return TableView(
        name="by_chance",
        caption="How many findings chance alone would give",
        source="comparison/by_chance.parquet, every row; its column source names the table behind each",
        columns=(
            Column("Found", "in the treatment", role="treatment"),
            Column("By chance", "95 % of the time"),
            Column("Found is", is_text=True),
            Column("What chance is here", is_text=True),
        ),
        rows=tuple(rows),
        corner="Finding",
        stacks=True,
    )


def _number(value: float) -> str:
    return count(round(value)) if abs(value) >= 10 or float(value).is_integer() else fixed(value, 1)


def _outside(row: Mapping[Any, Any]) -> Cell:
    found = row["found"]
    if not is_defined(row["expected"]):
        return Cell("not comparable", tone="muted", is_text=True)
    if row["bound"]:
        return Cell("more" if found > row["expected"] else "no more", is_text=True)
    if not (is_defined(row["low"]) and is_defined(row["high"])):
        return Cell("not comparable", tone="muted", is_text=True)
    if row["low"] <= found <= row["high"]:
        return Cell("what chance gives", is_text=True)
    return Cell("more than chance" if found > row["high"] else "less than chance", tone="good", is_text=True)


def power_table(comparison: Comparison) -> TableView | None:
    """The smallest difference that each test would probably have found, beside what was seen."""
    table = comparison.power
    if table.empty:
        return None
    rows = []
    for row in table.to_dict("records"):
        unit = difference_unit(str(row["unit"]))
        single = str(row["test"]).startswith(("feature in", "only feature"))
        units = count(row["n_a"]) if row["n_a"] == row["n_b"] else f"{count(row['n_a'])} and {count(row['n_b'])}"
        noun = "SAEs a side" if str(row["test"]).endswith("_seeds") else "features a side"
        noun = "prompts or pairs" if single else noun
        if is_defined(row["detectable"]):
            smallest = Cell(amount(row["detectable"], unit), sub=_downwards(row, unit))
        else:
            smallest = Cell(undefined(str(row["reason"])), tone="muted", is_text=True)
        seen = (
            Cell(amount(row["observed"], unit, sign=True), sub="median effect" if single else "")
            if is_defined(row["observed"])
            else Cell("–", tone="muted")
        )
        rows.append(Row(test_label(str(row["test"])), (smallest, seen, Cell(units, sub=noun), _reach(row))))
    power = float(table["power"].iloc[0])
    return TableView(
        name="power",
        caption="What this study could have found",
        source="comparison/power.parquet, every row: detectable, observed, n_a, n_b, alpha, power",
        columns=(
            Column("Smallest difference", f"found {percent(power, 0)} of the time"),
            Column("Seen"),
            Column("Sample"),
            Column("Reading", is_text=True),
        ),
        rows=tuple(rows),
        corner="Test",
        stacks=True,
        note=_power_note([str(test) for test in table["test"]]),
    )


def _power_note(tests: Sequence[str]) -> str:
    """What the names of the tests mean that do not speak for themselves."""
    parts = []
    if any(test.endswith("_seeds") for test in tests):
        parts.append("SAEs as units: each SAE counts once, so that the noise of SAE training is in the sample.")
    if any(test.startswith("feature in") for test in tests):
        parts.append("Feature in an arm: one steered feature tested alone, at its own p.")
    if any(test.startswith("only feature") for test in tests):
        parts.append(
            "Only feature of several: as if it were the single one that works: its p must hold against them all."
        )
    return " ".join(parts)


def _downwards(row: Mapping[Any, Any], unit: str) -> str:
    below = row["detectable_below"]
    if not is_defined(below) or abs(float(below) - float(row["detectable"])) < 1e-9:
        return ""
    return f"{amount(below, unit)} downwards"


def _reach(row: Mapping[Any, Any]) -> Cell:
    if not is_defined(row["detectable"]) or not is_defined(row["observed"]):
        return Cell("cannot be said", tone="muted", is_text=True)
    limit = (
        row["detectable_below"] if row["observed"] < 0 and is_defined(row["detectable_below"]) else row["detectable"]
    )
    if abs(row["observed"]) < limit:
        return Cell("too small to be found reliably", is_text=True)
    return Cell("large enough to be found", is_text=True)
