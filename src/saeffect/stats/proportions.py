"""Shares of successes, their differences and ratios (b against a), with intervals that hold for few trials too."""

from __future__ import annotations

import numpy as np

from saeffect.errors import Undefined
from saeffect.stats.arguments import check_level
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["newcombe_difference", "risk_ratio", "wilson"]


def wilson(k: int, n: int, level: float = 0.95) -> Estimate:
    """The share of `k` successes in `n` trials, 0 to 1, with Wilson's interval.

    The interval has a width even for 0 of n and n of n. NaN for no trials.
    Source: Wilson (1927), the score interval.

    Example:
        >>> print(wilson(5, 10))
        0.5 [0.2366, 0.7634] (n = 10)
    """
    from statsmodels.stats.proportion import proportion_confint  # takes a second, and few commands need it

    k, n = _counts(k, n, "k", "n")
    check_level(level)
    if n == 0:
        return undefined("there are no trials")
    low, high = proportion_confint(k, n, alpha=1 - level, method="wilson")
    # The exact ends for k = 0 and k = n are 0 and 1; rounding misses them by a last digit.
    return Estimate(k / n, float(low) if k else 0.0, float(high) if k < n else 1.0, n)


def newcombe_difference(k_a: int, n_a: int, k_b: int, n_b: int, level: float = 0.95) -> Estimate:
    """p_b - p_a, the difference of two shares: 0.1 is ten percentage points more in b.

    `k` counts successes, `n` trials; the groups are independent. n = n_a + n_b; p is two-sided, of Fisher's exact test.
    NaN when a group has no trials.
    Source: Newcombe (1998), method 10, which combines the Wilson intervals of both groups.

    Example:
        >>> print(newcombe_difference(48, 80, 56, 70))
        0.2 [0.05243, 0.3339] (n = 150)
    """
    from scipy.stats import fisher_exact
    from statsmodels.stats.proportion import confint_proportions_2indep

    (k_a, n_a), (k_b, n_b) = _counts(k_a, n_a, "k_a", "n_a"), _counts(k_b, n_b, "k_b", "n_b")
    check_level(level)
    if reason := _no_trials(n_a, n_b):
        return undefined(reason, n_a + n_b)
    low, high = confint_proportions_2indep(k_b, n_b, k_a, n_a, method="newcomb", compare="diff", alpha=1 - level)
    p = min(1.0, float(fisher_exact([[k_b, n_b - k_b], [k_a, n_a - k_a]]).pvalue))
    return Estimate(k_b / n_b - k_a / n_a, float(low), float(high), n_a + n_b, p=p)


def risk_ratio(k_a: int, n_a: int, k_b: int, n_b: int, level: float = 0.95) -> Estimate:
    """p_b / p_a, how many times as often b succeeds as a.

    `k` counts successes, `n` trials; the groups are independent. n = n_a + n_b. NaN when a group has no trials or a has
    no successes. No interval when b has no successes, or every trial of both groups succeeded.
    Source: Katz et al. (1978), the normal interval for the logarithm of the ratio.

    Example:
        >>> print(risk_ratio(10, 100, 20, 100))
        2 [0.9866, 4.054] (n = 200)
    """
    from statsmodels.stats.proportion import confint_proportions_2indep

    (k_a, n_a), (k_b, n_b) = _counts(k_a, n_a, "k_a", "n_a"), _counts(k_b, n_b, "k_b", "n_b")
    check_level(level)
    n = n_a + n_b
    reason = _no_trials(n_a, n_b) or ("a has no successes, so the ratio has no finite value" if k_a == 0 else "")
    if reason:
        return undefined(reason, n)
    ratio = (k_b / n_b) / (k_a / n_a)
    if k_b == 0:
        return undefined("b has no successes, and the interval needs at least one", n, ratio)
    if k_a == n_a and k_b == n_b:
        return undefined("every trial succeeded, so the standard error is zero", n, ratio)
    low, high = confint_proportions_2indep(k_b, n_b, k_a, n_a, method="log", compare="ratio", alpha=1 - level)
    return Estimate(ratio, float(low), float(high), n)


def _counts(k: int, n: int, name_k: str, name_n: str) -> tuple[int, int]:
    """Both counts as plain integers, so that large numpy ones cannot overflow in a product."""
    for name, count in ((name_k, k), (name_n, n)):
        whole = isinstance(count, int | np.integer) or (isinstance(count, float) and count.is_integer())
        if isinstance(count, bool | np.bool_) or not whole:
            raise Undefined(f"{name} must be a whole number, got {count!r}.", at=name)
    if not 0 <= k <= n:
        raise Undefined(
            f"{name_k} must lie between 0 and {name_n}, got {name_k}={k}, {name_n}={n}.",
            at=name_k,
            fix=f"{name_k} counts successes among {name_n} trials; is their order right?",
        )
    return int(k), int(n)


def _no_trials(n_a: int, n_b: int) -> str:
    empty = [name for name, n in (("a", n_a), ("b", n_b)) if n == 0]
    return f"there are no trials in {' and '.join(empty)}" if empty else ""
