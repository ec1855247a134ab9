"""Distributions of one number by arm: Figure 2 of the paper, and coherence."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from scipy.stats import gaussian_kde

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    MUTED,
    ArmStyle,
    DrawnFigure,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.words.numbers import amount, count

__all__ = ["coherence", "density", "mean_activation", "top_token_weights"]

FloatArray = npt.NDArray[np.float64]
_GOLDEN = 0.6180339887498949  # its multiples spread points evenly, so that the jitter needs no random numbers


def top_token_weights(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Weights of the top tokens of domain features, which the paper calls activations."""
    groups = _by_arm(comparison.weights, "weight", styles)
    unit = "cosine with the decoder row" if context.projection == "cosine" else "dot product with the decoder row"
    return DrawnFigure(
        name="top_token_weights",
        group="distributions",
        paper="Figure 2",
        title="How strongly domain features promote their top tokens",
        caption=(
            f"Weights of the {context.top_k} top tokens of every domain feature: what the paper plots as activations. "
            "The shape is the distribution, the dot its median, the bar its middle half; "
            "each tick below is a token (at most 400 drawn)."
        ),
        alt=_alt("Top-token weights", groups),
        figure=_ridges(groups, styles, f"top-token weight ({unit})", "tokens"),
    )


def mean_activation(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Mean activation of domain features over the tokens on which they fire."""
    del context
    groups = _by_arm(comparison.activity, "mean_activation", styles)
    return DrawnFigure(
        name="mean_activation",
        group="distributions",
        title="How strongly domain features fire",
        caption=(
            "Mean activation of each domain feature over the tokens on which it fires, in units of the SAE's "
            "input. Features that never fired are left out. Read as [[figure:top_token_weights]]."
        ),
        alt=_alt("Mean activations", groups),
        figure=_ridges(groups, styles, "mean activation where active", "features"),
    )


def density(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Share of tokens on which each domain feature fires."""
    del context
    table = comparison.activity
    silent = int((table["density"] <= 0).sum())
    groups = _by_arm(table[table["density"] > 0], "density", styles)
    note = f" {count(silent)} features that never fired are left out." if silent else ""
    return DrawnFigure(
        name="density",
        group="distributions",
        title="How often domain features fire",
        caption=(
            "Density: the share of tokens on which a domain feature fires, on a logarithmic scale."
            f"{note} Read as [[figure:top_token_weights]]."
        ),
        alt=_alt("Densities", groups, "share of tokens"),
        figure=_ridges(
            groups, styles, "density (share of tokens, log scale)", "features", unit="share of tokens", log=True
        ),
    )


def coherence(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Coherence of domain features."""
    groups: dict[str, FloatArray] = {}
    for name, arm in context.arms.items():
        values = arm.of_domain(arm.coherence)["coherence"].to_numpy(dtype=np.float64)
        groups[name] = values[np.isfinite(values)]
    missing = int(comparison.table2["n_undefined"].sum())
    note = f" {count(missing)} features without a defined coherence are left out, not counted as 0." if missing else ""
    return DrawnFigure(
        name="coherence",
        title="How coherent domain features are",
        caption=(
            "Coherence of each domain feature: the weighted mean cosine between the word vectors of its top "
            f"tokens, 1 when they mean the same.{note} Read as [[figure:top_token_weights]]."
        ),
        alt=_alt("Coherences", {name: groups[name] for name in styles if name in groups}),
        figure=_ridges(groups, styles, "coherence", "features"),
    )


def _by_arm(table: pd.DataFrame, column: str, styles: Mapping[str, ArmStyle]) -> dict[str, FloatArray]:
    groups = {}
    for name in styles:
        values = table.loc[table["arm"] == name, column].to_numpy(dtype=np.float64)
        groups[name] = values[np.isfinite(values)]
    return groups


def _alt(what: str, groups: Mapping[str, FloatArray], unit: str = "") -> str:
    parts = [
        f"{name} has median {amount(np.median(values), unit)} over {count(len(values))}"
        if len(values)
        else f"{name} has none"
        for name, values in groups.items()
    ]
    return f"{what} by arm: {'; '.join(parts)}."


def _ridges(
    groups: Mapping[str, FloatArray],
    styles: Mapping[str, ArmStyle],
    label: str,
    noun: str,
    *,
    unit: str = "",
    log: bool = False,
) -> Figure:
    """One row an arm: half-violin above, median and quartiles on the line, a tick for each value below."""
    names = [name for name in styles if name in groups]
    if not any(len(groups[name]) for name in names):
        raise Undefined(f"no domain feature has a value of {label.split(' (', maxsplit=1)[0]}.")
    positions = {name: np.log10(groups[name]) if log else groups[name] for name in names}
    every = np.concatenate([positions[name] for name in names])
    margin = 0.08 * (float(np.ptp(every)) or 1.0)
    grid = np.linspace(float(every.min()) - margin, float(every.max()) + margin, 256)
    shapes = {name: _density_curve(positions[name], grid) for name in names}
    tallest = max((float(shape.max()) for shape in shapes.values() if shape is not None), default=1.0)

    figure = new_figure(0.7 + 0.92 * len(names))
    ax = figure.add_subplot()
    for row, name in enumerate(reversed(names)):
        shape = shapes[name]
        _row(ax, row, positions[name], grid, None if shape is None else 0.5 * shape / tallest, styles[name])
        middle = f"median {amount(np.median(groups[name]), unit)}, " if len(groups[name]) else ""
        ax.text(0.0, row + 0.56, safe_text(name, 24), transform=ax.get_yaxis_transform(), weight="bold", va="bottom",
                color=styles[name].colour)  # fmt: skip
        ax.text(1.0, row + 0.56, f"{middle}{count(len(groups[name]))} {noun}", transform=ax.get_yaxis_transform(),
                ha="right", va="bottom", color=MUTED, size=8)  # fmt: skip
    ax.set(xlim=(grid[0], grid[-1]), ylim=(-0.28, len(names) - 0.18), xlabel=label, yticks=[])
    clean_axes(ax, grid="x")
    if log:
        _log_ticks(ax, grid)
    return figure


def _row(ax: Axes, row: int, values: FloatArray, grid: FloatArray, shape: FloatArray | None, style: ArmStyle) -> None:
    if shape is not None:
        seen = (grid >= values.min()) & (grid <= values.max())  # a smooth curve must not invent values beyond the data
        x, y = grid[seen], row + shape[seen]
        ax.fill_between(x, row, y, color=style.colour, alpha=0.18, linewidth=0)
        ax.plot(x, y, color=style.colour, linestyle=style.line, linewidth=1.4)
    if not len(values):
        ax.text(0.5, row + 0.1, "none", transform=ax.get_yaxis_transform(), color=MUTED, ha="center")
        return
    few = np.sort(values)[:: max(1, len(values) // 400)]
    jitter = 0.05 * ((np.arange(len(few)) * _GOLDEN) % 1.0)
    ax.plot(few, row - 0.1 - jitter, "|", color=style.colour, alpha=0.45, markersize=4, markeredgewidth=0.7)
    low, middle, high = np.percentile(values, [25, 50, 75])
    ax.plot([low, high], [row, row], color=style.colour, linewidth=3.2, solid_capstyle="butt")
    ax.plot([middle], [row], marker=style.marker, color=style.colour, markeredgecolor="#ffffff", markersize=7)


def _density_curve(values: FloatArray, grid: FloatArray) -> FloatArray | None:
    """Kernel density estimate; None for fewer than three values or when all are equal."""
    if len(values) < 3 or float(np.ptp(values)) < 1e-12:
        return None
    return np.asarray(gaussian_kde(values)(grid), dtype=np.float64)


def _log_ticks(ax: Axes, grid: FloatArray) -> None:
    powers = range(math.ceil(grid[0]), math.floor(grid[-1]) + 1)
    wanted = [float(power) for power in powers]
    if len(wanted) < 2:  # less than a decade or two: 1, 2, 5 as well
        wanted = [
            power + math.log10(step)
            for power in range(math.floor(grid[0]), math.ceil(grid[-1]) + 1)
            for step in (1, 2, 5)
        ]
        wanted = [tick for tick in wanted if grid[0] <= tick <= grid[-1]]
    ax.set_xticks(wanted)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda position, _: _share_label(10**position)))


def _share_label(share: float) -> str:
    """A share as a short percentage for an axis.

    Example:
        >>> _share_label(0.1), _share_label(0.0001)
        ('10 %', '0.01 %')
    """
    return f"{100 * share:.6g} %"
