"""Effects of steering: a forest plot for each arm, and concept and fluency against the dose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator, NullFormatter

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.lm.tokens import printable_token
from saeffect.report.context import ReportContext, dose_summary, primary_effects
from saeffect.report.figures.style import (
    DASHED,
    INK,
    MUTED,
    PAPER,
    ArmStyle,
    Drawing,
    DrawnFigure,
    arm_styles,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.words.names import dose_axis, effect_text, feature_names, interval_text
from saeffect.report.words.numbers import count, fixed, is_defined, p_value
from saeffect.steering.outcomes import OUTCOMES
from saeffect.steering.placebos import STEERED, control_label

__all__ = ["MAX_ROWS", "doses", "forests"]

MAX_ROWS = 40
"""Most features in one forest plot."""

_N_SMALLEST = 10  # rows of a capped plot that show the smallest effects
_ROW_HEIGHT, _BOTTOM = 0.168, 0.56  # inches: height of a row, and space below the axis
_LEFT, _RIGHT = 0.42, 0.875  # share of the width: labels to the left, q to the right
_TOKENS_WIDTH = 94.0  # points; longer top tokens are cut
_LABEL_SIZE, _NUMBER_SIZE = 7.8, 7.4  # points
_OVERHANG = 0.4  # how far intervals extend beyond the outermost effects, in multiples of the effects' range


class _Scale(NamedTuple):
    """The scale of all arms: axis limits, factor of the effects, outcome and control."""

    low: float
    high: float
    factor: float
    outcome: str
    control: str


def forests(comparison: Comparison, context: ReportContext) -> tuple[DrawnFigure, ...]:
    """One forest plot per arm, all on one scale: features sorted by effect, the arm's mean above them."""
    styles = arm_styles(comparison)
    tables = {name: _tested_rows(context.arms[name].effects) for name in styles if name in context.arms}
    if not any(len(table) for table in tables.values()):
        raise Undefined("no feature was tested by steering.")
    scale = _common_scale(pd.concat([table for table in tables.values() if len(table)], ignore_index=True))
    outcome, control = OUTCOMES[scale.outcome].label, control_label(scale.control)
    reading = (
        f"Each row is a feature with its first top tokens: {outcome} of steered texts minus that under the {control}. "
        f"Filled: passed (q ≤ {context.alpha:g}); hollow: not. Diamond: the arm's mean. Dashed: no effect. An arrow: "
        "the interval goes on. Every arm has the same scale."
    )
    figures, instructions = [], ""
    for i, (name, table) in enumerate(tables.items()):
        arm, letter = printable_token(name), chr(ord("a") + i) if i < 26 else f"_{i}"
        figure = DrawnFigure(
            f"effects_{letter}",
            f"Effects of steering: {arm}",
            source=f"arms/{arm}/effects.parquet, one row a feature, columns effect, effect_low, effect_high, q, passed",
            group="effects",
        )
        if table.empty:
            reason = f"no feature of {arm} has an effect, so nothing can be said about what its features cause."
            figures.append(replace(figure, reason=reason))
            continue
        names = feature_names(context.arms.get(name), 2, wanted=set(table["feature"]))
        figures.append(replace(figure, **_forest(table, styles[name], scale, names, instructions or reading)._asdict()))
        instructions = instructions or f"Read as [[figure:{figure.name}]]."  # only the first caption explains the plot
    return tuple(figures)


def _tested_rows(table: pd.DataFrame | None) -> pd.DataFrame:
    if table is None or table.empty:
        return pd.DataFrame()
    rows = table[np.isfinite(table["effect"])]
    return rows.sort_values(["effect", "feature"], ascending=[False, True]).reset_index(drop=True)


def _common_scale(rows: pd.DataFrame) -> _Scale:
    """A scale for all effects and intervals; very wide intervals are cut."""
    effects = rows["effect"].to_numpy(dtype=float)
    low, high = min(0.0, float(effects.min())), max(0.0, float(effects.max()))
    spread = (high - low) or 1.0
    lows, highs = (ends[np.isfinite(ends)] for ends in (rows["effect_low"], rows["effect_high"]))
    low = max([low - _OVERHANG * spread, min([low, *lows])]) - 0.06 * spread
    high = min([high + _OVERHANG * spread, max([high, *highs])]) + 0.06 * spread
    outcome = str(rows["outcome"].iloc[0])
    factor = 100.0 if OUTCOMES[outcome].is_share else 1.0
    return _Scale(factor * low, factor * high, factor, outcome, str(rows["placebo"].iloc[0]))


