"""A number with its interval, its p, and the reason why something of it is missing: what every statistic gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Estimate", "undefined"]


@dataclass(frozen=True)
class Estimate:
    """A number, and the range in which the true number plausibly lies.

    A 95 % interval is made so that, over many repeated studies, 95 of 100 such intervals hold the truth. `p` is the
    share of imaginary studies without any effect that would show at least as much as this one.

    Attributes:
        value: The estimate, in the unit of the data; NaN when the data do not define it.
        low: Lower end of the interval, same unit; NaN when there is no interval.
        high: Upper end of the interval, same unit; NaN when there is no interval.
        n: Independent units behind it: values, trials, items or clusters; 0 where nobody recorded it.
        reason: Why `value` or the interval is NaN; "" when all three are defined.
        p: For no effect, from 0 to 1; NaN where it was not tested or is undefined.

    Example:
        >>> print(Estimate(0.5, 0.25, 0.75, n=12))
        0.5 [0.25, 0.75] (n = 12)
        >>> print(Estimate(float("nan"), float("nan"), float("nan"), n=0, reason="values: there are none"))
        nan [nan, nan] (n = 0; values: there are none)
        >>> Estimate(-0.5, -0.75, -0.25).sign
        -1
    """

    value: float
    low: float
    high: float
    n: int = 0
    reason: str = ""
    p: float = math.nan

    @property
    def defined(self) -> bool:
        """Whether it has an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def sign(self) -> int:
        """1 or -1 when the interval lies wholly above or below zero, else 0."""
        if not self.defined:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def __str__(self) -> str:
        remark = f"; {self.reason}" if self.reason else ""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n}{remark})"


def undefined(reason: str, n: int = 0, value: float = math.nan) -> Estimate:
    """A number without an interval, or not even a number, and why.

    Example:
        >>> print(undefined("one value shows no spread", 1, 2.5))
        2.5 [nan, nan] (n = 1; one value shows no spread)
    """
    return Estimate(value, math.nan, math.nan, n, reason)
