"""Figure 3: what steering each feature did, beyond what a placebo direction did."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    INK,
    MUTED,
    ArmStyle,
    DrawnFigure,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.numerals import count, fixed

__all__ = ["effects"]


def effects(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Every tested feature's effect with its interval, sorted, one panel an arm on a common scale."""
    del comparison
    tables = {name: _tested(context.arms[name].effects) for name in styles if name in context.arms}
    shown = {name: table for name, table in tables.items() if len(table)}
    if not shown:
        raise Undefined("no feature was tested by steering.")
    figure = new_figure(0.5 + 1.55 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=False, sharey=True, squeeze=False)[:, 0]
    for ax, (name, table) in zip(panels, shown.items(), strict=True):
        _panel(ax, table, styles[name])
    panels[-1].set_xlabel("tested features, sorted by effect")
    figure.supylabel("effect: steered − placebo (cosine similarity)", size=9, color=INK)
    return DrawnFigure(
        name="figure_3_effects",
        number="Figure 3",
        title="What steering each feature did, beyond its placebo",
        caption=(
            "Each mark is a tested feature: how much closer its steered texts came to its top tokens than texts "
            "steered as hard along a placebo (a feature of another subject, or a random direction), with the 95 % "
            "interval. Filled: passed "
            f"(q ≤ {context.alpha:g}). Hollow: not. On the dashed line steering does no more than the placebo."
        ),
        alt="Effects of steering by arm: "
        + "; ".join(
            f"{name} {count(int(table['passed'].sum()))} of {count(len(table))} pass, "
            f"mean effect {fixed(table['effect'].mean())}"
            for name, table in shown.items()
        )
        + ".",
        figure=figure,
    )


def _tested(table: pd.DataFrame | None) -> pd.DataFrame:
    if table is None or table.empty:
        return pd.DataFrame(columns=["feature", "effect", "effect_low", "effect_high", "passed"])
    rows = table[pd.to_numeric(table["effect"], errors="coerce").notna()].copy()
    rows["passed"] = [value is True or value == True for value in rows["passed"]]  # noqa: E712 - may hold NA
    return rows.sort_values(["effect", "feature"], ascending=[False, True]).reset_index(drop=True)


def _panel(ax: Axes, table: pd.DataFrame, style: ArmStyle) -> None:
    x = np.arange(1, len(table) + 1)
    effect = table["effect"].to_numpy(dtype=float)
    passed = table["passed"].to_numpy(dtype=bool)
    width, size = (1.3, 4.5) if len(table) <= 60 else (0.7, 2.6)
    ax.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.vlines(x, table["effect_low"], table["effect_high"], color=style.colour, linewidth=width, alpha=0.55)
    ax.plot(x[passed], effect[passed], style.marker, color=style.colour, markersize=size)
    ax.plot(
        x[~passed],
        effect[~passed],
        style.marker,
        color="#ffffff",
        markeredgecolor=style.colour,
        markersize=size,
    )
    ax.set_title(safe_text(style.name, 24), color=style.colour)
    ax.text(1.0, 1.02, f"{count(passed.sum())} of {count(len(table))} pass", transform=ax.transAxes, ha="right",
            va="bottom", color=MUTED, size=8.5)  # fmt: skip
    ax.set_xlim(0, max(len(table), 8) + 1)
    ax.set_xticks([])
    clean_axes(ax, grid="y")
