"""How many features have how many domain words among their top tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    GRID,
    MUTED,
    ArmStyle,
    DrawnFigure,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.words.numbers import count, percent

__all__ = ["match_counts"]


def match_counts(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Features by number of top tokens in the vocabulary, one mark an arm and count.

    Nearly all features have none, so that count is written out and the axis starts at one; the axis is
    logarithmic because each further match is several times rarer.
    """
    table = comparison.match_counts
    if table.empty or not (table["matches"] >= 1).any():
        raise Undefined("no arm has a feature to count.")
    least = context.min_matches
    domain = {name: int(table.loc[(table["arm"] == name) & (table["matches"] >= least), "n"].sum()) for name in styles}
    none = []
    for name in styles:
        zero = table[(table["arm"] == name) & (table["matches"] == 0)]
        if len(zero):
            none.append(f"{name} {count(zero['n'].iloc[0])} ({percent(zero['share'].iloc[0])})")
    figure = new_figure(3.2)
    _draw(figure.add_subplot(), comparison, styles, least)
    return DrawnFigure(
        name="match_counts",
        paper="Figure 1",
        title=f"How many {context.domain} words the features promote",
        caption=(
            f"Features by how many of their {context.top_k} top tokens are in the vocabulary; logarithmic scale. "
            f"From {least} on (shaded) a feature counts as a domain feature, unless people's verdicts say no. "
            f"Not drawn: features with no such token ({', '.join(none)})."
        ),
        alt=(
            f"Number of features by matching top tokens. With {least} or more: "
            + "; ".join(f"{name} {count(n)}" for name, n in domain.items())
            + "."
        ),
        figure=figure,
    )


def _draw(ax: Axes, comparison: Comparison, styles: Mapping[str, ArmStyle], least: int) -> None:
    table = comparison.match_counts[comparison.match_counts["matches"] >= 1]
    deepest = int(table.loc[table["n"] > 0, "matches"].max()) if (table["n"] > 0).any() else int(table["matches"].max())
    table = table[table["matches"] <= deepest]
    top = max(1.0, float(table["n"].max()))
    ax.axvspan(least - 0.5, deepest + 0.5, color=GRID, alpha=0.45, linewidth=0)
    for number, (name, style) in enumerate(styles.items()):
        rows = table[table["arm"] == name]
        shift = 0.24 * (number - (len(styles) - 1) / 2)
        x, n = rows["matches"].to_numpy() + shift, rows["n"].to_numpy(dtype=float)
        ax.vlines(x, 0, n, color=style.colour, linewidth=1.6, linestyle=style.line, alpha=0.75)
        filled = n > 0
        ax.plot(x[filled], n[filled], style.marker, color=style.colour, markersize=5.5, label=safe_text(name, 24))
        ax.plot(x[~filled], n[~filled], style.marker, color="#ffffff", markeredgecolor=style.colour, markersize=4)
    ax.set_yscale("symlog", linthresh=1, linscale=0.35)
    ticks = [0.0] + [step * 10.0**power for power in range(6) for step in (1, 3) if step * 10**power <= 1.5 * top]
    ax.set_yticks(ticks)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(0.5, deepest + 0.5), ylim=(-0.12, 1.9 * top), ylabel="features")
    ax.set_xlabel("top tokens in the vocabulary")
    ax.set_xticks(np.arange(1, deepest + 1))
    ax.text(least - 0.42, 1.75 * top, "domain features", color=MUTED, size=8, va="top", style="italic")
    clean_axes(ax, grid="y")
    ax.legend(loc="upper right", handletextpad=0.3, borderaxespad=0.1)
