"""Numbers as a reader wants them: signed, with a unit, no more digits than the interval deserves."""

from __future__ import annotations

import math

from saeffect.comparison.judgement import Gap

__all__ = ["bracketed", "interval", "joined", "number", "percent", "whole"]

_MINUS = "\N{MINUS SIGN}"


def number(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with a true minus sign; "unknown" for NaN; never a signed zero.

    Example:
        >>> number(3.14159, 2, signed=True), number(-0.001, 1, signed=True), number(float("nan"), 1)
        ('+3.14', '0.0', 'unknown')
    """
    if not math.isfinite(value):
        return "unknown"
    text = f"{abs(value):,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return f"{_MINUS if value < 0 else '+' if signed else ''}{text}"


def whole(value: int) -> str:
    """A count with thousands separated.

    Example:
        >>> whole(4608)
        '4,608'
    """
    return f"{value:,d}"


def percent(share: float) -> str:
    """A share from 0 to 1 as a percentage, one decimal.

    Example:
        >>> percent(0.205)
        '20.5 %'
    """
    return f"{number(100 * share, 1)} %" if math.isfinite(share) else "unknown"


def interval(gap: Gap, *, short: bool = False) -> str:
    """A difference with its interval, in words.

    Args:
        gap: The difference; shares become percentage points, other units are left to the sentence around it.
        short: Leave out the unit and the words "95 % interval".

    Example:
        >>> interval(Gap("base", "tuned", 0.031, 0.012, 0.05, "share"))
        '+3.1 percentage points, 95 % interval 1.2 to 5.0'
        >>> interval(Gap("base", "tuned", -0.02, -0.05, 0.01, "coherence"), short=True)
        '\N{MINUS SIGN}0.020, \N{MINUS SIGN}0.050 to 0.010'
    """
    middle, low, high = _numbers(gap)
    unit = " percentage points" if gap.unit == "share" and not short else ""
    if not gap.defined:
        return f"{middle}{unit}, without an interval"
    return f"{middle}, {low} to {high}" if short else f"{middle}{unit}, 95 % interval {low} to {high}"


def bracketed(gap: Gap, *, full: bool = False) -> str:
    """A difference with its interval in brackets, as tables write it.

    Args:
        gap: The difference; shares become percentage points.
        full: With the unit and the words "95 % interval", for its first mention.

    Example:
        >>> bracketed(Gap("base", "tuned", 0.031, 0.012, 0.05, "share"))
        '+3.1 [1.2, 5.0]'
        >>> bracketed(Gap("base", "tuned", 0.031, 0.012, 0.05, "share"), full=True)
        '+3.1 percentage points, 95 % interval [1.2, 5.0]'
    """
    middle, low, high = _numbers(gap)
    unit = " percentage points" if gap.unit == "share" and full else ""
    if not gap.defined:
        return f"{middle}{unit}, without an interval"
    return f"{middle}{unit}{', 95 % interval' if full else ''} [{low}, {high}]"


def _numbers(gap: Gap) -> tuple[str, str, str]:
    """The difference and the ends of its interval, with the digits that its width deserves; shares in points."""
    scale, fewest = (100.0, 1) if gap.unit == "share" else (1.0, 3)
    digits = _digits(scale * (gap.high - gap.low), fewest) if gap.defined else fewest
    return (
        number(scale * gap.estimate, digits, signed=True),
        number(scale * gap.low, digits),
        number(scale * gap.high, digits),
    )


def joined(parts: list[str]) -> str:
    """A list in words.

    Example:
        >>> joined(["3", "4", "5"])
        '3, 4 and 5'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _digits(width: float, fewest: int) -> int:
    """Decimals that give the interval's width two figures, between `fewest` and 5."""
    if width <= 0:
        return fewest
    return min(5, max(fewest, 1 - math.floor(math.log10(width))))
