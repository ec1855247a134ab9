"""Chance findings, power, properties that go with a strong effect, and threats to the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeffect.comparison import Comparison
from saeffect.comparison.calibration import WITHIN
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView, difference_unit
from saeffect.report.words.names import capital, short_name
from saeffect.report.words.numbers import (
    amount,
    count,
    fixed,
    has_interval,
    interval,
    is_defined,
    p_value,
    percent,
    signed,
)
from saeffect.steering.outcomes import OUTCOMES

__all__ = [
    "TERM_NAMES",
    "calibration_table",
    "chance_table",
    "power_table",
    "regression_table",
    "rule_label",
    "test_label",
    "threat_table",
]


def test_label(test: str) -> str:
    """Heading of a test of the calibration or power table.

    Example:
        >>> test_label("domain_share"), test_label("feature in treatment")
        ('Share of domain features', 'Feature in treatment')
    """
    return capital(short_name(test))


def rule_label(rule: str, alpha: float) -> str:
    """The rule that makes a finding, with the study's alpha.

    Example:
        >>> rule_label("p at most alpha", 0.05), rule_label("more than SAE noise", 0.05)
        ('p ≤ 0.05', 'more than SAE noise')
    """
    rule = "any called, q at most alpha" if rule == "a feature is called at q at most alpha" else rule
    return rule.replace("at most alpha", f"≤ {alpha:g}")


def calibration_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """Each test on pairs of SAEs without a difference, beside the same test on the treatment.

    Declared tests come first; the note lists undeclared ones without such a pair.
    """
    table = comparison.calibration
    if table.empty:
        return None
    declared = table["declared"].astype(bool)
    shown = table[declared | (table["tests"] > 0)].sort_values("declared", ascending=False, kind="stable")
    rows = [
        Row(
            test_label(str(row["test"])),
            (_alarms_cell(row), Cell(percent(row["nominal"], 0)), _verdict_cell(row), _findings_cell(row)),
            sub=rule_label(str(row["rule"]), context.alpha),
            strong=bool(row["declared"]),
        )
        for row in shown.to_dict("records")
    ]
    untried = []
    for reason, group in table[~declared & (table["tests"] == 0)].groupby("reason", sort=False):
        tests = zip(group["test"], group["rule"], strict=True)
        names = "; ".join(f"{short_name(test)}, {rule_label(rule, context.alpha)}" for test, rule in tests)
        untried.append(f"{names} ({reason})")
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
        note="Bold: tests that the study declared beforehand. "
        + (f"Could not be tried: {'; '.join(untried)}." if untried else ""),
        terms=("calibration", "false_alarm", "nominal", "stand_in", "wilson"),
    )


def _alarms_cell(row: Mapping[Any, Any]) -> Cell:
    if not row["tests"]:
        return Cell.undefined(row["reason"] or "it was not tested")
    sub = str(row["unit"])
    if is_defined(row["low"]):
        sub += f" · {percent(row['findings'] / row['tests'])} {interval(100 * row['low'], 100 * row['high'], 1)}"
    elif row["tests"] > 1:
        sub += f" · {percent(row['findings'] / row['tests'])}"
    return Cell(f"{count(row['findings'])} of {count(row['tests'])}", sub=sub)


def _findings_cell(row: Mapping[Any, Any]) -> Cell:
    findings, tests = row["treatment_findings"], row["treatment_tests"]
    if not is_defined(tests) or not tests:
        return Cell.undefined(row["reason"] or "it was not tested")
    return Cell(f"{count(findings)} of {count(tests)}", sub=percent(findings / tests) if tests > 1 else "")


def _verdict_cell(row: Mapping[Any, Any]) -> Cell:
    """Confirmed only if the interval's upper end is within the nominal rate."""
    if row["verdict"] == "more alarms than nominal":
        return Cell.words("too many alarms", tone="warn")
    if row["verdict"] != WITHIN or not is_defined(row["high"]):
        return Cell.words("cannot be judged", tone="muted")
    if row["high"] <= row["nominal"]:
        return Cell.words("keeps its promise", tone="good")
    return Cell.words("no excess seen", sub="too few trials to be sure")


