"""What goes with a strong effect, each property with all others held equal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import INK, ArmStyle, DrawnFigure, clean_axes, new_figure, safe_text
from saeffect.report.tables.regression import TERM_NAMES
from saeffect.report.words.numbers import fixed, is_defined, signed

__all__ = ["partial_residuals"]


def partial_residuals(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """One panel a property; dots are features, the line has the regression's slope."""
    del context
    table, terms = comparison.partial_residuals, comparison.regression
    if table.empty:
        reasons = [reason for reason in terms["reason"] if reason] if len(terms) else []
        raise Undefined(f"there is no regression to draw: {reasons[0] if reasons else 'no feature was steered'}.")
    names = [name for name in dict.fromkeys(table["term"]) if (table["term"] == name).any()]
    slopes = terms.set_index("term")
    figure = new_figure(0.6 + 2.3 * len(names))
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for ax, name in zip(panels, names, strict=True):
        _panel(ax, table[table["term"] == name], styles, slopes.loc[name])
    panels[0].legend(loc="upper left", ncols=3, handletextpad=0.2, columnspacing=1.0, bbox_to_anchor=(-0.02, 1.0))
    figure.supylabel("effect left unexplained by the other terms", size=9, color=INK)
    return DrawnFigure(
        name="partial_residuals",
        title="What goes with a strong effect",
        caption=(
            "Partial residuals: each steered feature's effect after what all other terms explain is taken away. "
            "The line has the slope of the regression ([[table:regression]]); a cloud without direction means that the "
            "property tells nothing about the effect."
        ),
        alt="Slopes: " + "; ".join(f"{_label(name)[0]} {_slope(slopes.loc[name])}" for name in names) + ".",
        figure=figure,
        source="comparison/partial_residuals.parquet, columns term, x, residual, arm; regression.parquet: estimate",
    )


def _panel(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, ArmStyle], term: pd.Series) -> None:
    name = str(rows["term"].iloc[0])
    for arm, style in styles.items():
        some = rows[rows["arm"] == arm]
        if len(some):
            ax.plot(some["x"], some["residual"], style.marker, color=style.colour, markersize=4, alpha=0.75,
                    label=safe_text(arm, 16), linestyle="none")  # fmt: skip
    ends = np.array([rows["x"].min(), rows["x"].max()], dtype=float)
    ax.plot(ends, float(term["estimate"]) * ends, color=INK, linewidth=1.5)
    label, _ = _label(name)
    ax.set_title(f"{label}: {_slope(term)}", size=8.8)
    low, high = float(rows["residual"].min()), float(rows["residual"].max())
    ax.set_ylim(low - 0.05 * (high - low), high + 0.22 * max(high - low, 1e-9))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if name == "log10_density":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * 10**value:.2g} %"))
        ax.set_xlabel("share of tokens on which it fires (logarithmic)")
    else:
        ax.set_xlabel(label.lower())
    clean_axes(ax, grid="y")


def _label(name: str) -> tuple[str, str]:
    return TERM_NAMES.get(name, (name.replace("_", " "), ""))


def _slope(term: pd.Series) -> str:
    if is_defined(term["low"]) and is_defined(term["high"]):
        return f"{signed(term['estimate'])} [{fixed(term['low'])}, {fixed(term['high'])}]"
    return f"{signed(term['estimate'])}, no interval"
