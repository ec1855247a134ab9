"""The paper's two tables with intervals and the placebo beside them, the result at a glance, and all contrasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saeffect.comparison import PRIMARY, Comparison, Gap, Judgement, judge
from saeffect.comparison.judgement import told_row
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView, arm_columns, difference_unit, value_cell
from saeffect.report.words.names import outcome_words
from saeffect.report.words.numbers import amount, amount_interval, count, is_defined, p_value, percent, undefined

__all__ = ["at_a_glance", "contrast_table", "paper_table_1", "paper_table_2"]


@dataclass(frozen=True)
class _Line:
    """A row of an arm table: label, the column it reads, unit, and columns of its interval if it has one."""

    label: str
    column: str
    unit: str = ""
    interval: tuple[str, str] | None = None
    of: str = ""
    strong: bool = False
    sub: str = ""


def paper_table_1(comparison: Comparison, context: ReportContext) -> TableView:
    """The paper's Table 1: domain features, passing, similarities; one column an arm."""
    least = context.min_matches
    lines = [
        _Line("Features in the SAE", "n_features", "count"),
        _Line(
            f"with {least}+ {context.domain} top tokens, dot product",
            "matches_dot",
            "count",
            of="n_features",
            sub="the paper's scale",
        ),
        _Line(f"with {least}+ {context.domain} top tokens, cosine", "matches_cosine", "count", of="n_features"),
    ]
    if (comparison.table1["in_vocabulary"] != comparison.table1["domain_features"]).any():
        lines.append(
            _Line("Selected by the vocabulary", "in_vocabulary", "count", of="n_features", sub="before verdicts")
        )
    lines += [
        _Line("Domain features", "domain_features", "count", of="n_features", strong=True),
        _Line("Tested by steering", "tested", "count"),
        _Line(
            "Passing against placebo",
            "pass_rate",
            "share",
            ("pass_low", "pass_high"),
            of="passed/tested",
            strong=True,
        ),
        _Line("Passing by the paper's rule", "paper_rate", "share", of="paper_passed/tested"),
        _Line("Similarity when steered", "steered_mean", "", ("steered_low", "steered_high")),
        _Line("Similarity when unsteered", "unsteered_mean", "", ("unsteered_low", "unsteered_high")),
        _Line("Similarity under the placebo", "placebo_mean", "", ("placebo_low", "placebo_high")),
        _Line(
            f"Effect{_of_outcome(context)}: steered − placebo",
            "effect_mean",
            "",
            ("effect_low", "effect_high"),
            strong=True,
        ),
    ]
    return TableView(
        name="table1",
        paper="Table 1",
        caption="Domain features, and what steering them does",
        columns=arm_columns(comparison.table1),
        rows=_arm_rows(comparison.table1, lines),
    )


def _of_outcome(context: ReportContext) -> str:
    """Which outcome the effect is of, where it is not the similarity of the rows above."""
    deciding = context.steering.deciding if context.steering else "similarity"
    return "" if deciding == "similarity" else f" ({outcome_words(deciding).title})"


def paper_table_2(comparison: Comparison, context: ReportContext) -> TableView:
    """The paper's Table 2: coherence of the domain features; one column an arm."""
    del context
    lines = [
        _Line("Domain features with a coherence", "n_defined", "count"),
        _Line("Undefined", "n_undefined", "count", sub="left out, not counted as 0"),
        _Line("Mean coherence", "mean", "", ("mean_low", "mean_high"), strong=True),
        _Line("Median coherence", "median", "", ("median_low", "median_high")),
        _Line("Lowest", "minimum"),
        _Line("Highest", "maximum"),
        _Line("Range", "range"),
        _Line("Coverage, distinct tokens", "coverage_unique", "share"),
        _Line("Coverage, all tokens", "coverage_total", "share"),
    ]
    rows = list(_arm_rows(comparison.table2, lines))
    for quantity, label in (
        ("coherence_mean", "Mean, minus control"),
        ("coherence_median", "Median, minus control"),
        ("coherence_normalised", "Normalised difference from control"),
    ):
        rows.append(Row(label, _against_control(comparison, quantity)))
    return TableView(
        name="table2",
        paper="Table 2",
        caption="Coherence of the domain features",
        columns=arm_columns(comparison.table2),
        rows=tuple(rows),
    )


