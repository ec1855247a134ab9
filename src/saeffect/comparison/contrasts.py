"""Every number of one arm against the same number of another, with an interval and a p."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles, untested_reason
from saeffect.comparison.judgement import PRIMARY
from saeffect.comparison.quantities import QUANTITIES, Kind, Quantity
from saeffect.stats.arguments import FloatArray, Resampling
from saeffect.stats.bootstrap import Average, bootstrap_difference
from saeffect.stats.differences import cliffs_delta, clustered_difference, count_difference
from saeffect.stats.estimate import Estimate, undefined
from saeffect.stats.permutation import permutation_test
from saeffect.stats.proportions import newcombe_difference, risk_ratio

__all__ = ["ONE_SAE", "Contrast", "as_table", "compared_pairs", "contrasts", "pair_contrasts"]

_T = TypeVar("_T")
ONE_SAE = "one SAE on either side: the interval does not hold the noise of SAE training"
_BY_FEATURES = "bootstrap over features, permutation test"


@dataclass(frozen=True)
class Contrast:
    """One quantity in arm `a` and arm `b`; `estimate` is b against a, between `low` and `high` (95 %).

    `reason` says why a number is NaN, else ""; `saes_a` and `saes_b` count the SAEs of each side; `remark` says which
    noise the interval leaves out.
    """

    quantity: str
    label: str
    comparison: str
    a: str
    b: str
    value_a: float
    value_b: float
    estimate: float
    low: float
    high: float
    p: float
    method: str
    unit: str
    reason: str
    declared: bool = False
    saes_a: int = 1
    saes_b: int = 1
    remark: str = ONE_SAE

    @classmethod
    def from_estimate(cls, estimate: Estimate, **others: Any) -> Contrast:
        """The row of an estimate; `others` are the other fields."""
        value, low, high, p = map(float, (estimate.value, estimate.low, estimate.high, estimate.p))
        return cls(**{"estimate": value, "low": low, "high": high, "p": p, "reason": estimate.reason, **others})


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two arms and a quantity, with the arguments of its rows."""

    comparison: str
    a: ArmTables
    b: ArmTables
    quantity: Quantity
    min_matches: int
    resampling: Resampling
    cache: dict[Any, Any]  # what was read, by reader and arm

    def read(self) -> tuple[Any, Any]:
        return self._read(self.a), self._read(self.b)

    def _read(self, arm: ArmTables) -> Any:
        key = self.quantity.read, id(arm)
        if key not in self.cache:
            self.cache[key] = self.quantity.read(arm, self.min_matches)
        return self.cache[key]

    def values(self) -> tuple[float, float]:
        a, b = (self.quantity.value(data) for data in self.read())
        return a, b

    @property
    def name(self) -> str:
        """Name of its random streams."""
        return f"{self.quantity.name}|{self.a.name}|{self.b.name}"

    def row(self, values: tuple[float, float], estimate: Estimate, method: str) -> Contrast:
        return Contrast.from_estimate(
            estimate,
            quantity=self.quantity.name,
            label=self.quantity.label.format(min_matches=self.min_matches),
            comparison=self.comparison,
            a=self.a.name,
            b=self.b.name,
            value_a=float(values[0]),
            value_b=float(values[1]),
            method=method,
            unit=self.quantity.unit,
        )


def contrasts(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    *,
    min_matches: int,
    resampling: Resampling,
    tests: Sequence[str] = PRIMARY,
) -> pd.DataFrame:
    """All contrasts of a study, long form.

    One row per quantity and pair of arms, columns as the fields of `Contrast`. Shares and rates are from 0 to 1.
    """
    control, treatment, *placebos = [arms[name] for name in roles.ordered]
    cache: dict[Any, Any] = {}
    rows = [
        row
        for comparison, a, b in compared_pairs(control, treatment, placebos)
        for row in pair_contrasts(
            comparison, a, b, QUANTITIES.values(), min_matches=min_matches, resampling=resampling, cache=cache
        )
    ]
    return as_table(rows, tests)


def compared_pairs(control: _T, treatment: _T, placebos: Iterable[_T]) -> list[tuple[str, _T, _T]]:
    """Pairs to compare: treatment minus control; placebo minus control (the same model, another SAE: SAE noise); and
    treatment minus placebo, as the control cancels in (treatment - control) - (placebo - control).

    Example:
        >>> compared_pairs("base", "tuned", ["again"])[1:]
        [('retraining', 'base', 'again'), ('beyond retraining', 'again', 'tuned')]
    """
    pairs = [("fine-tuning", control, treatment)]
    for placebo in placebos:
        pairs += [("retraining", control, placebo), ("beyond retraining", placebo, treatment)]
    return pairs


def pair_contrasts(
    comparison: str,
    a: ArmTables,
    b: ArmTables,
    quantities: Iterable[Quantity],
    *,
    min_matches: int,
    resampling: Resampling,
    cache: dict[Any, Any] | None = None,
) -> list[Contrast]:
    """Quantities of arm `b` against arm `a`, as rows of one comparison; `cache` holds what was read of arms."""
    cache = {} if cache is None else cache
    return [
        row
        for quantity in quantities
        for row in _COMPARE[quantity.kind](_Pair(comparison, a, b, quantity, min_matches, resampling, cache))
    ]