def _forest(table: pd.DataFrame, style: ArmStyle, scale: _Scale, names: Mapping[int, str], reading: str) -> Drawing:
    shown = table
    if len(table) > MAX_ROWS:  # the largest effects and some of the smallest
        shown = pd.concat([table.head(MAX_ROWS - _N_SMALLEST), table.tail(_N_SMALLEST)], ignore_index=True)
    hidden = len(table) - len(shown)
    mean = primary_effects(table)
    height = _BOTTOM + _ROW_HEIGHT * (len(shown) + 2.6 + bool(hidden))
    figure = new_figure(height, layout=False)  # all arms have the same scale only if all axes are equally wide
    ax = figure.add_axes((_LEFT, _BOTTOM / height, _RIGHT - _LEFT, 1 - (_BOTTOM + 0.04) / height))
    _draw_forest(ax, shown, hidden, mean, names, style, scale)
    average = f"mean effect {effect_text(mean['mean'], scale.outcome)}, " + (
        f"95 % interval {interval_text(mean['low'], mean['high'], scale.outcome)}"
        if is_defined(mean["low"])
        else "without an interval"
    )
    passed, n = count(int(table["passed"].sum())), count(len(table))
    if hidden:
        reading += (
            f" Of {n} features the {count(MAX_ROWS - _N_SMALLEST)} largest and {_N_SMALLEST} smallest effects are "
            "drawn; all are in tables/domain_features.csv."
        )
    lowest, highest = (fixed(scale.factor * end) for end in (table["effect"].min(), table["effect"].max()))
    return Drawing(
        figure,
        f"{passed} of {n} features pass; {average}. {reading}",
        f"Forest plot of {printable_token(style.name)}: {passed} of {n} pass, {average}; effects from {lowest} to "
        f"{highest}.",
    )


def _draw_forest(
    ax: Axes,
    shown: pd.DataFrame,
    hidden: int,
    mean: Mapping[str, float],
    names: Mapping[int, str],
    style: ArmStyle,
    scale: _Scale,
) -> None:
    """The mean on row 0, features from row 1.6 on, and a gap where some are left out."""
    y = 1.6 + np.arange(len(shown), dtype=float)
    if hidden:
        y[len(shown) - _N_SMALLEST :] += 1.0
    ax.axvline(0, **DASHED, zorder=1)
    ax.axhline(0.8, color=MUTED, linewidth=0.6, zorder=1)
    _draw_interval(ax, 0.0, (mean["low"], mean["high"]), style.colour, 2.6, scale)
    ax.plot([scale.factor * mean["mean"]], [0.0], "D", color=style.colour, markersize=6.5, zorder=3)
    for height, row in zip(y, shown.to_dict("records"), strict=True):
        _draw_interval(ax, height, (row["effect_low"], row["effect_high"]), style.colour, 1.4, scale)
        ax.plot([scale.factor * row["effect"]], [height], style.marker, color=style.colour if row["passed"] else PAPER,
                markeredgecolor=style.colour, markeredgewidth=1.1, markersize=4.6, zorder=3)  # fmt: skip
        ax.text(1.05, height, p_value(row["q"]) if is_defined(row["q"]) else "–", transform=ax.get_yaxis_transform(),
                size=_NUMBER_SIZE, color=INK if row["passed"] else MUTED, va="center")  # fmt: skip
    ax.text(1.05, 0, "q", transform=ax.get_yaxis_transform(), size=_NUMBER_SIZE, color=MUTED, va="center")
    labels = [_row_label(int(feature), names) for feature in shown["feature"]]
    ticks, texts = [0.0, *y], [f"mean of {count(len(shown) + hidden)}", *labels]
    if hidden:
        ticks.append(y[len(shown) - _N_SMALLEST] - 1.0)
        texts.append(f"… {count(hidden)} between …")
    ax.set_yticks(ticks, texts, size=_LABEL_SIZE)
    ax.get_yticklabels()[0].set_fontweight("bold")
    ax.set(xlim=(scale.low, scale.high), ylim=(y[-1] + 0.7, -0.8))
    outcome = OUTCOMES[scale.outcome]
    ax.set_xlabel(
        f"steered − {control_label(scale.control)}\n{outcome.label} ({outcome.effect_unit.split(':')[0]})", size=8.5
    )
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "−"))
    ax.tick_params(axis="x", labelsize=8)
    clean_axes(ax, grid="x")


