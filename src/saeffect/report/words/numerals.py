"""How numbers are written, in one place: the report, its captions and its figures all use these."""

from __future__ import annotations

import math
from typing import SupportsFloat, TypeGuard

__all__ = [
    "amount",
    "amount_interval",
    "count",
    "fixed",
    "interval",
    "is_defined",
    "p_value",
    "percent",
    "signed",
    "undefined",
]

MINUS = "\u2212"  # the typographic minus has the width of a digit; the hyphen has not
THIN_SPACE = "\u202f"


def is_defined(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number (None, NaN, NA and infinities are not).

    Example:
        >>> is_defined(0), is_defined(float("nan")), is_defined(None)
        (True, False, False)
    """
    if value is None or isinstance(value, str) or not isinstance(value, SupportsFloat):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def undefined(reason: str = "") -> str:
    """What stands where a number cannot: the word and the reason.

    Example:
        >>> undefined("no feature was tested")
        'undefined: no feature was tested'
    """
    return f"undefined: {reason}" if reason else "undefined: no reason was recorded"


def fixed(value: SupportsFloat, digits: int = 3) -> str:
    """A number with a fixed number of decimals, grouped thousands and a true minus sign.

    Example:
        >>> fixed(-1234.5678, 2)
        '−1,234.57'
        >>> fixed(-0.0001)
        '0.000'
    """
    number = float(value)
    text = f"{abs(number):,.{digits}f}"
    is_zero = not any(digit in "123456789" for digit in text)
    return text if number >= 0 or is_zero else MINUS + text


def signed(value: SupportsFloat, digits: int = 3) -> str:
    """As `fixed`, with a plus sign before what is above zero.

    Example:
        >>> signed(0.25, 2), signed(-0.25, 2), signed(0, 1)
        ('+0.25', '−0.25', '0.0')
    """
    text = fixed(value, digits)
    is_zero = not any(digit in "123456789" for digit in text)
    return text if float(value) < 0 or is_zero else "+" + text


def count(value: SupportsFloat) -> str:
    """A whole number with grouped thousands.

    Example:
        >>> count(24576)
        '24,576'
    """
    return fixed(value, 0)


def percent(share: SupportsFloat, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage.

    Example:
        >>> percent(0.9375).split()
        ['93.8', '%']
    """
    return fixed(100 * float(share), digits) + THIN_SPACE + "%"


def p_value(p: SupportsFloat) -> str:
    """A p or q value: three decimals, and never a bare zero.

    Example:
        >>> p_value(0.0312), p_value(0.00001)
        ('0.031', '< 0.001')
    """
    return "< 0.001" if float(p) < 0.001 else fixed(p, 3)


def interval(low: SupportsFloat, high: SupportsFloat, digits: int = 3) -> str:
    """Both ends of an interval in brackets.

    Example:
        >>> interval(-0.1, 0.25, 2)
        '[−0.10, 0.25]'
    """
    return f"[{fixed(low, digits)}, {fixed(high, digits)}]"


def _digits(*values: SupportsFloat) -> int:
    """Decimals that show about three figures of the largest of the values."""
    largest = max((abs(float(value)) for value in values), default=0.0)
    if largest >= 100:
        return 0 if all(float(value).is_integer() for value in values) else 1
    return 2 if largest >= 10 else 3


def amount(value: SupportsFloat, unit: str = "", *, sign: bool = False) -> str:
    """A number in its unit: shares as percentages, counts whole, ratios with a multiplication sign.

    Args:
        value: The number, in the unit itself (a share is between 0 and 1).
        unit: "share" (0 to 1), "points" (a difference of two shares), the same two "of tokens" (they are small, and
            get more digits), "ratio", "percent" or "%" (already times 100), "features", "count", "pairs", or
            anything else.
        sign: Write a plus sign before positive values (for differences).

    Example:
        >>> amount(0.25, "share", sign=True).split(), amount(12, "features"), amount(1.5, "ratio")
        (['+25.0', '%'], '12', '1.50×')
    """
    write = signed if sign else fixed
    number = float(value)
    if unit == "share":
        return write(100 * number, 1) + THIN_SPACE + "%"
    if unit == "share of tokens":
        return write(100 * number, 3) + THIN_SPACE + "%"
    if unit in {"points", "points of tokens"}:
        return write(100 * number, 1 if unit == "points" else 3) + THIN_SPACE + "pp"
    if unit in {"percent", "%"}:
        return write(number, 1) + THIN_SPACE + "%"
    if unit in {"features", "count", "pairs"}:
        return write(number, 0 if number.is_integer() else 1)
    if unit == "ratio":
        return fixed(number, 2) + "×"
    return write(number, _digits(number))


def amount_interval(low: SupportsFloat, high: SupportsFloat, unit: str = "") -> str:
    """Both ends of an interval, in the unit of the value beside it, which is not repeated.

    Example:
        >>> amount_interval(-0.1, 0.2, "share"), amount_interval(1.25, 2, "ratio")
        ('[−10.0, 20.0]', '[1.25, 2.00]')
    """
    ends = (amount(end, unit).rstrip("%px×").rstrip() for end in (low, high))
    return f"[{', '.join(ends)}]"
