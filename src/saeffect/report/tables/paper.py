"""The result at a glance, the paper's two tables with intervals and placebo, and all contrasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from saeffect.comparison import PRIMARY, Comparison, Judgement
from saeffect.comparison.judgement import headline_row
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView, arm_columns, difference_unit
from saeffect.report.words.numbers import amount_interval, count, has_interval, is_defined, p_value, percent
from saeffect.stats.estimate import Estimate
from saeffect.steering.outcomes import OUTCOMES

__all__ = ["at_a_glance", "contrast_table", "paper_table_1", "paper_table_2"]


def at_a_glance(comparison: Comparison, _context: ReportContext) -> TableView:
    """The headline's quantities: each arm, the change, the change by retraining alone, and the reading."""
    arms, contrasts = comparison.table1, comparison.contrasts
    placebos = list(arms.loc[arms["role"] == "placebo", "arm"])
    rows = []
    for quantity in (*PRIMARY, "effect"):
        if not (contrasts["quantity"] == quantity).any():
            continue
        judged = comparison.judged[quantity]
        row = headline_row(contrasts, judged)
        cells = [Cell.value(row[side], judged.unit, reason=row["reason"]) for side in ("value_a", "value_b")]
        cells += [
            _difference_cell(estimate, judged.unit) for estimate in (judged.headline, *judged.retraining.values())
        ]
        cells += [
            _alarms_cell(comparison.calibration, quantity),
            _READINGS.get(judged.status) or Cell.undefined(judged.change.reason),
        ]
        label = str(contrasts.loc[contrasts["quantity"] == quantity, "label"].iloc[-1])
        rows.append(Row(label, tuple(cells), sub=_n_saes_note(judged), strong=quantity in PRIMARY, key=quantity))
    return TableView(
        name="glance",
        caption="The result at a glance",
        columns=(
            *arm_columns(arms[arms["role"] != "placebo"]),
            Column("Fine-tuning", "treatment − control"),
            *(Column("SAE noise", f"{name} − control", role="placebo") for name in placebos),
            Column("False alarms", "where there is nothing to find"),
            Column("Reading", is_text=True),
        ),
        rows=tuple(rows),
        corner="Quantity",
        source=(
            "comparison/contrasts.parquet, columns value_a, value_b, estimate, low, high, p_noise_holm; "
            "comparison/calibration.parquet, columns findings, tests, nominal"
        ),
        note="" if placebos else "There is no placebo arm, so nothing here separates fine-tuning from SAE noise.",
        terms=("feature", "top_tokens", "domain_feature", "pass", "coherence", "interval", "pp", "placebo_arm",
               "sae_noise", "false_alarm", "verdict"),
    )  # fmt: skip


def _difference_cell(estimate: Estimate, unit: str) -> Cell:
    unit = difference_unit(unit)
    return Cell.estimate(estimate.value, estimate.low, estimate.high, unit, reason=estimate.reason)


def _n_saes_note(judged: Judgement) -> str:
    """The number of deciding SAEs, else the interval with SAE noise, else ""."""
    if judged.by_seeds:
        return f"over {judged.n_saes[0]} and {judged.n_saes[1]} SAEs"
    if judged.seeds is None:
        return ""
    unit = difference_unit(judged.unit)
    return f"with SAE noise {amount_interval(judged.seeds.low, judged.seeds.high, unit)}"


def _alarms_cell(calibration: pd.DataFrame, quantity: str) -> Cell:
    """False alarms of this test between SAEs of the control's model, by the headline's rule if it has any."""
    if len(calibration):
        calibration = calibration[(calibration["test"] == quantity) & (calibration["tests"] > 0)]
    if calibration.empty:
        return Cell("not known", tone="muted")
    row = calibration.iloc[-1]  # "more than SAE noise" comes after "the interval excludes zero"
    return Cell(f"{count(row['findings'])} of {count(row['tests'])}", sub=f"promised: {percent(row['nominal'], 0)}")


_READINGS = {
    "beyond": Cell.words("More than SAE noise", tone="good"),
    "noise": Cell.words("Not clearly more than SAE noise"),
    "unclear": Cell.words("Cannot tell: the interval includes zero"),
    "unseparated": Cell.words("Cannot be told from SAE noise"),
}