def chance_table(comparison: Comparison, _context: ReportContext) -> TableView | None:
    """Findings beside the number expected by chance; None without any."""
    if comparison.by_chance.empty:
        return None
    rows = []
    for row in comparison.by_chance.to_dict("records"):
        defined = has_interval(row)
        expected = Cell.undefined(row["reason"])
        if is_defined(row["expected"]):
            sub = f"[{_expected_text(row['low'])}, {_expected_text(row['high'])}]" if defined else str(row["reason"])
            expected = Cell(("at most " if row["bound"] else "") + _expected_text(row["expected"]), sub=sub)
        cells = (
            Cell(count(row["found"]), sub=f"of {count(row['among'])}"),
            expected,
            _chance_verdict_cell(row, defined),
            Cell.words(row["chance"], tone="muted"),
        )
        rows.append(Row(capital(str(row["finding"])), cells))
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
        terms=("prediction", "paper_rule", "q"),
    )


def _expected_text(value: float) -> str:
    return count(round(value)) if abs(value) >= 10 or float(value).is_integer() else fixed(value, 1)


def _chance_verdict_cell(row: Mapping[Any, Any], defined: bool) -> Cell:
    n_found = row["found"]
    if is_defined(row["expected"]) and row["bound"]:
        return Cell.words("more" if n_found > row["expected"] else "no more")
    if not is_defined(row["expected"]) or not defined:
        return Cell.words("not comparable", tone="muted")
    if row["low"] <= n_found <= row["high"]:
        return Cell.words("what chance gives")
    return Cell.words("more than chance" if n_found > row["high"] else "less than chance", tone="good")


def power_table(comparison: Comparison, _context: ReportContext) -> TableView | None:
    """The smallest difference that each test detects with the table's power, beside the observed one."""
    table = comparison.power
    if table.empty:
        return None
    return TableView(
        name="power",
        caption="What this study could have found",
        source="comparison/power.parquet, every row: detectable, observed, n_a, n_b, alpha, power",
        columns=(
            Column("Smallest difference", f"found {percent(table['power'].iloc[0], 0)} of the time"),
            Column("Seen"),
            Column("Sample"),
            Column("Reading", is_text=True),
        ),
        rows=tuple(_power_row(row) for row in table.to_dict("records")),
        corner="Test",
        note=" ".join(note for kind, note in _POWER_NOTES.items() if table["test"].str.contains(kind).any()),
        terms=("power",),
    )


# Explanations of test names, by a pattern of the name.
_POWER_NOTES = {
    "_seeds$": "SAEs as units: each SAE counts once, so that the noise of SAE training is in the sample.",
    "^feature in": "Feature in an arm: one steered feature tested alone, at its own p.",
    "^only feature": (
        "Only feature of several: as if it were the single one that works: its p must hold against them all."
    ),
}


def _power_row(row: Mapping[Any, Any]) -> Row:
    test, unit = str(row["test"]), difference_unit(str(row["unit"]))
    detectable, below, observed = row["detectable"], row["detectable_below"], row["observed"]
    is_feature = test.startswith(("feature in", "only feature"))
    sample = count(row["n_a"]) if row["n_a"] == row["n_b"] else f"{count(row['n_a'])} and {count(row['n_b'])}"
    units = "prompts or pairs" if is_feature else "SAEs a side" if test.endswith("_seeds") else "features a side"
    differs = is_defined(below) and is_defined(detectable) and abs(below - detectable) >= 1e-9
    reading = Cell.words("cannot be said", tone="muted")
    if is_defined(detectable) and is_defined(observed):
        limit = below if observed < 0 and is_defined(below) else detectable
        reading = Cell.words("too small to be found reliably" if abs(observed) < limit else "large enough to be found")
    observed_cell = Cell.dash()
    if is_defined(observed):
        observed_cell = Cell.value(observed, unit, sub="median effect" if is_feature else "", sign=True)
    cells = (
        Cell.value(detectable, unit, sub=f"{amount(below, unit)} downwards" if differs else "", reason=row["reason"]),
        observed_cell,
        Cell(sample, sub=units),
        reading,
    )
    return Row(test_label(test), cells)


