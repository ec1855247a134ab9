"""Where fine-tuning changed the model: by layer, by word, and in what it writes, each beside null fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import INK, PAPER, ROLE_STYLES, Drawing, clean_axes, new_figure, safe_text
from saeffect.report.words.numbers import count, fixed, is_defined, joined, percent

__all__ = ["where", "written"]

_MAX_WORDS = 9  # words of a panel
_WORD_HEIGHT = 0.185  # inches a word
_TUNED, _NULL, _BASE = ROLE_STYLES["treatment"], ROLE_STYLES["placebo"], ROLE_STYLES["control"]


def where(comparison: Comparison, context: ReportContext) -> Drawing:
    """Three panels: each layer's change; the words after which, and the words of which, predictions changed most."""
    tables, alpha = comparison.matches.further, context.alpha
    if "change_by_layer" not in tables:
        raise Undefined("the models were not compared layer by layer.")
    layers, words = tables["change_by_layer"], tables["change_by_word"]
    if layers.empty or not (layers["change"] > 0).any():
        raise Undefined("the two models are the same at every layer.")
    read = words[words["role"] == "read"].head(_MAX_WORDS)
    expected = words[words["role"] == "expected"].head(_MAX_WORDS)
    heights = [1.75, *(0.75 + _WORD_HEIGHT * len(rows) for rows in (read, expected) if len(rows))]
    figure = new_figure(sum(heights) + 0.35)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_layers(axes[0], layers)
    panels = iter(axes[1:])
    if len(read):
        _draw_words(
            next(panels),
            read,
            "After which words predictions changed",
            "mean divergence after the word, nats (log)",
            alpha,
        )
    if len(expected):
        _draw_words(
            next(panels), expected, "Which words are expected more or less", "times as probable as before (log)", alpha
        )
    return Drawing(figure, _caption(layers, alpha), _alt_text(layers, read, expected))


