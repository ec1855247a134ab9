"""Treatment minus control beside placebo minus control. Is it more than SAE noise?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from saeffect.comparison import PRIMARY, Comparison
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
from saeffect.report.tables.view import difference_unit
from saeffect.report.words.numbers import amount

__all__ = ["DRAWN_QUANTITIES", "contrasts"]

DRAWN_QUANTITIES = (*PRIMARY, "effect", "direct_effect", "weight_mean", "mean_activation", "density")


def contrasts(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """One row a quantity, each on its own scale: the change by fine-tuning above that by retraining alone."""
    del context
    table = comparison.contrasts
    rows = table[table["comparison"].isin(["fine-tuning", "retraining"]) & table["estimate"].notna()]
    quantities = [name for name in DRAWN_QUANTITIES if (rows["quantity"] == name).any()]
    if not quantities:
        raise Undefined("no difference between the arms is defined.")
    n_lines = 1 + int(table.loc[table["comparison"] == "retraining", "b"].nunique())
    figure = new_figure(0.45 + (0.68 + 0.16 * n_lines) * len(quantities))
    for ax, quantity in zip(figure.subplots(len(quantities), 1, squeeze=False)[:, 0], quantities, strict=True):
        _row(ax, rows[rows["quantity"] == quantity], styles, n_lines, quantity in PRIMARY)
    return DrawnFigure(
        name="contrasts",
        title="Is it more than SAE noise?",
        caption=(
            "Each arm minus control, with 95 % intervals, every quantity on its own scale. The placebo is the same "
            "model with an SAE trained from another seed, so what differs there is SAE noise. Fine-tuning gets the "
            "credit only where the treatment's interval excludes zero and treatment − placebo does so too. "
            "An asterisk marks the quantities of the headline, fixed in advance."
        ),
        alt=_alt(rows[rows["quantity"].isin(quantities)]),
        figure=figure,
    )


def _alt(rows: pd.DataFrame) -> str:
    parts = [
        f"{row.label}, {row.b}: {amount(row.estimate, difference_unit(str(row.unit)), sign=True)}"
        for row in rows.itertuples()
    ]
    return f"Differences from control: {'; '.join(parts)}."


def _row(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, ArmStyle], n_lines: int, primary: bool) -> None:
    unit = str(rows["unit"].iloc[0])
    ends = rows[["low", "high", "estimate"]].to_numpy(dtype=float)
    reach = 1.08 * max(float(np.nanmax(np.abs(ends))), 1e-12)
    ax.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for line, row in enumerate(rows.itertuples()):
        style, y = styles[str(row.b)], n_lines - 1 - line
        if np.isfinite(row.low) and np.isfinite(row.high):
            ax.plot([row.low, row.high], [y, y], color=style.colour, linewidth=2.2, solid_capstyle="butt")
        ax.plot([row.estimate], [y], style.marker, color=style.colour, markersize=6)
        ax.text(1.01, y, safe_text(row.b, 16), transform=ax.get_yaxis_transform(), color=style.colour, va="center",
                size=8)  # fmt: skip
    names = {"share": "percentage points", "share of tokens": "percentage points of tokens", "coherence": ""}
    noun = names.get(unit, unit)
    label = str(rows["label"].iloc[0]) + (" *" if primary else "")
    ax.set_title(label, loc="left", size=8.8, pad=14 if noun else 5)
    if noun:
        ax.text(0, 1.03, noun, transform=ax.transAxes, size=7.8, color=MUTED, va="bottom")
    ax.set(xlim=(-reach, reach), ylim=(-0.6, n_lines - 0.4), yticks=[])
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    factor = 100.0 if unit in {"share", "share of tokens"} else 1.0
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:.3g}".replace("-", "−")))
    ax.tick_params(labelsize=8)
    clean_axes(ax, grid="x")
