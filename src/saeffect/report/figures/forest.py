"""A forest plot for each arm. What steering each feature did, beyond what its placebo did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.lm.tokens import printable_token
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import INK, MUTED, PAPER, ArmStyle, DrawnFigure, clean_axes, new_figure, safe_text
from saeffect.report.outcome_summary import primary_effects
from saeffect.report.words.names import control_words, effect_text, feature_names, interval_text, outcome_words
from saeffect.report.words.numbers import count, fixed, is_defined, p_value

__all__ = ["MOST_ROWS", "forests"]

MOST_ROWS = 40
_LOWEST = 10  # of the rows of a capped plot, how many show the smallest effects
_ROW, _BELOW = 0.168, 0.56  # inches: a row, and what stands below the axis
_LEFT, _RIGHT = 0.42, 0.875  # of the width: labels before, q after
_TOKENS = 94.0  # points that the top tokens may take before they are cut
_LABEL, _NUMBER = 7.8, 7.4  # points
_BEYOND = 0.4  # how far intervals are drawn beyond the outermost effects, in multiples of the effects' range
_SHARES = {"points": 100.0}


@dataclass(frozen=True)
class _Scale:
    """What all arms share: the ends of the axis, what effects are multiplied by, and what they are of."""

    low: float
    high: float
    factor: float
    outcome: str
    control: str


def forests(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> tuple[DrawnFigure, ...]:
    """One forest plot an arm, all on one scale: features sorted by effect, the arm's mean above them.

    Args:
        comparison: Not used; the effects are those of the arms' tables.
        styles: The look of each arm, in the order of the figures.
        context: The arms.

    Raises:
        Undefined: No feature of any arm was tested.
    """
    del comparison
    tables = {name: _tested(context.arms[name].effects) for name in styles if name in context.arms}
    if not any(len(table) for table in tables.values()):
        raise Undefined("no feature was tested by steering.")
    scale = _scale(list(tables.values()))
    letters = dict(zip(tables, (chr(ord("a") + i) if i < 26 else f"-{i + 1}" for i in range(len(tables))), strict=True))
    first = next(name for name, table in tables.items() if len(table))  # the one that says how to read them all
    drawn = []
    for name, table in tables.items():
        reading = _reading(scale, context) if name == first else f"Read as [[figure:effects_{letters[first]}]]."
        drawn.append(_forest(letters[name], table, styles[name], scale, (reading, feature_names(context, name, 2))))
    return tuple(drawn)


def _forest(
    letter: str, table: pd.DataFrame, style: ArmStyle, scale: _Scale, words: tuple[str, Mapping[int, str]]
) -> DrawnFigure:
    reading, names = words
    arm = printable_token(style.name)
    head = f"effects_{letter}", f"Effects of steering: {arm}"
    source = f"arms/{arm}/effects.parquet, one row a feature, columns effect, effect_low, effect_high, q, passed"
    if table.empty:
        why = f"no feature of {arm} has an effect, so nothing can be said about what its features cause."
        return DrawnFigure(*head, "", "", None, reason=why, source=source, group="effects")
    shown, hidden = _capped(table)
    mean = primary_effects(table)
    height = _BELOW + _ROW * (len(shown) + 2.6 + bool(hidden))
    figure = new_figure(height)
    figure.set_layout_engine("none")  # all arms have the same scale only if all axes are equally wide
    ax = figure.add_axes((_LEFT, _BELOW / height, _RIGHT - _LEFT, 1 - (_BELOW + 0.04) / height))
    _draw(ax, shown, hidden, mean, names, style, scale)
    average = f"mean effect {effect_text(mean['mean'], scale.outcome)}"
    known = is_defined(mean["low"]) and is_defined(mean["high"])
    ends = (
        f"95 % interval {interval_text(mean['low'], mean['high'], scale.outcome)}" if known else "without an interval"
    )
    passed, n = count(int(table["passed"].sum())), count(len(table))
    cap = (
        f" Of {n} features the {count(len(shown) - _LOWEST)} largest and {_LOWEST} smallest effects are drawn; all are "
        "in tables/domain_features.csv."
        if hidden
        else ""
    )
    lowest, highest = (fixed(scale.factor * end) for end in (table["effect"].min(), table["effect"].max()))
    return DrawnFigure(
        *head,
        caption=f"{passed} of {n} features pass; {average}, {ends}. {reading}{cap}",
        alt=(f"Forest plot of {arm}: {passed} of {n} pass, {average}, {ends}; effects from {lowest} to {highest}."),
        figure=figure,
        source=source,
        group="effects",
    )


def _reading(scale: _Scale, context: ReportContext) -> str:
    outcome, control = outcome_words(scale.outcome).title, control_words(scale.control)
    return (
        f"Each row is a feature with its first top tokens: {outcome} of steered texts minus that under the {control}. "
        f"Filled: passed (q ≤ {context.alpha:g}); hollow: not. Diamond: the arm's mean. Dashed: no effect. An arrow: "
        "the interval goes on. Every arm has the same scale."
    )


def _tested(table: pd.DataFrame | None) -> pd.DataFrame:
    if table is None or table.empty:
        return pd.DataFrame(columns=["feature", "effect", "effect_low", "effect_high", "q", "passed"])
    rows = table.copy()
    for column in ("effect", "effect_low", "effect_high", "q"):
        rows[column] = pd.to_numeric(rows[column], errors="coerce").astype(float)
    rows = rows[np.isfinite(rows["effect"])]
    rows["passed"] = [value is True or value == True for value in rows["passed"]]  # noqa: E712 - may hold NA
    return rows.sort_values(["effect", "feature"], ascending=[False, True]).reset_index(drop=True)


def _capped(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """At most `MOST_ROWS` rows: the largest effects and, so that nobody sees only those, some of the smallest."""
    if len(table) <= MOST_ROWS:
        return table, 0
    shown = pd.concat([table.head(MOST_ROWS - _LOWEST), table.tail(_LOWEST)], ignore_index=True)
    return shown, len(table) - len(shown)


def _scale(tables: list[pd.DataFrame]) -> _Scale:
    """Wide enough for every effect and every interval but huge ones: that of two pairs would leave nothing to see."""
    rows = pd.concat([table for table in tables if len(table)], ignore_index=True)
    effects = rows["effect"].to_numpy(dtype=float)
    low, high = min(0.0, float(effects.min())), max(0.0, float(effects.max()))
    spread = (high - low) or 1.0
    lows, highs = (ends[np.isfinite(ends)] for ends in (rows["effect_low"], rows["effect_high"]))
    low = max([low - _BEYOND * spread, min([low, *lows])]) - 0.06 * spread
    high = min([high + _BEYOND * spread, max([high, *highs])]) + 0.06 * spread
    first = rows.iloc[0]
    outcome = str(first.get("outcome", "similarity"))
    factor = _SHARES.get(outcome_words(outcome).amount_unit, 1.0)
    return _Scale(factor * low, factor * high, factor, outcome, str(first.get("placebo", "placebo")))


def _draw(
    ax: Axes,
    shown: pd.DataFrame,
    hidden: int,
    mean: Mapping[str, float],
    names: Mapping[int, str],
    style: ArmStyle,
    scale: _Scale,
) -> None:
    """The mean on row 0, features below it from row 1.6, a gap where some are left out."""
    y = 1.6 + np.arange(len(shown), dtype=float)
    if hidden:
        y[len(shown) - _LOWEST :] += 1.0
    ax.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    _mean_row(ax, mean, style, scale)
    for place, row in zip(y, shown.to_dict("records"), strict=True):
        _row(ax, place, row, style, scale)
        ax.text(1.05, place, p_value(row["q"]) if is_defined(row["q"]) else "–", transform=ax.get_yaxis_transform(),
                size=_NUMBER, color=INK if row["passed"] else MUTED, va="center")  # fmt: skip
    ax.text(1.05, 0, "q", transform=ax.get_yaxis_transform(), size=_NUMBER, color=MUTED, va="center")
    labels = [_label(int(feature), names) for feature in shown["feature"]]
    ticks, texts = [0.0, *y], [f"mean of {count(len(shown) + hidden)}", *labels]
    if hidden:
        ticks.append(y[len(shown) - _LOWEST] - 1.0)
        texts.append(f"… {count(hidden)} between …")
    ax.set_yticks(ticks, texts, size=_LABEL)
    ax.get_yticklabels()[0].set_fontweight("bold")
    ax.set(xlim=(scale.low, scale.high), ylim=(y[-1] + 0.7, -0.8))
    words = outcome_words(scale.outcome)
    unit = words.unit.split(":")[0]
    ax.set_xlabel(f"steered − {control_words(scale.control)}\n{words.title} ({unit})", size=8.5)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "−"))
    ax.tick_params(axis="x", labelsize=8)
    clean_axes(ax, grid="x")


def _row(ax: Axes, y: float, row: Mapping[str, float], style: ArmStyle, scale: _Scale) -> None:
    effect, low, high = (scale.factor * row[name] for name in ("effect", "effect_low", "effect_high"))
    if is_defined(low) and is_defined(high):
        _whisker(ax, y, (low, high), style.colour, 1.4, scale)
    ax.plot([effect], [y], style.marker, color=style.colour if row["passed"] else PAPER,
            markeredgecolor=style.colour, markeredgewidth=1.1, markersize=4.6, zorder=3)  # fmt: skip


def _mean_row(ax: Axes, mean: Mapping[str, float], style: ArmStyle, scale: _Scale) -> None:
    value, low, high = (scale.factor * mean[name] for name in ("mean", "low", "high"))
    ax.axhline(0.8, color=MUTED, linewidth=0.6, zorder=1)
    if is_defined(low) and is_defined(high):
        _whisker(ax, 0.0, (low, high), style.colour, 2.6, scale)
    ax.plot([value], [0.0], "D", color=style.colour, markersize=6.5, zorder=3)


def _whisker(ax: Axes, y: float, ends: tuple[float, float], colour: str, width: float, scale: _Scale) -> None:
    low, high = max(ends[0], scale.low), min(ends[1], scale.high)
    ax.plot([low, high], [y, y], color=colour, linewidth=width, alpha=0.75, solid_capstyle="butt", zorder=2)
    for is_cut, edge, marker in ((ends[0] < scale.low, low, "<"), (ends[1] > scale.high, high, ">")):
        if is_cut:
            ax.plot([edge], [y], marker, color=colour, markersize=4.5, clip_on=False, zorder=3)


def _label(feature: int, names: Mapping[int, str]) -> str:
    tokens = safe_text(names.get(feature, ""), 40)
    while len(tokens) > 1 and _width(tokens) > _TOKENS:
        tokens = tokens.rstrip("…")[:-1].rstrip() + "…"
    return f"{tokens} · {feature}" if tokens else f"{feature}"


def _width(text: str) -> float:
    """In points, as the file will show it."""
    return float(TextToPath().get_text_width_height_descent(text, FontProperties(size=_LABEL), ismath=False)[0])
