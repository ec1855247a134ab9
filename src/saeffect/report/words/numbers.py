"""Number formats of all sentences, tables, captions and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat, TypeGuard

import numpy as np
import pandas as pd

from saeffect.stats.estimate import Estimate

__all__ = [
    "LEVEL",
    "amount",
    "amount_interval",
    "bracketed",
    "count",
    "difference",
    "fixed",
    "has_interval",
    "interval",
    "is_defined",
    "is_true",
    "joined",
    "p_text",
    "p_value",
    "percent",
    "plural",
    "signed",
    "undefined",
]

MINUS = "\u2212"  # the typographic minus has the width of a digit; the hyphen has not
THIN_SPACE = "\u202f"  # narrow and no-break: the only space between a number and its unit
LEVEL = f"95{THIN_SPACE}% interval"


def is_defined(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number (not None, NaN, NA, text or infinite).

    Example:
        >>> is_defined(0), is_defined(float("nan")), is_defined(None)
        (True, False, False)
    """
    if type(value) is float:  # most are, and to ask for the protocol takes long
        return math.isfinite(value)
    return isinstance(value, SupportsFloat) and value is not pd.NA and math.isfinite(value)


def has_interval(row: Mapping[Any, Any] | pd.Series[Any]) -> bool:
    """Whether low and high of a row are numbers."""
    return is_defined(row["low"]) and is_defined(row["high"])


def is_true(value: object) -> bool:
    """Whether a cell holds True; False for missing ones."""
    return isinstance(value, bool | np.bool_) and bool(value)


def undefined(reason: str = "") -> str:
    """Text in place of an undefined number: "undefined" and the reason."""
    return f"undefined: {reason or 'no reason was recorded'}"


def fixed(value: SupportsFloat, digits: int = 3) -> str:
    """A number with fixed decimals, grouped thousands and a true minus sign; zero is never signed.

    Example:
        >>> fixed(-1234.5678, 2), fixed(-0.0001), fixed(float("nan"))
        ('−1,234.57', '0.000', 'unknown')
    """
    number = float(value)
    if not math.isfinite(number):
        return "unknown"
    text = f"{abs(number):,.{digits}f}"
    return text if number >= 0 or _is_zero(text) else MINUS + text


def _is_zero(text: str) -> bool:
    return not any(digit in "123456789" for digit in text)


def signed(value: SupportsFloat, digits: int = 3) -> str:
    """As `fixed`, with a plus sign before positive numbers: "+0.25", "−0.25", "0.0"."""
    text = fixed(value, digits)
    return "+" + text if float(value) > 0 and not _is_zero(text) else text


def count(value: SupportsFloat) -> str:
    """A whole number with grouped thousands."""
    return fixed(value, 0)


def plural(n: int, noun: str) -> str:
    """A number of things: "1 prompt", "1,200 texts"."""
    return f"{count(n)} {noun}{'' if n == 1 else 's'}"


