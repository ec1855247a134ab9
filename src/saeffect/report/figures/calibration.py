"""How often each test raises a false alarm, beside what it promises and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    INK,
    MUTED,
    ArmStyle,
    DrawnFigure,
    arm_styles,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.tables.chance import rule_label, test_label
from saeffect.report.words.numbers import count, percent

__all__ = ["calibration"]

_LOOKS = arm_styles([("", "placebo"), (" ", "treatment")])


def calibration(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """One line a test and rule: rate of false alarms with its interval, the promise, and the rate of findings."""
    del styles
    table = comparison.calibration
    rows = table[(table["tests"] > 0) & table["rate"].notna()] if len(table) else table
    if rows.empty:
        reasons = [reason for reason in table["reason"] if reason] if len(table) else []
        raise Undefined(f"no test could be tried where there is nothing to find{': ' + reasons[0] if reasons else ''}.")
    figure = new_figure(0.75 + 0.47 * len(rows))
    ax = figure.add_subplot()
    for line, row in enumerate(rows.to_dict("records")):
        _line(ax, len(rows) - 1 - line, row, context.alpha)
    _finish(ax, len(rows))
    return DrawnFigure(
        name="calibration",
        title="False alarms beside findings",
        caption=(
            "Grey: how often each test finds something when an SAE of the control's own model stands in for the "
            "treatment, with the 95 % interval. The upright stroke is what the test promises not to exceed: a grey "
            "interval wholly to its right would be a test that cannot be believed. Square: how often it found "
            "something in the treatment. Wide intervals mean few SAEs to try it on."
        ),
        alt="Rates of false alarms: "
        + "; ".join(
            f"{test_label(str(row.test))}, {row.rule}: {count(row.findings)} of {count(row.tests)}"
            for row in rows.itertuples()
        )
        + ".",
        figure=figure,
        source="comparison/calibration.parquet, columns rate, low, high, nominal, treatment_findings, treatment_tests",
    )


def _line(ax: Axes, y: float, row: Mapping[Any, Any], alpha: float) -> None:
    null, treatment = _LOOKS[""], _LOOKS[" "]
    low, high, rate, nominal = (100 * float(row[name]) for name in ("low", "high", "rate", "nominal"))
    ax.plot([low, high], [y, y], color=null.colour, linewidth=2.4, solid_capstyle="butt", alpha=0.75)
    ax.plot([rate], [y], null.marker, color=null.colour, markersize=5)
    ax.plot([nominal, nominal], [y - 0.16, y + 0.16], color=INK, linewidth=1.4)
    if float(row["treatment_tests"]):
        found = 100 * float(row["treatment_findings"]) / float(row["treatment_tests"])
        ax.plot([found], [y - 0.27], treatment.marker, color=treatment.colour, markersize=4.5, clip_on=False)
    label = f"{test_label(str(row['test']))}: {rule_label(str(row['rule']), alpha)}"
    ax.text(0, y + 0.22, safe_text(label, 66), size=7.8, color=INK, va="bottom")


def _finish(ax: Axes, n: int) -> None:
    ax.set(xlim=(-2, 102), ylim=(-0.55, n - 0.3), yticks=[])
    ax.set_xticks(np.arange(0, 101, 20))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value / 100, 0)))
    ax.set_xlabel("share of tests that find something", color=MUTED)
    clean_axes(ax, grid="x")