def _draw_interval(ax: Axes, y: float, interval: tuple[float, float], colour: str, width: float, scale: _Scale) -> None:
    """An interval in the outcome's unit, with an arrow where it leaves the scale; nothing if undefined."""
    if not (is_defined(interval[0]) and is_defined(interval[1])):
        return
    ends = scale.factor * interval[0], scale.factor * interval[1]
    low, high = max(ends[0], scale.low), min(ends[1], scale.high)
    ax.plot([low, high], [y, y], color=colour, linewidth=width, alpha=0.75, solid_capstyle="butt", zorder=2)
    for is_cut, edge, marker in ((ends[0] < scale.low, low, "<"), (ends[1] > scale.high, high, ">")):
        if is_cut:
            ax.plot([edge], [y], marker, color=colour, markersize=4.5, clip_on=False, zorder=3)


def _row_label(feature: int, names: Mapping[int, str]) -> str:
    tokens = safe_text(names.get(feature, ""), 40)
    font = FontProperties(size=_LABEL_SIZE)
    while len(tokens) > 1 and TextToPath().get_text_width_height_descent(tokens, font, ismath=False)[0] > _TOKENS_WIDTH:
        tokens = tokens.rstrip("…")[:-1].rstrip() + "…"
    return f"{tokens} · {feature}" if tokens else f"{feature}"


_DOTTED: Mapping[str, Any] = {"linestyle": (0, (1, 2)), "linewidth": 1.1, "markersize": 4.2, "markeredgewidth": 1.0}
# Panels of the dose search: measure and title.
_PANELS = {
    "gain": "concept: gain in similarity, steered − unsteered",
    "direct_effect": "concept: direct effect on the top tokens (nats)",
    "perplexity": "fluency: perplexity under the unsteered model (log scale)",
    "distinct2": "fluency: distinct-2, share of different word pairs",
    "score": "concept × fluency: what the dose is chosen by",
}


def doses(comparison: Comparison, context: ReportContext) -> Drawing:
    """Concept and fluency against the dose, one panel each, with the placebo's; the chosen dose is marked."""
    results, styles = context.steering, arm_styles(comparison)
    if results is not None and results.operator == "ablate":
        raise Undefined("an ablation has one dose, so there is no dose-response curve.")
    if results is None or results.dose_response is None:
        raise Undefined("no dose search was recorded.")
    table = dose_summary(results.dose_response, list(styles))
    panels = {measure: title for measure, title in _PANELS.items() if table[measure].notna().any()}
    if not panels:
        raise Undefined("the dose search has no numbers to draw.")
    chosen = _chosen_dose(context)
    figure = new_figure(0.55 + 1.32 * len(panels))
    axes: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    arms = [name for name in styles if (table["arm"] == name).any()]
    reach = float(np.ptp(table["dose"])) or 1.0
    placebos = [str(name) for name in dict.fromkeys(table["condition"]) if name != STEERED]
    for ax, (measure, title) in zip(axes, panels.items(), strict=True):
        if chosen is not None:
            ax.axvline(chosen, **DASHED, zorder=1)
        for i, name in enumerate(arms):
            shift = (i - (len(arms) - 1) / 2) * 0.014 * reach
            rows = table[table["arm"] == name].sort_values("dose")
            for placebo in placebos:
                _draw_placebo_line(ax, rows[rows["condition"] == placebo], measure, styles[name], shift)
            _draw_line(ax, rows[rows["condition"] == STEERED], measure, styles[name], shift)
        _format_panel(ax, title, is_log=measure == "perplexity")
    control = control_label(placebos[0]) if placebos else ""
    _label_axes(axes, chosen, table, dose_axis(results), control)
    placebo_note = (
        f" Dotted and hollow, in the colour of its arm: {control} at the same dose, on the same prompts and with the "
        "same sampling noise. What a line shows beyond its dotted one is due to the features."
        if placebos
        else " No placebo was run at these doses, so what any push of that size does is not shown."
    )
    dose_note = "No dose was chosen." if chosen is None else "The dashed line is the dose that was chosen."
    return Drawing(
        figure,
        f"The dose search, on prompts that the test does not use. {dose_note} Lines: means over "
        f"{int(table['n_features'].max())} features an arm; bars: 95 % intervals over them.{placebo_note}",
        _dose_alt_text(table, *next(iter(panels.items())), chosen),
    )


