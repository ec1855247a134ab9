"""Which features were kept, moved, lost and added, as flows; and the same between two seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from saeffect.comparison import Comparison
from saeffect.diffing.matched_null import ONE_PLACEBO
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import INK, MUTED, ArmStyle, DrawnFigure, arm_styles, new_figure, safe_text
from saeffect.report.words.numbers import count, fixed, is_defined, percent, signed

__all__ = ["fates_by_activation", "fates_by_decoder"]

_LEFT, _RIGHT, _BAR = 0.27, 0.73, 0.03
_GAP, _LEAST_APART = 0.03, 0.19
_KEPT, _MOVED = "#b6c0ca", "#e69f00"
_LOOKS = arm_styles([("control", "control"), ("treatment", "treatment"), ("placebo", "placebo")])
_EXCESSES = (("control", "gone"), ("treatment", "new"))
_WORDS = {
    "decoder cosine": ("fates_by_decoder", "by what they write"),
    "activation correlation": ("fates_by_activation", "by when they fire"),
}


@dataclass(frozen=True)
class _Segment:
    """A part of a bar: features of one fate."""

    fate: str
    n: float
    colour: str


def _fates(measure: str, comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Two flows below each other: to the treatment's SAE, and to another SAE of the control's model."""
    counts = comparison.matches.fate_counts
    rows = counts[counts["measure"] == measure] if len(counts) else counts
    if rows.empty:
        raise Undefined("features were not matched by this measure.")
    if not rows["n_treatment"].notna().any():
        raise Undefined(f"{rows['reason'].iloc[0]}.")
    name, how = _WORDS[measure]
    control, treatment = (_name(styles, role) for role in ("control", "treatment"))
    found = {(str(row["side"]), str(row["fate"])): row for row in rows.to_dict("records")}
    figure = new_figure(5.1)
    axes = figure.subplots(2, 1)
    _flow(axes[0], found, "n_treatment", f"Fine-tuning: {control} → {treatment}", "treatment")
    _flow(axes[1], found, "n_placebo", f"SAE noise: {control} → another seed, same model", "placebo")
    figure.supxlabel(_below(found), size=8.2, color=MUTED)
    return DrawnFigure(
        name=name,
        group="fates",
        title=f"Which feature became which, {how}",
        caption=(
            "Left: the control's features. Right: those of the other SAE. Both flows are judged by the same rule, by "
            "similarity alone: kept ones match as well as features of two seeds do, gone and new ones match nothing "
            "better than unrelated features do. Only what the upper flow shows beyond the lower one can be credited to "
            f"fine-tuning: {_excess_words(found)}. {_called_words(rows, context)}"
        ),
        alt=(
            f"Of {count(found['control', 'gone']['n_features'])} features of {control}, "
            f"{count(round(found['control', 'kept']['n_treatment']))} are kept and "
            f"{count(round(found['control', 'gone']['n_treatment']))} gone in {treatment}; in an SAE of another seed "
            f"{count(round(found['control', 'kept']['n_placebo']))} and "
            f"{count(round(found['control', 'gone']['n_placebo']))}."
        ),
        figure=figure,
        source=f"comparison/fate_counts.parquet, rows of the {measure}: n_treatment, n_placebo, excess, called",
    )


fates_by_decoder = partial(_fates, "decoder cosine")
fates_by_activation = partial(_fates, "activation correlation")


def _name(styles: Mapping[str, ArmStyle], role: str) -> str:
    return safe_text(next((name for name, style in styles.items() if style.role == role), role), 16)


def _below(found: Mapping[tuple[str, str], Mapping[Any, Any]]) -> str:
    parts = []
    for key in _EXCESSES:
        row, word = found[key], key[1]
        if is_defined(row["low"]) and is_defined(row["high"]):
            parts.append(f"{word} {signed(row['excess'], 0)} [{fixed(row['low'], 0)}, {fixed(row['high'], 0)}]")
    return f"beyond SAE noise: {', '.join(parts)}" if parts else "excess over SAE noise: no interval"


def _excess_words(found: Mapping[tuple[str, str], Mapping[Any, Any]]) -> str:
    parts = []
    for key in _EXCESSES:
        row, word = found[key], key[1]
        if not (is_defined(row["low"]) and is_defined(row["high"])):
            parts.append(f"no interval for {word} ones ({row['reason'] or 'no reason was recorded'})")
            continue
        apart = row["low"] > 0 or row["high"] < 0
        parts.append(
            f"{signed(row['excess'], 0)} {word} (95 % interval {fixed(row['low'], 0)} to {fixed(row['high'], 0)}, "
            f"which {'excludes' if apart else 'includes'} zero)"
        )
    remark = f" ({ONE_PLACEBO})" if any(found[key]["reason"] == ONE_PLACEBO for key in _EXCESSES) else ""
    return " and ".join(parts) + remark


def _called_words(rows: pd.DataFrame, context: ReportContext) -> str:
    called = rows[(rows["fate"] != "kept") & rows["called"].notna()]
    sums = called.groupby("fate", sort=False)["called"].sum()
    found = [f"{count(n)} {fate}" for fate, n in sums.items() if n]
    if not found:
        return f"No single feature can be called moved, gone, absorbed or new (q ≤ {context.alpha:g})."
    return f"Single features called so (q ≤ {context.alpha:g}): {', '.join(found)}."