def at_a_glance(comparison: Comparison) -> TableView:
    """The headline's quantities: each arm, the change, what retraining alone gives, and the reading."""
    placebos = list(comparison.table1.loc[comparison.table1["role"] == "placebo", "arm"])
    columns = [
        *(column for column in arm_columns(comparison.table1) if column.role in ("control", "treatment")),
        Column("Fine-tuning", "treatment − control"),
    ]
    columns += [Column("SAE noise", f"{name} − control", role="placebo") for name in placebos]
    seen = set(comparison.contrasts["quantity"])
    readings = {name: judge(comparison.contrasts, name) for name in (*PRIMARY, "effect") if name in seen}
    labels = dict(zip(comparison.contrasts["quantity"], comparison.contrasts["label"], strict=True))
    columns.append(Column("False alarms", "where there is nothing to find"))
    columns.append(Column("Reading", is_text=True))
    rows = []
    for quantity, judged in readings.items():
        one = told_row(comparison.contrasts, judged)
        unit, label = str(one["unit"]), labels[quantity]
        counts = f"over {judged.n_saes[0]} and {judged.n_saes[1]} SAEs"
        sub = counts if judged.by_seeds else _with_noise(judged)
        cells = [value_cell(one[side], unit, reason=str(one["reason"])) for side in ("value_a", "value_b")]
        cells.append(_gap_cell(judged.told))
        cells += [_gap_cell(gap) for gap in judged.retraining]
        cells.append(_alarms_cell(comparison.calibration, quantity))
        cells.append(_reading(judged))
        rows.append(Row(label, tuple(cells), sub=sub, strong=quantity in PRIMARY, key=quantity))
    return TableView(
        name="glance",
        caption="The result at a glance",
        columns=tuple(columns),
        rows=tuple(rows),
        corner="Quantity",
        stacks=True,
        source=(
            "comparison/contrasts.parquet, columns value_a, value_b, estimate, low, high, p_noise_holm; "
            "comparison/calibration.parquet, columns findings, tests, nominal"
        ),
        note="" if placebos else "There is no placebo arm, so nothing here separates fine-tuning from SAE noise.",
    )


def contrast_table(comparison: Comparison) -> TableView:
    """Every contrast, fine-tuning beside SAE noise, with intervals, p and method."""
    table = comparison.contrasts
    pairs = table[["comparison", "a", "b"]].drop_duplicates()
    pairs = pairs.sort_values("comparison", key=lambda column: column.map(_COMPARISON_RANKS), kind="stable")
    columns = tuple(
        Column(_COMPARISON_NAMES.get(str(pair.comparison), str(pair.comparison)), f"{pair.b} − {pair.a}")
        for pair in pairs.itertuples()
    )
    found = {(row["quantity"], row["comparison"], row["a"], row["b"]): row for row in table.to_dict("records")}
    rows = []
    for quantity in dict.fromkeys(table["quantity"]):
        mine = [found.get((quantity, pair.comparison, pair.a, pair.b)) for pair in pairs.itertuples()]
        first = next(row for row in mine if row is not None)
        cells = (
            *(Cell("–", tone="muted") if row is None else _contrast_cell(row) for row in mine),
            Cell(str(first["method"]), tone="muted", is_text=True),
        )
        rows.append(Row(str(first["label"]), cells, strong=quantity in PRIMARY, key=str(quantity)))
    return TableView(
        name="contrasts",
        caption="Every contrast between the arms",
        columns=(*columns, Column("Method", is_text=True)),
        rows=tuple(rows),
        corner="Quantity",
        stacks=True,
        note=(
            "Bold: the quantities of the headline, fixed in advance. All others are exploratory: about one interval "
            "in twenty misses zero by chance."
        ),
    )


_COMPARISON_NAMES = {
    "fine-tuning": "Fine-tuning",
    "retraining": "SAE noise",
    "beyond retraining": "Beyond SAE noise",
}
_COMPARISON_RANKS = {name: rank for rank, name in enumerate(_COMPARISON_NAMES)}


def _contrast_cell(row: Mapping[Any, Any]) -> Cell:
    unit = difference_unit(str(row["unit"]))
    reason = str(row["reason"])
    if not is_defined(row["estimate"]):
        return Cell(undefined(reason), tone="muted", is_text=True)
    both = is_defined(row["low"]) and is_defined(row["high"])
    ends = amount_interval(row["low"], row["high"], unit) if both else f"interval {undefined(reason)}"
    p = p_value(row["p"]) if is_defined(row["p"]) else ""
    p = f" ·\u00a0p\u00a0{p}" if p.startswith("<") else f" ·\u00a0p\u00a0=\u00a0{p}" if p else ""
    return Cell(amount(row["estimate"], unit, sign=unit != "ratio"), sub=ends + p)


