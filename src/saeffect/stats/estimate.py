"""What a statistic answers with: an estimate with its interval, or a test with its p-value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

__all__ = ["Estimate", "TestResult"]


@dataclass(frozen=True)
class Estimate:
    """A number, and the range in which the true number plausibly lies.

    A 95 % interval is made so that, over many repeated studies, 95 of 100 such intervals hold the truth.

    Attributes:
        value: The estimate, in the unit of the data; NaN when the data do not define it.
        low: Lower end of the interval, same unit; NaN when there is no interval.
        high: Upper end of the interval, same unit; NaN when there is no interval.
        n: Independent units behind it: values, trials, items or clusters.
        reason: Why `value` or the interval is NaN; "" when all three are defined.

    Example:
        >>> print(Estimate(0.5, 0.25, 0.75, n=12))
        0.5 [0.25, 0.75] (n = 12)
        >>> print(Estimate(float("nan"), float("nan"), float("nan"), n=0, reason="values: there are none"))
        nan [nan, nan] (n = 0; values: there are none)
    """

    value: float
    low: float
    high: float
    n: int
    reason: str = ""

    def __str__(self) -> str:
        remark = f"; {self.reason}" if self.reason else ""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n}{remark})"


@dataclass(frozen=True)
class TestResult:
    """How surprising the data would be if there were nothing to find.

    `p` is the share of imaginary studies without any effect that would show at least as much as this one:
    0.5 is what a coin gives, 0.001 happens by luck once in a thousand studies.

    Attributes:
        statistic: What was compared with luck, in the unit of the data; NaN when undefined.
        p: Between 0 and 1; NaN when undefined.
        n: Values (or pairs, or trials) that went in.
        method: How `p` was found, in words.
        reason: Why `statistic` or `p` is NaN; "" when both are defined.

    Example:
        >>> print(TestResult(0.5, 0.0312, n=5, method="exact sign-flip test"))
        0.5, p = 0.0312 (n = 5, exact sign-flip test)
    """

    # pytest collects any class whose name begins with "Test" unless it is told not to.
    __test__: ClassVar[bool] = False

    statistic: float
    p: float
    n: int
    method: str
    reason: str = ""

    def __str__(self) -> str:
        remark = f"; {self.reason}" if self.reason else ""
        return f"{self.statistic:.4g}, p = {self.p:.4g} (n = {self.n}, {self.method}{remark})"