def percent(share: SupportsFloat, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage; "unknown" for NaN.

    Example:
        >>> percent(0.9375).split()
        ['93.8', '%']
    """
    text = fixed(100 * float(share), digits)
    return text if text == "unknown" else f"{text}{THIN_SPACE}%"


def p_value(p: SupportsFloat) -> str:
    """A p or q value with three decimals, "< 0.001" below that.

    Example:
        >>> p_value(0.0312), p_value(0.00001)
        ('0.031', '< 0.001')
    """
    return "< 0.001" if float(p) < 0.001 else fixed(p, 3)


def p_text(p: SupportsFloat) -> str:
    """A p in a sentence: "p = 0.031", "p < 0.001"."""
    text = p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def interval(low: SupportsFloat, high: SupportsFloat, digits: int = 3) -> str:
    """Both ends of an interval in brackets: "[−0.10, 0.25]"."""
    return f"[{fixed(low, digits)}, {fixed(high, digits)}]"


_SCALES = {  # by unit: factor, digits, suffix
    "share": (100, 1, THIN_SPACE + "%"),
    "share of tokens": (100, 3, THIN_SPACE + "%"),
    "points": (100, 1, THIN_SPACE + "pp"),
    "points of tokens": (100, 3, THIN_SPACE + "pp"),
    "percent": (1, 1, THIN_SPACE + "%"),
    "%": (1, 1, THIN_SPACE + "%"),
    "ratio": (1, 2, "×"),
}


def amount(value: SupportsFloat, unit: str = "", *, sign: bool = False) -> str:
    """A number in its unit; `sign` puts a plus before positive values (not before ratios).

    `unit` is one of `_SCALES`, "features", "count" or "pairs"; any other gives about three figures.

    Example:
        >>> amount(0.25, "share", sign=True).split(), amount(12, "features"), amount(1.5, "ratio")
        (['+25.0', '%'], '12', '1.50×')
    """
    format_number = signed if sign and unit != "ratio" else fixed
    number = float(value)
    if unit in _SCALES:
        scale, digits, suffix = _SCALES[unit]
        return format_number(scale * number, digits) + suffix
    if unit in {"features", "count", "pairs"} or abs(number) >= 100:
        return format_number(number, 0 if number.is_integer() else 1)
    return format_number(number, 2 if abs(number) >= 10 else 3)


def amount_interval(low: SupportsFloat, high: SupportsFloat, unit: str = "") -> str:
    """Both ends of an interval, in the unit of the value beside it, which is not repeated.

    Example:
        >>> amount_interval(-0.1, 0.2, "share"), amount_interval(1.25, 2, "ratio")
        ('[−10.0, 20.0]', '[1.25, 2.00]')
    """
    ends = (amount(end, unit).rstrip("%px×").rstrip() for end in (low, high))
    return f"[{', '.join(ends)}]"


def difference(estimate: Estimate, unit: str, *, short: bool = False) -> str:
    """A difference with its interval; shares as percentage points, other units unnamed. `short` leaves out all words.

    Example:
        >>> difference(Estimate(0.031, 0.012, 0.05), "share").replace(LEVEL, "LEVEL")
        '+3.1 percentage points, LEVEL 1.2 to 5.0'
        >>> difference(Estimate(-0.02, -0.05, 0.01), "coherence", short=True)
        '−0.020, −0.050 to 0.010'
    """
    value, ends = _difference(estimate, unit, short=short)
    return f"{value}, {'' if short else LEVEL + ' '}{' to '.join(ends)}" if ends else f"{value}, without an interval"


def bracketed(estimate: Estimate, unit: str, *, full: bool = False) -> str:
    """A difference with its interval in brackets, shares as points; `full` adds the unit and "95 % interval".

    Example:
        >>> bracketed(Estimate(0.031, 0.012, 0.05), "share")
        '+3.1 [1.2, 5.0]'
    """
    value, ends = _difference(estimate, unit, short=not full)
    return f"{value}{', ' + LEVEL if full else ''} [{', '.join(ends)}]" if ends else f"{value}, without an interval"


def _difference(estimate: Estimate, unit: str, *, short: bool) -> tuple[str, tuple[str, ...]]:
    """The difference and its interval's ends; decimals give the interval's width two figures, at most 5."""
    scale, digits = (100.0, 1) if unit == "share" else (1.0, 3)
    width = scale * (estimate.high - estimate.low) if estimate.defined else 0.0
    if width > 0:
        digits = min(5, max(digits, 1 - math.floor(math.log10(width))))
    points = " percentage points" if unit == "share" and not short else ""
    ends = tuple(fixed(scale * end, digits) for end in (estimate.low, estimate.high)) if estimate.defined else ()
    return signed(scale * estimate.value, digits) + points, ends


def joined(parts: Sequence[str]) -> str:
    """A list in words: "3, 4 and 5"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