class _Line(NamedTuple):
    """A table row with one cell per arm, read from `column`; `of` names its total: a column, or "counted/all"."""

    label: str
    column: str
    unit: str = ""
    interval: str = ""
    of: str = ""
    strong: bool = False
    sub: str = ""


def paper_table_1(comparison: Comparison, context: ReportContext) -> TableView:
    """The paper's Table 1: domain features, passing, similarities; one column per arm."""
    table = comparison.table1
    matching = f"with {context.min_matches}+ {context.domain} top tokens"
    outcome = context.steering.deciding if context.steering else "similarity"
    outcome_note = "" if outcome == "similarity" else f" ({OUTCOMES[outcome].label})"
    selected = _Line("Selected by the vocabulary", "in_vocabulary", "count", of="n_features", sub="before verdicts")
    lines = (
        _Line("Features in the SAE", "n_features", "count"),
        _Line(f"{matching}, dot product", "matches_dot", "count", of="n_features", sub="the paper's scale"),
        _Line(f"{matching}, cosine", "matches_cosine", "count", of="n_features"),
        *([selected] if (table["in_vocabulary"] != table["domain_features"]).any() else ()),
        _Line("Domain features", "domain_features", "count", of="n_features", strong=True),
        _Line("Tested by steering", "tested", "count"),
        _Line("Passing against placebo", "pass_rate", "share", "pass", of="passed/tested", strong=True),
        _Line("Passing by the paper's rule", "paper_rate", "share", of="paper_passed/tested"),
        _Line("Similarity when steered", "steered_mean", interval="steered"),
        _Line("Similarity when unsteered", "unsteered_mean", interval="unsteered"),
        _Line("Similarity under the placebo", "placebo_mean", interval="placebo"),
        _Line(f"Effect{outcome_note}: steered − placebo", "effect_mean", interval="effect", strong=True),
    )
    return TableView(
        name="table1",
        paper="Table 1",
        caption="Domain features, and what steering them does",
        columns=arm_columns(table),
        rows=_arm_rows(table, lines),
        stacks=False,
        source="comparison/table1.parquet, one row an arm; made from arms/*/selection.parquet and effects.parquet",
        terms=("dot_cosine", "paper_rule", "q"),
    )


def paper_table_2(comparison: Comparison, _context: ReportContext) -> TableView:
    """The paper's Table 2: coherence of the domain features; one column per arm."""
    lines = (
        _Line("Domain features with a coherence", "n_defined", "count"),
        _Line("Undefined", "n_undefined", "count", sub="left out, not counted as 0"),
        _Line("Mean coherence", "mean", interval="mean", strong=True),
        _Line("Median coherence", "median", interval="median"),
        _Line("Lowest", "minimum"),
        _Line("Highest", "maximum"),
        _Line("Range", "range"),
        _Line("Coverage, distinct tokens", "coverage_unique", "share"),
        _Line("Coverage, all tokens", "coverage_total", "share"),
    )
    differences = {
        "coherence_mean": "Mean, minus control",
        "coherence_median": "Median, minus control",
        "coherence_normalised": "Normalised difference from control",
    }
    return TableView(
        name="table2",
        paper="Table 2",
        caption="Coherence of the domain features",
        columns=arm_columns(comparison.table2),
        rows=(
            *_arm_rows(comparison.table2, lines),
            *(Row(label, _difference_cells(comparison, quantity)) for quantity, label in differences.items()),
        ),
        stacks=False,
        source="comparison/table2.parquet, one row an arm; made from arms/*/coherence.parquet",
        terms=("coherence", "normalised", "coverage"),
    )


def _arm_rows(table: pd.DataFrame, lines: tuple[_Line, ...]) -> tuple[Row, ...]:
    records = table.to_dict("records")
    return tuple(
        Row(line.label, tuple(_arm_cell(row, line) for row in records), sub=line.sub, strong=line.strong)
        for line in lines
    )


