"""Fates of features as flows, and features of the control's SAE that fire more after fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import NullLocator

from saeffect.comparison import Comparison
from saeffect.diffing.cross_activity import change_scores, fires_differently, most_changed
from saeffect.diffing.matched_null import ONE_PLACEBO
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    DASHED,
    INK,
    MUTED,
    ROLE_STYLES,
    Drawing,
    arm_styles,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.words.evidence import called_features
from saeffect.report.words.names import feature_names
from saeffect.report.words.numbers import count, fixed, has_interval, interval, is_defined, percent, signed

__all__ = ["cross_activity", "fates"]

_Counts = Mapping[tuple[str, str], Mapping[Any, Any]]  # by side and fate, a row of the fate counts
_Span = tuple[float, float]

_LEFT, _RIGHT, _BAR_WIDTH = 0.27, 0.73, 0.03  # outer edges of a flow's two bars, and their width
_GAP, _MIN_LABEL_GAP = 0.03, 0.19
_KEPT, _MOVED, _ABSORBED = "#b6c0ca", "#e69f00", "#56b4e9"
_EXCESSES = (("control", "gone"), ("treatment", "new"))

_DOMAIN, _OTHERS = "#009e73", "#9aa4ae"  # green as the domain's words in the lists
_LIMIT = 3.0  # log2; larger changes are drawn at the edge
_MAX_NAMES, _MIN_NAME_GAP = 3, 0.42


def fates(comparison: Comparison, context: ReportContext, *, measure: str) -> Drawing:
    """Two flows from the control's SAE: to the treatment's SAE, and to another SAE of the control's model."""
    counts = comparison.matches.fate_counts
    rows = counts[counts["measure"] == measure] if len(counts) else counts
    if rows.empty:
        raise Undefined("features were not matched by this measure.")
    if not rows["n_treatment"].notna().any():
        raise Undefined(f"{rows['reason'].iloc[0]}.")
    names = {style.role: safe_text(name, 16) for name, style in reversed(arm_styles(comparison).items())}
    control, treatment = names["control"], names["treatment"]
    by_fate = {(str(row["side"]), str(row["fate"])): row for row in rows.to_dict("records")}
    figure = new_figure(5.1)
    axes = figure.subplots(2, 1)
    _draw_flow(axes[0], by_fate, "treatment", f"Fine-tuning: {control} → {treatment}")
    _draw_flow(axes[1], by_fate, "placebo", f"SAE noise: {control} → another seed, same model")
    figure.supxlabel(_excess_label(by_fate), size=8.2, color=MUTED)
    called = called_features(rows)
    kept, gone = by_fate["control", "kept"], by_fate["control", "gone"]
    return Drawing(
        figure,
        "Left: the control's features. Right: those of the other SAE. Both flows are judged by the same rule, by "
        "similarity alone: kept ones match as well as features of two seeds do, gone and new ones match nothing "
        "better than unrelated features do. Only what the upper flow shows beyond the lower one can be credited to "
        f"fine-tuning: {_excess_sentence(by_fate)}. "
        + (
            f"Single features called so (q ≤ {context.alpha:g}): {called}."
            if called
            else f"No single feature can be called moved, gone, absorbed or new (q ≤ {context.alpha:g})."
        ),
        f"Of {count(gone['n_features'])} features of {control}, "
        f"{count(round(kept['n_treatment']))} are kept and {count(round(gone['n_treatment']))} gone in {treatment}; "
        f"in an SAE of another seed {count(round(kept['n_placebo']))} and {count(round(gone['n_placebo']))}.",
    )


def _excess_label(by_fate: _Counts) -> str:
    rows = [by_fate[key] for key in _EXCESSES if has_interval(by_fate[key])]
    parts = [f"{row['fate']} {signed(row['excess'], 0)} {interval(row['low'], row['high'], 0)}" for row in rows]
    return f"beyond SAE noise: {', '.join(parts)}" if parts else "excess over SAE noise: no interval"


def _excess_sentence(by_fate: _Counts) -> str:
    parts = []
    for side, fate in _EXCESSES:
        row = by_fate[side, fate]
        if not has_interval(row):
            parts.append(f"no interval for {fate} ones ({row['reason'] or 'no reason was recorded'})")
            continue
        excludes_zero = row["low"] > 0 or row["high"] < 0
        parts.append(
            f"{signed(row['excess'], 0)} {fate} (95 % interval {fixed(row['low'], 0)} to {fixed(row['high'], 0)}, "
            f"which {'excludes' if excludes_zero else 'includes'} zero)"
        )
    remark = f" ({ONE_PLACEBO})" if any(by_fate[key]["reason"] == ONE_PLACEBO for key in _EXCESSES) else ""
    return " and ".join(parts) + remark


class _Segment(NamedTuple):
    fate: str
    n: float
    colour: str
    span: _Span


