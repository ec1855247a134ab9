"""A number with its interval, its p, and the reason why any of them is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Estimate", "NanEqual", "undefined"]


class NanEqual:
    """For dataclasses made with `eq=False`: equal where all fields are, and NaN equals NaN."""

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._fields())

    def _fields(self) -> tuple[Any, ...]:
        return tuple(
            "NaN" if isinstance(value, float) and math.isnan(value) else value for value in vars(self).values()
        )


@dataclass(frozen=True, eq=False)
class Estimate(NanEqual):
    """A number with its confidence interval.

    Attributes:
        value: In the unit of the data, as are `low` and `high`; NaN when the data do not define it.
        low: End of the interval, as `high`; NaN when there is none.
        n: Number of independent units: values, trials, items or clusters; 0 where not recorded.
        reason: Why `value` or the interval is NaN; "" when all three are defined.
        p: For no effect, 0 to 1; NaN where it was not tested or is undefined.

    Example:
        >>> print(Estimate(0.5, 0.25, 0.75, n=12))
        0.5 [0.25, 0.75] (n = 12)
        >>> print(Estimate(float("nan"), float("nan"), float("nan"), n=0, reason="values: there are none"))
        nan [nan, nan] (n = 0; values: there are none)
        >>> Estimate(-0.5, -0.75, -0.25).sign
        -1
        >>> undefined("there are none") == undefined("there are none")
        True
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
    """An estimate without an interval, or without a value too, and why.

    Example:
        >>> print(undefined("one value shows no spread", 1, 2.5))
        2.5 [nan, nan] (n = 1; one value shows no spread)
    """
    return Estimate(value, math.nan, math.nan, n, reason)