def _arm_cell(row: Mapping[Any, Any], line: _Line) -> Cell:
    value, reason = row[line.column], _undefined_reason(row)
    share_text = ""
    if "/" in line.of:
        share_text = " of ".join(count(row[name]) for name in line.of.split("/"))
    elif line.of and row[line.of]:
        share_text = percent(value / row[line.of])
    if not line.interval:
        return Cell.value(value, line.unit, reason=reason, sub=share_text)
    low, high = row[f"{line.interval}_low"], row[f"{line.interval}_high"]
    cell = Cell.estimate(value, low, high, line.unit, reason=reason, sign=False)
    return cell._replace(sub=f"{share_text} · {cell.sub}") if share_text and cell.sub else cell


def _undefined_reason(row: Mapping[Any, Any]) -> str:
    if "tested" in row:
        return row["reason"] or ("fewer than two features were tested" if row["tested"] else "no feature was tested")
    if row["n_defined"] == 0:
        return "no domain feature has a coherence" if row["n_undefined"] else "no domain feature"
    return "fewer than two features" if row["n_defined"] < 2 else "not measured"


def _difference_cells(comparison: Comparison, quantity: str) -> tuple[Cell, ...]:
    table = comparison.contrasts
    rows = table[(table["quantity"] == quantity) & table["comparison"].isin(["fine-tuning", "retraining"])]
    by_arm = {row["b"]: row for row in rows.to_dict("records")}
    cells = []
    for name in comparison.table2["arm"]:
        row = by_arm.get(name)
        if row is None:
            cells.append(Cell.dash())
            continue
        sub = amount_interval(row["low"], row["high"]) if has_interval(row) else ""
        cells.append(Cell.value(row["estimate"], sub=sub, reason=row["reason"], sign=True))
    return tuple(cells)


_COMPARISONS = {"fine-tuning": "Fine-tuning", "retraining": "SAE noise", "beyond retraining": "Beyond SAE noise"}


def contrast_table(comparison: Comparison, _context: ReportContext) -> TableView:
    """All contrasts of fine-tuning and of SAE noise, with intervals, p and method."""
    table = comparison.contrasts
    rank = {name: rank for rank, name in enumerate(_COMPARISONS)}
    pairs = table[["comparison", "a", "b"]].drop_duplicates()
    pairs = pairs.sort_values("comparison", key=lambda column: column.map(rank), kind="stable")
    keys = list(pairs.itertuples(index=False, name=None))
    rows = []
    by_quantity: dict[str, dict[Any, Mapping[Any, Any]]] = {}
    for row in table.to_dict("records"):
        by_quantity.setdefault(str(row["quantity"]), {})[row["comparison"], row["a"], row["b"]] = row
    for quantity, by_pair in by_quantity.items():
        first = next(by_pair[key] for key in keys if key in by_pair)
        cells = [_contrast_cell(by_pair[key]) if key in by_pair else Cell.dash() for key in keys]
        cells.append(Cell.words(first["method"], tone="muted"))
        rows.append(Row(str(first["label"]), tuple(cells), strong=quantity in PRIMARY, key=quantity))
    return TableView(
        name="contrasts",
        caption="Every contrast between the arms",
        columns=(
            *(Column(_COMPARISONS.get(name, name), f"{b} − {a}") for name, a, b in keys),
            Column("Method", is_text=True),
        ),
        rows=tuple(rows),
        corner="Quantity",
        source="comparison/contrasts.parquet, one row per quantity and pair of arms",
        note=(
            "Bold: the quantities of the headline, fixed in advance. All others are exploratory: about one interval "
            "in twenty misses zero by chance."
        ),
        terms=("p", "newcombe", "fisher", "bootstrap", "hierarchical", "permutation", "did", "cliffs_delta",
               "activation", "density", "direct_effect"),
    )  # fmt: skip


def _contrast_cell(row: Mapping[Any, Any]) -> Cell:
    unit = difference_unit(str(row["unit"]))
    sign = unit != "ratio"
    cell = Cell.estimate(row["estimate"], row["low"], row["high"], unit, reason=row["reason"], sign=sign)
    if not cell.sub or not is_defined(row["p"]):
        return cell
    p = p_value(row["p"])
    p = p if p.startswith("<") else f"=\u00a0{p}"
    return cell._replace(sub=f"{cell.sub} ·\u00a0p\u00a0{p}")
