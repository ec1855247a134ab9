"""Distributions of one number by arm: Figures 1 and 2 of the paper, and coherence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy.stats import gaussian_kde

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import GRID, MUTED, ArmStyle, Drawing, arm_styles, clean_axes, new_figure, safe_text
from saeffect.report.words.numbers import amount, count, percent
from saeffect.stats.arguments import FloatArray

__all__ = ["coherence", "density", "match_counts", "mean_activation", "top_token_weights"]

_GOLDEN = 0.6180339887498949  # multiples modulo 1 are evenly spread: jitter without random numbers


def match_counts(comparison: Comparison, context: ReportContext) -> Drawing:
    """Features by number of top tokens in the vocabulary, from one on; one mark per arm and number, log counts."""
    table, least = comparison.match_counts, context.min_matches
    if not (table["matches"] >= 1).any():
        raise Undefined("no arm has a feature to count.")
    unmatched, domain = [], []
    for name in arm_styles(comparison):
        rows = table[table["arm"] == name]
        for row in rows[rows["matches"] == 0].to_dict("records"):
            unmatched.append(f"{name} {count(row['n'])} ({percent(row['share'])})")
        domain.append(f"{name} {count(rows.loc[rows['matches'] >= least, 'n'].sum())}")
    figure = new_figure(3.2)
    _draw_counts(figure.add_subplot(), table[table["matches"] >= 1], arm_styles(comparison), least)
    return Drawing(
        figure,
        f"Features by how many of their {context.top_k} top tokens are in the vocabulary; logarithmic scale. "
        f"From {least} on (shaded) a feature counts as a domain feature, unless people's verdicts say no. "
        f"Not drawn: features with no such token ({', '.join(unmatched)}).",
        f"Number of features by matching top tokens. With {least} or more: {'; '.join(domain)}.",
    )


def _draw_counts(ax: Axes, table: pd.DataFrame, styles: Mapping[str, ArmStyle], least: int) -> None:
    most = int((table[table["n"] > 0] if (table["n"] > 0).any() else table)["matches"].max())
    table = table[table["matches"] <= most]
    top = max(1.0, float(table["n"].max()))
    ax.axvspan(least - 0.5, most + 0.5, color=GRID, alpha=0.45, linewidth=0)
    for number, (name, style) in enumerate(styles.items()):
        rows = table[table["arm"] == name]
        shift = 0.24 * (number - (len(styles) - 1) / 2)
        x, n = rows["matches"].to_numpy() + shift, rows["n"].to_numpy(dtype=float)
        ax.vlines(x, 0, n, color=style.colour, linewidth=1.6, linestyle=style.line, alpha=0.75)
        filled = n > 0
        ax.plot(x[filled], n[filled], style.marker, color=style.colour, markersize=5.5, label=safe_text(name, 24))
        ax.plot(x[~filled], n[~filled], style.marker, color="#ffffff", markeredgecolor=style.colour, markersize=4)
    ax.set_yscale("symlog", linthresh=1, linscale=0.35)
    ax.set_yticks(
        [0.0] + [step * 10.0**power for power in range(6) for step in (1, 3) if step * 10**power <= 1.5 * top]
    )
    ax.yaxis.set_major_formatter(lambda value, _: count(value))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(0.5, most + 0.5), ylim=(-0.12, 1.9 * top), ylabel="features")
    ax.set_xlabel("top tokens in the vocabulary")
    ax.set_xticks(np.arange(1, most + 1))
    ax.text(least - 0.42, 1.75 * top, "domain features", color=MUTED, size=8, va="top", style="italic")
    clean_axes(ax, grid="y")
    ax.legend(loc="upper right", handletextpad=0.3, borderaxespad=0.1)


def top_token_weights(comparison: Comparison, context: ReportContext) -> Drawing:
    """Weights of the top tokens of domain features, which the paper calls activations."""
    groups = _by_arm(comparison, comparison.weights, "weight")
    unit = "cosine" if context.projection == "cosine" else "dot product"
    return Drawing(
        _ridges(groups, comparison, f"top-token weight ({unit} with the decoder row)", "tokens"),
        f"Weights of the {context.top_k} top tokens of every domain feature: what the paper plots as activations. "
        "The shape is the distribution, the dot its median, the bar its middle half; "
        "each tick below is a token (at most 400 drawn).",
        _alt_text("Top-token weights", groups),
    )


def mean_activation(comparison: Comparison, _context: ReportContext) -> Drawing:
    """Mean activation of domain features over the tokens on which they fire."""
    groups = _by_arm(comparison, comparison.activity, "mean_activation")
    return Drawing(
        _ridges(groups, comparison, "mean activation where active", "features"),
        "Mean activation of each domain feature over the tokens on which it fires, in units of the SAE's "
        "input. Features that never fired are left out. Read as [[figure:top_token_weights]].",
        _alt_text("Mean activations", groups),
    )


def density(comparison: Comparison, _context: ReportContext) -> Drawing:
    """Share of tokens on which each domain feature fires."""
    table, unit = comparison.activity, "share of tokens"
    silent = int((table["density"] <= 0).sum())
    groups = _by_arm(comparison, table[table["density"] > 0], "density")
    note = f" {count(silent)} features that never fired are left out." if silent else ""
    return Drawing(
        _ridges(groups, comparison, "density (share of tokens, log scale)", "features", unit=unit, log=True),
        "Density: the share of tokens on which a domain feature fires, on a logarithmic scale."
        f"{note} Read as [[figure:top_token_weights]].",
        _alt_text("Densities", groups, unit),
    )


def coherence(comparison: Comparison, context: ReportContext) -> Drawing:
    """Coherence of domain features."""
    tables = [arm.of_domain(arm.coherence).assign(arm=name) for name, arm in context.arms.items()]
    groups = _by_arm(comparison, pd.concat(tables), "coherence") if tables else {}
    missing = int(comparison.table2["n_undefined"].sum())
    note = f" {count(missing)} features without a defined coherence are left out, not counted as 0." if missing else ""
    return Drawing(
        _ridges(groups, comparison, "coherence", "features"),
        "Coherence of each domain feature: the weighted mean cosine between the word vectors of its top "
        f"tokens, 1 when they mean the same.{note} Read as [[figure:top_token_weights]].",
        _alt_text("Coherences", groups),
    )


def _by_arm(comparison: Comparison, table: pd.DataFrame, column: str) -> dict[str, FloatArray]:
    groups = {}
    for name in arm_styles(comparison):
        values = table.loc[table["arm"] == name, column].to_numpy(dtype=np.float64)
        groups[name] = values[np.isfinite(values)]
    return groups


def _alt_text(what: str, groups: Mapping[str, FloatArray], unit: str = "") -> str:
    parts = [
        f"{name} has median {amount(np.median(values), unit)} over {count(len(values))}"
        if len(values)
        else f"{name} has none"
        for name, values in groups.items()
    ]
    return f"{what} by arm: {'; '.join(parts)}."


def _ridges(
    groups: Mapping[str, FloatArray],
    comparison: Comparison,
    label: str,
    noun: str,
    *,
    unit: str = "",
    log: bool = False,
) -> Figure:
    """One row per arm: half-violin; below it the median, the quartiles and a tick per value."""
    if not any(len(values) for values in groups.values()):
        raise Undefined(f"no domain feature has a value of {label.split(' (', maxsplit=1)[0]}.")
    positions = {name: np.log10(values) if log else values for name, values in groups.items()}
    values_of_all = np.concatenate(list(positions.values()))
    margin = 0.08 * (float(np.ptp(values_of_all)) or 1.0)
    grid = np.linspace(float(values_of_all.min()) - margin, float(values_of_all.max()) + margin, 256)
    shapes = {name: _density_curve(values, grid) for name, values in positions.items()}
    highest = max((float(shape.max()) for shape in shapes.values() if shape is not None), default=1.0)
    figure = new_figure(0.7 + 0.92 * len(groups))
    ax = figure.add_subplot()
    styles = arm_styles(comparison)
    for row, name in enumerate(reversed(list(groups))):
        shape, values = shapes[name], groups[name]
        _ridge(ax, row, positions[name], grid, None if shape is None else 0.5 * shape / highest, styles[name])
        median = f"median {amount(np.median(values), unit)}, " if len(values) else ""
        ax.text(0.0, row + 0.56, safe_text(name, 24), transform=ax.get_yaxis_transform(), weight="bold", va="bottom",
                color=styles[name].colour)  # fmt: skip
        ax.text(1.0, row + 0.56, f"{median}{count(len(values))} {noun}", transform=ax.get_yaxis_transform(),
                ha="right", va="bottom", color=MUTED, size=8)  # fmt: skip
    ax.set(xlim=(grid[0], grid[-1]), ylim=(-0.28, len(groups) - 0.18), xlabel=label, yticks=[])
    clean_axes(ax, grid="x")
    if log:
        ax.set_xticks(_log_ticks(grid[0], grid[-1]))
        ax.xaxis.set_major_formatter(lambda position, _: f"{100 * 10.0**position:.6g} %")
    return figure


def _ridge(ax: Axes, row: int, values: FloatArray, grid: FloatArray, shape: FloatArray | None, style: ArmStyle) -> None:
    if not len(values):
        ax.text(0.5, row + 0.1, "none", transform=ax.get_yaxis_transform(), color=MUTED, ha="center")
        return
    if shape is not None:
        in_range = (grid >= values.min()) & (grid <= values.max())  # no density outside the data
        x, y = grid[in_range], row + shape[in_range]
        ax.fill_between(x, row, y, color=style.colour, alpha=0.18, linewidth=0)
        ax.plot(x, y, color=style.colour, linestyle=style.line, linewidth=1.4)
    drawn = np.sort(values)[:: max(1, len(values) // 400)]
    jitter = 0.05 * ((np.arange(len(drawn)) * _GOLDEN) % 1.0)
    ax.plot(drawn, row - 0.1 - jitter, "|", color=style.colour, alpha=0.45, markersize=4, markeredgewidth=0.7)
    low, median, high = np.percentile(values, [25, 50, 75])
    ax.plot([low, high], [row, row], color=style.colour, linewidth=3.2, solid_capstyle="butt")
    ax.plot([median], [row], marker=style.marker, color=style.colour, markeredgecolor="#ffffff", markersize=7)


def _density_curve(values: FloatArray, grid: FloatArray) -> FloatArray | None:
    """Kernel density estimate; None for fewer than three values or if all are equal."""
    if len(values) < 3 or float(np.ptp(values)) < 1e-12:
        return None
    return np.asarray(gaussian_kde(values)(grid), dtype=np.float64)


def _log_ticks(low: float, high: float) -> Sequence[float]:
    """Whole powers of ten; in a range below two decades also 2 and 5 times these."""
    powers = range(math.ceil(low), math.floor(high) + 1)
    if len(powers) > 1:
        return powers
    ticks = [p + math.log10(step) for p in range(math.floor(low), math.ceil(high) + 1) for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]