def _chosen_dose(context: ReportContext) -> float | None:
    if context.doses is not None:
        chosen = context.doses.loc[context.doses["chosen"].astype(bool), "dose"]
        if len(chosen):
            return float(chosen.iloc[0])
    return context.steering.dose if context.steering is not None else None


def _draw_line(ax: Axes, rows: pd.DataFrame, measure: str, style: ArmStyle, shift: float) -> None:
    x = rows["dose"].to_numpy(dtype=float) + shift
    y, low, high = (rows[measure + end].to_numpy(dtype=float) for end in ("", "_low", "_high"))
    ax.vlines(x, low, high, color=style.colour, linewidth=1.1, alpha=0.45, zorder=2)
    ax.plot(x, y, marker=style.marker, color=style.colour, linestyle=style.line, markersize=4.2, linewidth=1.5,
            label=safe_text(style.name, 18), zorder=3)  # fmt: skip


def _draw_placebo_line(ax: Axes, rows: pd.DataFrame, measure: str, style: ArmStyle, shift: float) -> None:
    """Without error bars: six lines with bars would be unreadable."""
    x, y = rows["dose"].to_numpy(dtype=float) + shift, rows[measure].to_numpy(dtype=float)
    ax.plot(x, y, marker=style.marker, color=style.colour, markerfacecolor=PAPER, zorder=2.5, **_DOTTED)


def _format_panel(ax: Axes, title: str, *, is_log: bool) -> None:
    ax.set_title(title, size=8.6)
    if is_log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        candidates = [step * 10.0**power for power in range(-1, 9) for step in (1, 3)]
        ticks = [tick for tick in candidates if low <= tick <= high]
        ticks = ticks if len(ticks) <= 5 else [tick for tick in ticks if f"{tick:e}"[0] == "1"]
        ax.set_yticks(ticks or [low, high])
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.3g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="y", which="minor", length=0)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(labelsize=8)
    clean_axes(ax, grid="y")


def _label_axes(axes: Sequence[Axes], chosen: float | None, table: pd.DataFrame, label: str, control: str) -> None:
    if chosen is not None:
        axes[0].annotate(f"chosen: {chosen:g}", (chosen, 1.0), xycoords=("data", "axes fraction"), xytext=(-5, -2),
                         textcoords="offset points", va="top", ha="right", color=MUTED, size=8)  # fmt: skip
    doses = sorted(set(table["dose"].astype(float)))
    if len(doses) <= 8:
        axes[-1].set_xticks(doses, [f"{dose:g}" for dose in doses])
    axes[-1].set_xlabel(label, size=8.5)
    handles, names = axes[0].get_legend_handles_labels()
    if control:
        handles.append(Line2D([], [], color=MUTED, marker="o", markerfacecolor=PAPER, **_DOTTED))
        names.append(control)
    if len(names) > 1:
        axes[0].figure.legend(handles, names, loc="outside upper left", ncols=4, handlelength=2.2, columnspacing=1.1)


def _dose_alt_text(table: pd.DataFrame, measure: str, title: str, chosen: float | None) -> str:
    parts = []
    for name, rows in table[table["condition"] == STEERED].dropna(subset=measure).groupby("arm", sort=False):
        ends = rows.sort_values("dose").iloc[[0, -1]].to_dict("records")
        parts.append(f"{name} from " + " to ".join(f"{row[measure]:.3g} at {row['dose']:g}" for row in ends))
    return f"{title} by dose: {'; '.join(parts)}. Chosen dose: {'none' if chosen is None else f'{chosen:g}'}."