def _arm_rows(table: pd.DataFrame, lines: Sequence[_Line]) -> tuple[Row, ...]:
    records = table.to_dict("records")
    return tuple(
        Row(line.label, tuple(_arm_cell(row, line) for row in records), sub=line.sub, strong=line.strong)
        for line in lines
        if line.column in table.columns
    )


def _arm_cell(row: Mapping[Any, Any], line: _Line) -> Cell:
    reason = _why_undefined(row)
    cell = value_cell(row[line.column], line.unit, reason=reason)
    if not is_defined(row[line.column]):
        return cell
    subs = []
    if line.of == "n_features" and row["n_features"]:
        subs.append(percent(row[line.column] / row["n_features"]))
    elif "/" in line.of:
        passed, tested = line.of.split("/")
        subs.append(f"{count(row[passed])} of {count(row[tested])}")
    if line.interval:
        low, high = (row[name] for name in line.interval)
        both = is_defined(low) and is_defined(high)
        subs.append(amount_interval(low, high, line.unit) if both else f"interval {undefined(reason)}")
    return Cell(cell.text, sub=" · ".join(subs))


def _why_undefined(row: Mapping[Any, Any]) -> str:
    """Why a number of the paper's tables is missing; the tables leave it to their counts to tell."""
    if row.get("reason"):
        return str(row["reason"])
    if "tested" in row:
        return "no feature was tested" if not row["tested"] else "fewer than two features were tested"
    if not row.get("n_defined", 1):
        return "no domain feature has a coherence" if row.get("n_undefined") else "no domain feature"
    return "fewer than two features" if row.get("n_defined", 2) < 2 else "not measured"


def _against_control(comparison: Comparison, quantity: str) -> tuple[Cell, ...]:
    rows = comparison.contrasts[
        (comparison.contrasts["quantity"] == quantity)
        & comparison.contrasts["comparison"].isin(["fine-tuning", "retraining"])
    ].set_index("b")
    cells = []
    for name, role in zip(comparison.table2["arm"], comparison.table2["role"], strict=True):
        if role == "control" or name not in rows.index:
            cells.append(Cell("–", tone="muted"))
            continue
        row = rows.loc[name]
        sub = amount_interval(row["low"], row["high"]) if is_defined(row["low"]) and is_defined(row["high"]) else ""
        cells.append(value_cell(row["estimate"], sub=sub, reason=str(row["reason"]), sign=True))
    return tuple(cells)


def _gap_cell(gap: Gap) -> Cell:
    unit = difference_unit(gap.unit)
    if not is_defined(gap.estimate):
        return Cell(undefined(gap.reason), tone="muted", is_text=True)
    ends = amount_interval(gap.low, gap.high, unit) if gap.defined else f"interval {undefined(gap.reason)}"
    return Cell(amount(gap.estimate, unit, sign=True), sub=ends)


def _with_noise(judged: Judgement) -> str:
    """Where the treatment has one SAE alone: how far the change reaches with the noise of SAE training."""
    if judged.seeds is None:
        return ""
    return f"with SAE noise {amount_interval(judged.seeds.low, judged.seeds.high, difference_unit(judged.seeds.unit))}"


def _alarms_cell(calibration: pd.DataFrame, quantity: str) -> Cell:
    """How often this test finds something in a stand-in: the rule of the headline where it could be tried."""
    rows = (
        calibration[(calibration["test"] == quantity) & (calibration["tests"] > 0)] if len(calibration) else calibration
    )
    if rows.empty:
        return Cell("not known", tone="muted")
    row = rows.iloc[-1]  # "more than SAE noise" comes after "the interval excludes zero"
    return Cell(f"{count(row['findings'])} of {count(row['tests'])}", sub=f"promised: {percent(row['nominal'], 0)}")


_READINGS = {
    "beyond": ("More than SAE noise", "good"),
    "noise": ("Not clearly more than SAE noise", ""),
    "unclear": ("Cannot tell: the interval includes zero", ""),
    "unseparated": ("Cannot be told from SAE noise", ""),
}


def _reading(judged: Judgement) -> Cell:
    if judged.status == "undefined":
        return Cell(undefined(judged.change.reason), tone="muted", is_text=True)
    text, tone = _READINGS[judged.status]
    return Cell(text, tone=tone, is_text=True)