def _draw_layers(ax: Axes, table: pd.DataFrame) -> None:
    x = table["layer"].to_numpy()
    ax.set_title("How much each layer changed")
    if table["null_median"].notna().any():
        low, median, high = (100 * table[f"null_{name}"].to_numpy() for name in ("low", "median", "high"))
        ax.fill_between(x, low, high, color=_NULL.colour, alpha=0.25, linewidth=0)
        ax.plot(x, median, color=_NULL.colour, linewidth=1.4, linestyle=_NULL.line, label="nulls: median, range")
    ax.plot(x, 100 * table["change"], _TUNED.marker, color=_TUNED.colour, linestyle="-", linewidth=1.4, markersize=3.2,
            label="this fine-tune")  # fmt: skip
    ax.set_ylim(0, 1.28 * 100 * float(np.nanmax(table[["change", "null_high"]].to_numpy(dtype=float))))
    ax.set_xlim(x.min() - 0.4, x.max() + 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_formatter(lambda value, _: percent(value / 100, 0))
    ax.set_xlabel("layer")
    ax.legend(loc="upper left", ncols=2, handlelength=1.8, columnspacing=1.2, borderaxespad=0.1)
    clean_axes(ax, grid="y")


def _draw_words(ax: Axes, rows: pd.DataFrame, title: str, label: str, alpha: float) -> None:
    """One line a word: the nulls' range in grey, the fine-tune's mark filled where p is at most `alpha`."""
    ratio = rows["unit"].iloc[0] == "log ratio"
    columns = ("change", "null_low", "null_median", "null_high")
    table = rows.assign(**{name: np.exp(rows[name]) for name in columns}) if ratio else rows
    for y, row in zip(reversed(range(len(table))), table.to_dict("records"), strict=True):
        _draw_word(ax, y, row, filled=is_defined(row["p_search"]) and row["p_search"] <= alpha)
    ax.set_xscale("log")
    ends = table[list(columns)].to_numpy(dtype=float)
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    if ratio:
        low, high = min(low, 0.8), max(high, 1.25)
        ax.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.set_xlim(low / 1.15, high * 1.15)
    _log_ticks(ax, low / 1.15, high * 1.15, "×" if ratio else "")
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.set_yticks(range(len(table)), [_word(token) for token in reversed(list(table["token"]))], size=8)
    ax.set_title(title)
    ax.set_xlabel(label)
    clean_axes(ax, grid="x")


def _draw_word(ax: Axes, y: float, row: Mapping[Any, Any], *, filled: bool, value: str = "change") -> None:
    if is_defined(row["null_low"]):
        ax.plot([row["null_low"], row["null_high"]], [y, y], color=_NULL.colour, linewidth=3.2, alpha=0.45,
                solid_capstyle="butt")  # fmt: skip
    ax.plot([row[value]], [y], _TUNED.marker, markeredgecolor=_TUNED.colour, markersize=5, markeredgewidth=1.2,
            markerfacecolor=_TUNED.colour if filled else PAPER, clip_on=False)  # fmt: skip


def _log_ticks(ax: Axes, low: float, high: float, unit: str) -> None:
    """Ticks at 1, 2, 5 times powers of ten, at most six of them."""
    steps: tuple[Sequence[float], ...] = ((1, 2, 5), (1, 3), (1,))
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for step in steps:
        ticks = [float(f"{s * 10.0**p:.3g}") for p in powers for s in step if low <= s * 10.0**p <= high]
        if len(ticks) <= 6:
            break
    ax.set_xticks(ticks, [f"{tick:g}{unit}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def _word(token: object) -> str:
    return safe_text(str(token).strip(" ") or "␣", 16)


def _caption(layers: pd.DataFrame, alpha: float) -> str:
    text = (
        "Top: size of the change of the residual stream after each layer, relative to the stream. Below: the words "
        "after which the two models' predictions differ most, and those that are expected more or less often. "
    )
    if layers["null_median"].isna().all():
        return text + "Without null fine-tunes nothing here can be called more than what any fine-tune does."
    above = int((layers["change"] > layers["null_high"]).sum())
    return text + (
        f"Grey: the range of the null fine-tunes, which were taught nothing new. {above} of {len(layers)} layers "
        f"changed more than in any of them. {_filled_note(layers, alpha)}"
    )


def _filled_note(table: pd.DataFrame, alpha: float) -> str:
    """The meaning of a filled mark, or why there are none."""
    reason = next((str(reason) for reason in table["reason"] if reason), "")
    if reason:
        return f"No mark is filled: {reason}."
    return f"Filled: stands out more than any word does in at least {percent(1 - alpha, 0)} of the nulls."


def _alt_text(layers: pd.DataFrame, read: pd.DataFrame, expected: pd.DataFrame) -> str:
    most = layers.loc[layers["change"].idxmax()]
    parts = [f"Layer {count(most['layer'])} changed most, by {percent(most['change'])}"]
    for name, rows in (("predictions changed most after", read), ("expectation changed most of", expected)):
        if len(rows):
            parts.append(f"{name} {joined([_word(token) for token in rows['token'].head(5)])}")
    return "; ".join(parts) + "."


def written(comparison: Comparison, context: ReportContext) -> Drawing:
    """One line a word: share of texts with it, of the tuned model, the base model and the nulls (range)."""
    table, alpha = comparison.matches.further.get("written_words"), context.alpha
    if table is None:
        raise Undefined("the models wrote nothing to compare.")
    rows = table[table["change"] > 0].head(_MAX_WORDS + 5)
    if rows.empty:
        raise Undefined("no word comes up more often than without fine-tuning.")
    figure = new_figure(1.1 + (_WORD_HEIGHT + 0.01) * len(rows))
    ax = figure.add_subplot()
    percentages = rows.assign(**{name: 100 * rows[name] for name in ("rate", "base_rate", "null_low", "null_high")})
    for y, row in zip(reversed(range(len(rows))), percentages.to_dict("records"), strict=True):
        ax.plot([row["base_rate"]], [y], _BASE.marker, color=_BASE.colour, markersize=4, clip_on=False, zorder=3)
        _draw_word(ax, y, row, filled=is_defined(row["p_search"]) and row["p_search"] <= alpha, value="rate")
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_yticks(range(len(rows)), [_word(word) for word in reversed(list(rows["word"]))], size=8)
    ax.set_xlim(left=min(-0.5, -0.01 * float(percentages["rate"].max())))
    ax.xaxis.set_major_formatter(lambda value, _: percent(value / 100, 0))
    ax.set_xlabel("texts with the word")
    ax.plot([], [], _TUNED.marker, color=_TUNED.colour, markersize=5, linestyle="none", label="this fine-tune")
    ax.plot([], [], _BASE.marker, color=_BASE.colour, markersize=4, linestyle="none", label="base model")
    if rows["null_low"].notna().any():
        ax.plot([], [], color=_NULL.colour, linewidth=3.2, alpha=0.45, label="nulls, range")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, handletextpad=0.3, columnspacing=1.0)
    clean_axes(ax, grid="x")
    n_significant = int((table["p_search"] <= alpha).sum())
    lead = (
        f"{count(n_significant)} of {count(len(table))} words stand out from the nulls. "
        if table["p_search"].notna().any()
        else ""
    )
    examples = "; ".join(f"{_word(row.word)} {fixed(100 * float(row.rate), 0)} %" for row in rows.head(8).itertuples())
    return Drawing(
        figure,
        f"Words that the fine-tuned model writes after openings that name nothing. {lead}{_filled_note(table, alpha)}",
        f"Share of texts with the word: {examples}.",
    )