def _draw_flow(ax: Axes, by_fate: _Counts, other: str, title: str) -> None:
    """One flow, from the control's features to those of the treatment or the placebo (`other`)."""

    def n(side: str, fate: str, column: str = f"n_{other}") -> float:
        value = by_fate[side, fate][column]
        return float(value) if is_defined(value) else 0.0

    from_colour, to_colour = ROLE_STYLES["control"].colour, ROLE_STYLES[other].colour
    absorbed = n("control", "absorbed", "called") if other == "treatment" else 0.0
    left = _segments(
        ("kept", n("control", "kept"), _KEPT),
        ("moved", n("control", "moved"), _MOVED),
        ("absorbed", absorbed, _ABSORBED),
        ("gone", max(0.0, n("control", "gone") - absorbed), from_colour),
    )
    right = _segments(
        ("kept", n("treatment", "kept"), _KEPT),
        ("moved", n("treatment", "moved"), _MOVED),
        ("new", n("treatment", "new"), to_colour),
    )
    for fate in ("kept", "moved"):
        if fate in left and fate in right:
            _draw_ribbon(ax, left[fate].span, right[fate].span, left[fate].colour, 0.45)
    if "absorbed" in left and "kept" in right:
        low, high = left["absorbed"].span
        foot = right["kept"].span[0]
        _draw_ribbon(ax, (low, high), (foot, foot + 0.6 * (high - low)), _ABSORBED, 0.7)
    if "gone" in left:
        _draw_taper(ax, left["gone"].span, _LEFT + _BAR_WIDTH, _LEFT + _BAR_WIDTH + 0.15, from_colour)
    if "new" in right:
        _draw_taper(ax, right["new"].span, _RIGHT - _BAR_WIDTH, _RIGHT - _BAR_WIDTH - 0.15, to_colour)
    _draw_bar(ax, _LEFT, list(left.values()), "right")
    _draw_bar(ax, _RIGHT - _BAR_WIDTH, list(right.values()), "left")
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    ax.set_axis_off()
    ax.set_title(title, size=8.8)


def _segments(*parts: tuple[str, float, str]) -> dict[str, _Segment]:
    shown = [part for part in parts if part[1] > 0]
    free = 1 - _GAP * max(0, len(shown) - 1)
    total = sum(n for _, n, _ in shown)
    segments, top = {}, 1.0
    for fate, n, colour in shown:
        height = free * n / total
        segments[fate] = _Segment(fate, n, colour, (top - height, top))
        top -= height + _GAP
    return segments


def _draw_bar(ax: Axes, x: float, segments: Sequence[_Segment], align: str) -> None:
    total = sum(segment.n for segment in segments)
    height = 2.0
    for fate, n, colour, (low, high) in segments:
        ax.add_patch(Rectangle((x, low), _BAR_WIDTH, high - low, facecolor=colour, linewidth=0))
        height = min((low + high) / 2, height - _MIN_LABEL_GAP)
        label_x = x - 0.02 if align == "right" else x + _BAR_WIDTH + 0.02
        ax.text(label_x, height + 0.005, fate, ha=align, va="bottom", size=9, weight="bold", color=INK)
        ax.text(label_x, height - 0.015, f"{count(round(n))} ({percent(n / total, 0)})", ha=align, va="top", size=8.4,
                color=MUTED)  # fmt: skip


def _draw_ribbon(ax: Axes, left: _Span, right: _Span, colour: str, alpha: float) -> None:
    a, b = _LEFT + _BAR_WIDTH, _RIGHT - _BAR_WIDTH
    middle = (a + b) / 2
    points = [
        (a, left[1]), (middle, left[1]), (middle, right[1]), (b, right[1]),
        (b, right[0]), (middle, right[0]), (middle, left[0]), (a, left[0]), (a, left[1]),
    ]  # fmt: skip
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    ax.add_patch(PathPatch(Path(points, codes), facecolor=colour, alpha=alpha, linewidth=0))


def _draw_taper(ax: Axes, span: _Span, start: float, end: float, colour: str) -> None:
    low, high = span
    middle, bend = (low + high) / 2, start + 0.6 * (end - start)
    points = [(start, high), (bend, high), (bend, middle), (end, middle), (bend, middle), (bend, low), (start, low),
              (start, high)]  # fmt: skip
    codes = [Path.MOVETO, *[Path.CURVE4] * 6, Path.CLOSEPOLY]
    ax.add_patch(PathPatch(Path(points, codes), facecolor=colour, alpha=0.35, linewidth=0))


