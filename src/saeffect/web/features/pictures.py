"""Charts of a feature's page as coordinates: the template draws them, and CSS classes set their colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saeffect.report.words.numbers import fixed

__all__ = ["Chart", "Line", "Tick", "histogram", "line_chart"]

_WIDTH, _HEIGHT = 480.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 34.0


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: position and label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One line: SVG path, points, CSS class and title."""

    path: str
    points: tuple[tuple[float, float], ...]
    kind: str
    title: str


@dataclass(frozen=True)
class Chart:
    """A chart of `width` by `height`; the axes cross at `left`, `base`. `text` is its text alternative."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    text: str
    zero: float | None = None
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    top: float = _TOP
    base: float = _HEIGHT - _BOTTOM


def histogram(sides: Sequence[tuple[str, str, Sequence[int]]], top: float) -> Chart | None:
    """Activations above 0 of one or two models, tokens on a logarithmic scale; None if there are none.

    `sides` are class, title and counts of bars of equal width from 0 to `top`.
    """
    n_bars = max((i + 1 for _, _, counts in sides for i, count in enumerate(counts) if count), default=0)
    if not n_bars or top <= 0:
        return None
    edge = top * n_bars / len(sides[0][2])
    highest = max(max(counts) for _, _, counts in sides)
    decades = max(1, math.ceil(math.log10(highest + 1)))

    def x(share: float) -> float:
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(count: float) -> float:
        height = math.log10(count + 1) / math.log10(10**decades + 1)
        return round(_HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM), 1)

    lines = []
    for kind, title, counts in sides:
        steps = [f"M{x(0)} {y(0)}"]
        for i in range(n_bars):
            steps.append(f"V{y(counts[i])}H{x((i + 1) / n_bars)}")
        lines.append(Line("".join([*steps, f"V{y(0)}"]), (), kind, title))
    totals = "; ".join(f"{title}: active on {sum(counts):,} tokens" for _, title, counts in sides)
    return Chart(
        lines=tuple(lines),
        x_ticks=tuple(Tick(x(share), _number_text(edge * share)) for share in (0, 0.25, 0.5, 0.75, 1)),
        y_ticks=tuple(Tick(y(10**k), f"{10**k:,}") for k in range(decades + 1) if k in (0, decades) or decades < 5),
        x_title="activation",
        y_title="tokens",
        text=f"{totals}. Activations up to {_number_text(edge)}.",
    )


def line_chart(
    series: Mapping[tuple[str, str], Sequence[tuple[float, float]]], *, x_title: str, y_title: str
) -> Chart | None:
    """Lines over a common scale; `series` are (x, y) by class and title. None without a finite point."""
    finite = {
        name: sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
        for name, points in series.items()
    }
    points = [point for line in finite.values() for point in line]
    if not points:
        return None
    low, high = min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points))
    step = _step(high - low or 1.0)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    high = high if high > low else low + step
    x_values = sorted({x for x, _ in points})
    first, last = 0.0, x_values[-1] or 1.0

    def to_pixels(point: tuple[float, float]) -> tuple[float, float]:
        across = _LEFT + 8 + (point[0] - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT - 16)
        up = (point[1] - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    lines = []
    for (kind, title), line in finite.items():
        marks = tuple(to_pixels(point) for point in line)
        path = "M" + "L".join(f"{a} {b}" for a, b in marks) if marks else ""
        lines.append(Line(path, marks, kind, title))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    y_ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    values_text = "; ".join(
        f"{title}: " + ", ".join(f"{fixed(y, digits + 1)} at {x:g}" for x, y in finite[kind, title])
        for kind, title in finite
    )
    return Chart(
        lines=tuple(lines),
        x_ticks=tuple(Tick(to_pixels((x, low))[0], f"{x:g}") for x in x_values),
        y_ticks=tuple(Tick(to_pixels((first, y))[1], fixed(y, digits)) for y in y_ticks),
        x_title=x_title,
        y_title=y_title,
        text=f"{y_title} by {x_title}. {values_text}.",
        zero=to_pixels((first, 0.0))[1] if low < 0 else None,
    )


def _step(span: float) -> float:
    """A round distance between axis marks, so that two to five fit."""
    size = 10 ** math.floor(math.log10(span / 2))
    return float(next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 5))


def _number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