TERM_NAMES = {
    "intercept": ("Intercept", ""),
    "coherence": ("Coherence", "from 0 to 1"),
    "log10_density": ("Density", "fires ten times as often"),
    "decoder_norm": ("Decoder norm", "per unit of length"),
}
"""Terms of the regression apart from arms: name and unit."""


def regression_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """Coefficient of each property in the regression of the effect of steering."""
    table = comparison.regression
    if table.empty:
        return None
    outcome = OUTCOMES[context.steering.deciding if context.steering else "similarity"]
    first = table.iloc[0]
    clustered = str(first["errors"]).startswith("clustered")
    errors = (
        "cluster-robust errors, clustered by SAE"
        if clustered
        else "HC3 errors: there are too few steered SAEs to cluster by"
    )
    left_out = int(first["n_left_out"])
    left_out_note = f" {count(left_out)} without a coherence or an activity are left out." if left_out else ""
    return TableView(
        name="regression",
        caption="What goes with a strong effect of steering",
        source="comparison/regression.parquet, every row: term, estimate, low, high, p, n, errors",
        columns=(Column("Adds to the effect", f"{outcome.label}, {outcome.effect_unit}; 95 % interval"), Column("p")),
        rows=tuple(_regression_row(row) for row in table.to_dict("records")),
        corner="Property",
        stacks=False,
        note=f"Least squares over {count(first['n'])} steered features of all arms; {errors}.{left_out_note}",
        terms=("regression", *(() if clustered else ("hc3",)), "cluster_robust", "partial_residual", "p"),
    )


def _regression_row(row: Mapping[Any, Any]) -> Row:
    term = str(row["term"])
    label, sub = TERM_NAMES.get(term, (f"Arm {term.removeprefix('arm ')}", "against control"))
    reason = str(row["reason"]).replace(term, label.lower())
    cells = (Cell.undefined(reason), Cell.dash())
    if is_defined(row["estimate"]):
        defined = has_interval(row)
        excludes_zero = defined and (row["low"] > 0 or row["high"] < 0) and term != "intercept"
        interval_text = interval(row["low"], row["high"]) if defined else f"no interval: {reason}"
        estimate = Cell(signed(row["estimate"]), sub=interval_text, tone="good" if excludes_zero else "")
        cells = (estimate, Cell(p_value(row["p"]) if is_defined(row["p"]) else "–"))
    return Row(label, cells, sub=sub, strong=term == "coherence")


_SEVERITY_MEANINGS = {
    "serious": "the answer may be wrong for it",
    "moderate": "the answer is less sure than its intervals say",
    "minor": "the answer holds for less than it seems to",
}


def threat_table(comparison: Comparison, _context: ReportContext) -> TableView | None:
    """Every threat with its severity and remedy."""
    table = comparison.threats
    if table.empty:
        return None
    return TableView(
        name="threats",
        caption="Threats to validity",
        source="comparison/threats.parquet, every row; its column source names the table behind each",
        columns=(Column("What", is_text=True), Column("What to do", is_text=True)),
        rows=tuple(
            Row(
                capital(row["severity"]),
                (Cell.words(row["threat"]), Cell.words(row["remedy"], sub=f"seen in {row['source']}")),
                strong=row["severity"] == "serious",
            )
            for row in table.to_dict("records")
        ),
        corner="How serious",
        note="; ".join(f"{name}: {means}" for name, means in _SEVERITY_MEANINGS.items()) + ".",
    )