def _flow(ax: Axes, found: Mapping[tuple[str, str], Mapping[Any, Any]], column: str, title: str, role: str) -> None:
    control, other = _LOOKS["control"].colour, _LOOKS[role].colour
    absorbed = float(found.get(("control", "absorbed"), {}).get("called") or 0) if column == "n_treatment" else 0.0
    absorbed = absorbed if is_defined(absorbed) else 0.0
    left = [
        _Segment("kept", _n(found, "control", "kept", column), _KEPT),
        _Segment("moved", _n(found, "control", "moved", column), _MOVED),
        _Segment("absorbed", absorbed, "#56b4e9"),
        _Segment("gone", max(0.0, _n(found, "control", "gone", column) - absorbed), control),
    ]
    right = [
        _Segment("kept", _n(found, "treatment", "kept", column), _KEPT),
        _Segment("moved", _n(found, "treatment", "moved", column), _MOVED),
        _Segment("new", _n(found, "treatment", "new", column), other),
    ]
    spans_left, spans_right = _spans(left), _spans(right)
    for fate in ("kept", "moved"):
        if fate in spans_left and fate in spans_right:
            _ribbon(ax, spans_left[fate], spans_right[fate], _KEPT if fate == "kept" else _MOVED, 0.45)
    if "absorbed" in spans_left and "kept" in spans_right:
        low, high = spans_left["absorbed"]
        foot = spans_right["kept"][0]
        _ribbon(ax, (low, high), (foot, foot + 0.6 * (high - low)), "#56b4e9", 0.7)
    if "gone" in spans_left:
        _ending(ax, spans_left["gone"], _LEFT + _BAR, _LEFT + _BAR + 0.15, control)
    if "new" in spans_right:
        _ending(ax, spans_right["new"], _RIGHT - _BAR, _RIGHT - _BAR - 0.15, other)
    _bar(ax, _LEFT, left, spans_left, "right")
    _bar(ax, _RIGHT - _BAR, right, spans_right, "left")
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    ax.set_axis_off()
    ax.set_title(title, size=8.8)


def _n(found: Mapping[tuple[str, str], Mapping[Any, Any]], side: str, fate: str, column: str) -> float:
    value = found.get((side, fate), {}).get(column, 0.0)
    return float(value) if is_defined(value) else 0.0


def _spans(segments: Sequence[_Segment]) -> dict[str, tuple[float, float]]:
    """Lower and upper end of each segment that is not empty, from the top down, on a bar of height 1."""
    shown = [one for one in segments if one.n > 0]
    total = sum(one.n for one in shown)
    free = 1 - _GAP * max(0, len(shown) - 1)
    spans, top = {}, 1.0
    for one in shown:
        height = free * one.n / total
        spans[one.fate] = (top - height, top)
        top -= height + _GAP
    return spans


def _bar(
    ax: Axes, x: float, segments: Sequence[_Segment], spans: Mapping[str, tuple[float, float]], align: str
) -> None:
    total = sum(one.n for one in segments)
    middles = []
    for one in segments:
        if one.fate not in spans:
            continue
        low, high = spans[one.fate]
        ax.add_patch(Rectangle((x, low), _BAR, high - low, facecolor=one.colour, linewidth=0))
        middles.append((one, (low + high) / 2))
    at = 2.0
    for one, middle in middles:
        at = min(middle, at - _LEAST_APART)
        where = x - 0.02 if align == "right" else x + _BAR + 0.02
        ax.text(where, at + 0.005, one.fate, ha=align, va="bottom", size=9, weight="bold", color=INK)
        ax.text(where, at - 0.015, f"{count(round(one.n))} ({percent(one.n / total, 0)})", ha=align, va="top", size=8.4,
                color=MUTED)  # fmt: skip


def _ribbon(ax: Axes, left: tuple[float, float], right: tuple[float, float], colour: str, alpha: float) -> None:
    a, b = _LEFT + _BAR, _RIGHT - _BAR
    middle = (a + b) / 2
    points = [
        (a, left[1]), (middle, left[1]), (middle, right[1]), (b, right[1]),
        (b, right[0]), (middle, right[0]), (middle, left[0]), (a, left[0]), (a, left[1]),
    ]  # fmt: skip
    curve = Path.CURVE4
    codes = [Path.MOVETO, curve, curve, curve, Path.LINETO, curve, curve, curve, Path.CLOSEPOLY]
    ax.add_patch(PathPatch(Path(points, codes), facecolor=colour, alpha=alpha, linewidth=0))


def _ending(ax: Axes, span: tuple[float, float], start: float, end: float, colour: str) -> None:
    """A stream that thins out: no counterpart on the other side."""
    low, high = span
    middle, bend = (low + high) / 2, start + 0.6 * (end - start)
    points = [(start, high), (bend, high), (bend, middle), (end, middle), (bend, middle), (bend, low), (start, low),
              (start, high)]  # fmt: skip
    curve = Path.CURVE4
    codes = [Path.MOVETO, curve, curve, curve, curve, curve, curve, Path.CLOSEPOLY]
    ax.add_patch(PathPatch(Path(points, codes), facecolor=colour, alpha=0.35, linewidth=0))