def as_table(rows: Sequence[Contrast], tests: Sequence[str]) -> pd.DataFrame:
    """Rows as a table, those of the declared `tests` marked; a test of several SAEs counts as its quantity's."""
    marked = [replace(row, declared=row.quantity.removesuffix("_seeds") in tests) for row in rows]
    return pd.DataFrame([asdict(row) for row in marked], columns=[field.name for field in fields(Contrast)])


def _shares(pair: _Pair) -> list[Contrast]:
    """Difference and ratio of two proportions."""
    (k_a, n_a), (k_b, n_b) = pair.read()
    values = (k_a / n_a if n_a else math.nan, k_b / n_b if n_b else math.nan)
    if n_a and n_b:
        difference = newcombe_difference(k_a, n_a, k_b, n_b)
        ratio = risk_ratio(k_a, n_a, k_b, n_b)
        if not k_a:  # name the arm in the reason
            ratio = undefined(f"{pair.a.name} has none, so there is no ratio to it", n_a + n_b)
        ratio = replace(ratio, p=difference.p)
    else:
        arm = pair.b if n_a else pair.a
        untested = untested_reason(arm) if pair.quantity.steered else ""
        difference = ratio = undefined(untested or f"no feature to count in {arm.name}")
    row = pair.row(values, difference, "Newcombe interval, Fisher's exact test")
    ratio_row = pair.row(values, ratio, "log-ratio interval, Fisher's exact test")
    return [row, _derived(ratio_row, "_ratio", f"{row.label} (ratio)", "ratio")]


def _averages(pair: _Pair) -> list[Contrast]:
    """Difference of means or medians of one number a feature."""
    a, b = pair.read()
    statistic: Average = "median" if pair.quantity.kind == "median" else "mean"
    average = np.median if statistic == "median" else np.mean
    values = (float(average(a)) if len(a) else math.nan, float(average(b)) if len(b) else math.nan)
    if min(len(a), len(b)) < 2:
        estimate = undefined(_too_few(pair, a, b), len(a) + len(b), values[1] - values[0])
    else:
        resampling = pair.resampling
        seeds = [resampling.seed_for(pair.name, method) for method in ("bootstrap", "permutation")]
        estimate = bootstrap_difference(a, b, statistic, n_boot=resampling.n_boot, seed=seeds[0])
        n_permutations = resampling.n_permutations
        p = permutation_test(a, b, statistic=statistic, n_permutations=n_permutations, seed=seeds[1])
        estimate = replace(estimate, p=p)
    return [pair.row(values, estimate, _BY_FEATURES)]


def _mean_range(pair: _Pair) -> list[Contrast]:
    """The difference of the means, divided by the mean of the two ranges (Gupta & Sica 2024, Table 2)."""
    a, b = pair.read()
    # Uses the resamples of the mean (by its name), so that the two rows agree.
    name = f"{pair.quantity.name.rpartition('_')[0]}_mean"
    mean = _averages(replace(pair, quantity=replace(pair.quantity, name=name, kind="mean")))[0]
    scale = (float(np.ptp(a)) + float(np.ptp(b))) / 2 if len(a) and len(b) else 0.0
    if scale > 0:
        low, high = mean.low / scale, mean.high / scale
        estimate = Estimate(mean.estimate / scale, low, high, len(a) + len(b), mean.reason, mean.p)
    else:
        estimate = undefined("no range of coherence to divide by", len(a) + len(b))
    method = "mean difference and interval divided by the mean of the two ranges; p of the mean difference"
    return [pair.row((mean.value_a, mean.value_b), estimate, method)]


def _dominance(pair: _Pair) -> list[Contrast]:
    a, b = pair.read()
    values = (float(np.mean(a)) if len(a) else math.nan, float(np.mean(b)) if len(b) else math.nan)
    estimate = cliffs_delta(a, b, pair.resampling, pair.name)
    if min(len(a), len(b)) < 2:
        estimate = replace(estimate, reason=_too_few(pair, a, b))
    return [pair.row(values, estimate, "bootstrap over features, Mann-Whitney test")]


def _token_moments(pair: _Pair) -> list[Contrast]:
    """Mean or variance of several numbers a feature, and its change in %."""
    moment = pair.quantity.kind.removeprefix("token ")
    difference, change = clustered_difference(*pair.read(), moment, pair.resampling, pair.name)
    values, method = pair.values(), "cluster bootstrap by feature, permutation of features"
    row = pair.row(values, difference, method)
    return [row, _derived(pair.row(values, change, method), "_change", f"{row.label}, percentage change", "%")]


def _counts(pair: _Pair) -> list[Contrast]:
    difference = count_difference(*pair.read(), pair.resampling, pair.name)
    return [pair.row(pair.values(), difference, _BY_FEATURES)]


_COMPARE: dict[Kind, Callable[[_Pair], list[Contrast]]] = {
    "share": _shares,
    "mean": _averages,
    "median": _averages,
    "count mean": _counts,
    "token mean": _token_moments,
    "token variance": _token_moments,
    "mean range": _mean_range,
    "dominance": _dominance,
}


def _derived(row: Contrast, suffix: str, label: str, unit: str) -> Contrast:
    return replace(row, quantity=f"{row.quantity}{suffix}", label=label, unit=unit)


def _too_few(pair: _Pair, a: FloatArray, b: FloatArray) -> str:
    few = [f"{arm.name} has {len(values)}" for arm, values in ((pair.a, a), (pair.b, b)) if len(values) < 2]
    return f"needs two features with a value in each arm: {', '.join(few)}"
