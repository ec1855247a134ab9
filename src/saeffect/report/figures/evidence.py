"""How reliable the findings are: false alarms, SAE noise, and properties that go with a strong effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from saeffect.comparison import PRIMARY, Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    DASHED,
    INK,
    MUTED,
    ROLE_STYLES,
    ArmStyle,
    Drawing,
    arm_styles,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.tables.evidence import TERM_NAMES, rule_label, test_label
from saeffect.report.tables.view import difference_unit
from saeffect.report.words.numbers import amount, count, has_interval, interval, percent, signed

__all__ = ["calibration", "contrasts", "partial_residuals"]

_DRAWN_QUANTITIES = (*PRIMARY, "effect", "direct_effect", "weight_mean", "mean_activation", "density")


def calibration(comparison: Comparison, context: ReportContext) -> Drawing:
    """One line per test and rule: false-alarm rate with its interval, the nominal rate, and the rate of findings."""
    table = comparison.calibration
    rows = table[(table["tests"] > 0) & table["rate"].notna()] if len(table) else table
    if rows.empty:
        reason = next((f": {reason}" for reason in table["reason"] if reason), "") if len(table) else ""
        raise Undefined(f"no test could be tried where there is nothing to find{reason}.")
    figure = new_figure(0.75 + 0.47 * len(rows))
    ax = figure.add_subplot()
    alarms = []
    for y, row in zip(reversed(range(len(rows))), rows.to_dict("records"), strict=True):
        _draw_alarm_rate(ax, y, row, context.alpha)
        alarms.append(f"{test_label(row['test'])}, {row['rule']}: {count(row['findings'])} of {count(row['tests'])}")
    ax.set(xlim=(-2, 102), ylim=(-0.55, len(rows) - 0.3), yticks=[])
    ax.set_xticks(np.arange(0, 101, 20))
    ax.xaxis.set_major_formatter(lambda value, _: percent(value / 100, 0))
    ax.set_xlabel("share of tests that find something", color=MUTED)
    clean_axes(ax, grid="x")
    return Drawing(
        figure,
        "Grey: how often each test finds something when an SAE of the control's own model stands in for the "
        "treatment, with the 95 % interval. The upright stroke is what the test promises not to exceed: a grey "
        "interval wholly to its right would be a test that cannot be believed. Square: how often it found "
        "something in the treatment. Wide intervals mean few SAEs to try it on.",
        f"Rates of false alarms: {'; '.join(alarms)}.",
    )


def _draw_alarm_rate(ax: Axes, y: float, row: Mapping[Any, Any], alpha: float) -> None:
    null, treatment = ROLE_STYLES["placebo"], ROLE_STYLES["treatment"]
    low, high, rate, nominal = (100 * float(row[name]) for name in ("low", "high", "rate", "nominal"))
    ax.plot([low, high], [y, y], color=null.colour, linewidth=2.4, solid_capstyle="butt", alpha=0.75)
    ax.plot([rate], [y], null.marker, color=null.colour, markersize=5)
    ax.plot([nominal, nominal], [y - 0.16, y + 0.16], color=INK, linewidth=1.4)
    if float(row["treatment_tests"]):
        share = 100 * float(row["treatment_findings"]) / float(row["treatment_tests"])
        ax.plot([share], [y - 0.27], treatment.marker, color=treatment.colour, markersize=4.5, clip_on=False)
    label = f"{test_label(str(row['test']))}: {rule_label(str(row['rule']), alpha)}"
    ax.text(0, y + 0.22, safe_text(label, 66), size=7.8, color=INK, va="bottom")


def contrasts(comparison: Comparison, _context: ReportContext) -> Drawing:
    """One row per quantity, each on its own scale: change by fine-tuning above change by retraining alone."""
    table = comparison.contrasts
    rows = table[table["comparison"].isin(["fine-tuning", "retraining"]) & table["estimate"].notna()]
    rows = rows[rows["quantity"].isin(_DRAWN_QUANTITIES)]
    quantities = [name for name in _DRAWN_QUANTITIES if (rows["quantity"] == name).any()]
    if not quantities:
        raise Undefined("no difference between the arms is defined.")
    n_lines = 1 + int(table.loc[table["comparison"] == "retraining", "b"].nunique())
    figure = new_figure(0.45 + (0.68 + 0.16 * n_lines) * len(quantities))
    for ax, quantity in zip(figure.subplots(len(quantities), 1, squeeze=False)[:, 0], quantities, strict=True):
        _draw_differences(ax, rows[rows["quantity"] == quantity], arm_styles(comparison), n_lines)
    differences = [
        f"{row.label}, {row.b}: {amount(row.estimate, difference_unit(str(row.unit)), sign=True)}"
        for row in rows.itertuples()
    ]
    return Drawing(
        figure,
        "Each arm minus control, with 95 % intervals, every quantity on its own scale. The placebo is the same "
        "model with an SAE trained from another seed, so what differs there is SAE noise. Fine-tuning gets the "
        "credit only where the treatment's interval excludes zero and treatment − placebo does so too. "
        "An asterisk marks the quantities of the headline, fixed in advance.",
        f"Differences from control: {'; '.join(differences)}.",
    )


def _draw_differences(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, ArmStyle], n_lines: int) -> None:
    first = rows.iloc[0]
    unit = str(first["unit"])
    ends = rows[["low", "high", "estimate"]].to_numpy(dtype=float)
    reach = 1.08 * max(float(np.nanmax(np.abs(ends))), 1e-12)
    ax.axvline(0, **DASHED)
    for line, row in enumerate(rows.itertuples()):
        style, y = styles[str(row.b)], n_lines - 1 - line
        if np.isfinite(row.low) and np.isfinite(row.high):
            ax.plot([row.low, row.high], [y, y], color=style.colour, linewidth=2.2, solid_capstyle="butt")
        ax.plot([row.estimate], [y], style.marker, color=style.colour, markersize=6)
        ax.text(1.01, y, safe_text(row.b, 16), transform=ax.get_yaxis_transform(), color=style.colour, va="center",
                size=8)  # fmt: skip
    names = {"share": "percentage points", "share of tokens": "percentage points of tokens", "coherence": ""}
    noun = names.get(unit, unit)
    label = str(first["label"]) + (" *" if first["quantity"] in PRIMARY else "")
    ax.set_title(label, loc="left", size=8.8, pad=14 if noun else 5)
    if noun:
        ax.text(0, 1.03, noun, transform=ax.transAxes, size=7.8, color=MUTED, va="bottom")
    ax.set(xlim=(-reach, reach), ylim=(-0.6, n_lines - 0.4), yticks=[])
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    factor = 100.0 if unit in {"share", "share of tokens"} else 1.0
    ax.xaxis.set_major_formatter(lambda value, _: f"{factor * value:.3g}".replace("-", "−"))
    ax.tick_params(labelsize=8)
    clean_axes(ax, grid="x")


def partial_residuals(comparison: Comparison, _context: ReportContext) -> Drawing:
    """One panel per property; dots are features, the line has the regression's slope."""
    table, terms = comparison.partial_residuals, comparison.regression
    if table.empty:
        reason = next((reason for reason in terms["reason"] if reason), "") if len(terms) else ""
        raise Undefined(f"there is no regression to draw: {reason or 'no feature was steered'}.")
    names = list(dict.fromkeys(table["term"]))
    figure = new_figure(0.6 + 2.3 * len(names))
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    slopes = []
    for ax, name in zip(panels, names, strict=True):
        term = terms.set_index("term").loc[name]
        label = TERM_NAMES[name][0]
        ends = f" {interval(term['low'], term['high'])}" if has_interval(term) else ", no interval"
        slope = signed(term["estimate"]) + ends
        _draw_residuals(ax, table[table["term"] == name], arm_styles(comparison), float(term["estimate"]))
        ax.set_title(f"{label}: {slope}", size=8.8)
        slopes.append(f"{label} {slope}")
        if name == "log10_density":
            ax.xaxis.set_major_formatter(lambda value, _: f"{100 * 10**value:.2g} %")
            ax.set_xlabel("share of tokens on which it fires (logarithmic)")
        else:
            ax.set_xlabel(label.lower())
    panels[0].legend(loc="upper left", ncols=3, handletextpad=0.2, columnspacing=1.0, bbox_to_anchor=(-0.02, 1.0))
    figure.supylabel("effect left unexplained by the other terms", size=9, color=INK)
    return Drawing(
        figure,
        "Partial residuals: each steered feature's effect after what all other terms explain is taken away. "
        "The line has the slope of the regression ([[table:regression]]); a cloud without direction means that the "
        "property tells nothing about the effect.",
        f"Slopes: {'; '.join(slopes)}.",
    )


def _draw_residuals(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, ArmStyle], slope: float) -> None:
    for arm, style in styles.items():
        arm_rows = rows[rows["arm"] == arm]
        if len(arm_rows):
            ax.plot(arm_rows["x"], arm_rows["residual"], style.marker, color=style.colour, markersize=4, alpha=0.75,
                    label=safe_text(arm, 16), linestyle="none")  # fmt: skip
    ends = np.array([rows["x"].min(), rows["x"].max()], dtype=float)
    ax.plot(ends, slope * ends, color=INK, linewidth=1.5)
    low, high = float(rows["residual"].min()), float(rows["residual"].max())
    ax.set_ylim(low - 0.05 * (high - low), high + 0.22 * max(high - low, 1e-9))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    clean_axes(ax, grid="y")