def cross_activity(comparison: Comparison, context: ReportContext) -> Drawing:
    """Change of each feature against how much it fired before; domain features in colour."""
    cross = comparison.matches.cross_activity
    if cross.empty:
        raise Undefined("the control's SAE was not applied to the treatment's model.")
    rows = _in_both_models(cross, context.alpha)
    if rows.empty:
        raise Undefined("no feature of the control's SAE fires in both models on this text.")
    figure = new_figure(3.9)
    ax = figure.add_subplot()
    _draw_points(ax, rows[~rows["domain"]], _OTHERS, 1.6, 0.55)
    _draw_points(ax, rows[rows["domain"]], _DOMAIN, 3.4, 0.95)
    _name_most_changed(ax, rows, context)
    _set_axes(ax, rows, context)
    changed = rows[rows["significant"]]
    domain = changed[changed["domain"]]
    missing = int(((cross["mean_control"] > 0) | (cross["mean_treatment"] > 0)).sum()) - len(rows)
    beyond = int((rows["ratio"].abs() > _LIMIT).sum())
    nulls = ", and against null fine-tunes" if "q_nulls" in cross else ""
    has_table = len(most_changed(cross, alpha=context.alpha)) > 0
    return Drawing(
        figure,
        "Each dot is a feature of the control's SAE, applied to both models on the same text: to the right it "
        "fires more, above the line more strongly in the fine-tuned model. "
        f"Green: {context.domain} features. Filled: q ≤ {context.alpha:g} (signs flipped by row of text{nulls}); "
        "hollow: not. "
        + (f"Not drawn: {count(missing)} that fire in one model only. " if missing else "")
        + (f"On the edge: {count(beyond)} that changed more than 8×. " if beyond else "")
        + ("[[table:cross]] has the intervals of the most changed ones." if has_table else
           "No feature changed clearly enough to be listed."),
        f"{count((changed['ratio'] > 0).sum())} of {count(len(rows))} features fire more strongly in the fine-tuned "
        f"model and {count((changed['ratio'] < 0).sum())} more weakly; of the {count(rows['domain'].sum())} "
        f"{context.domain} features {count((domain['ratio'] > 0).sum())} and {count((domain['ratio'] < 0).sum())}.",
    )  # fmt: skip


def _in_both_models(cross: pd.DataFrame, alpha: float) -> pd.DataFrame:
    rows = cross[(cross["mean_control"] > 0) & (cross["mean_treatment"] > 0)]
    return pd.DataFrame(
        {
            "feature": rows["feature"],
            "level": np.log10(rows["mean_control"].to_numpy(dtype=float)),
            "ratio": np.log2((rows["mean_treatment"] / rows["mean_control"]).to_numpy(dtype=float)),
            "significant": fires_differently(rows, alpha).to_numpy(dtype=bool),
            "domain": rows["is_domain"].to_numpy(dtype=bool),
            "score": change_scores(rows),
        }
    ).reset_index(drop=True)


def _draw_points(ax: Axes, rows: pd.DataFrame, colour: str, size: float, alpha: float) -> None:
    # Overlapping dots are drawn once, to keep the page small.
    dots = rows.assign(x=(rows["level"] / 0.02).round(), y=(rows["ratio"] / 0.03).round())
    dots = dots.drop_duplicates(["x", "y", "significant"])
    for significant, face in ((False, "none"), (True, colour)):
        drawn = dots[dots["significant"] == significant]
        ax.plot(drawn["level"], drawn["ratio"].clip(-_LIMIT, _LIMIT), "o", color=colour, markerfacecolor=face,
                markersize=size, alpha=alpha, markeredgewidth=0.5)  # fmt: skip


def _name_most_changed(ax: Axes, rows: pd.DataFrame, context: ReportContext) -> None:
    domain = rows[rows["domain"] & rows["significant"]]
    words = feature_names(context.arm_of("control"), 2, longest=None, wanted=set(domain["feature"].astype(int)))
    label_heights: list[float] = []
    middle = float(rows["level"].median())
    for direction in (domain[domain["ratio"] > 0], domain[domain["ratio"] < 0]):
        n_named = 0
        for row in direction.sort_values("score", key=np.abs, ascending=False, kind="stable").itertuples():
            y = float(np.clip(row.ratio, -_LIMIT, _LIMIT))
            overlaps = any(abs(y - height) < _MIN_NAME_GAP for height in label_heights)
            if n_named == _MAX_NAMES or int(row.feature) not in words or overlaps:
                continue
            right = row.level > middle
            ax.annotate(safe_text(words[int(row.feature)], 24), (row.level, y), xytext=(-5 if right else 5, 0),
                        textcoords="offset points", ha="right" if right else "left", va="center", size=7.8, color=INK,
                        bbox={"facecolor": "#ffffff", "edgecolor": "none", "alpha": 0.75, "pad": 0.8})  # fmt: skip
            label_heights.append(y)
            n_named += 1


def _set_axes(ax: Axes, rows: pd.DataFrame, context: ReportContext) -> None:
    ax.axhline(0, **DASHED)
    reach = min(_LIMIT, max(1.0, float(rows["ratio"].abs().max()))) * 1.06
    ax.set_ylim(-reach, reach)
    ax.set_yticks(np.arange(-int(reach), int(reach) + 1))
    ax.yaxis.set_major_formatter(lambda value, _: f"{2.0**value:g}×")
    lowest, highest = float(rows["level"].min()), float(rows["level"].max())
    ax.set_xticks(np.arange(int(np.floor(lowest)), int(np.ceil(highest)) + 1))
    ax.set_xlim(lowest - 0.15, highest + 0.15)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{10.0**value:g}")
    ax.set_xlabel("activation per token before fine-tuning")
    ax.set_ylabel("after / before")
    ax.text(0.0, 1.02, f"● {safe_text(context.domain, 20)} features", transform=ax.transAxes, color=_DOMAIN, size=8.5)
    ax.text(1.0, 1.02, "● all others", transform=ax.transAxes, color=MUTED, size=8.5, ha="right")
    clean_axes(ax, grid="y")
