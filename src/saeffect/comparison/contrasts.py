"""Every number of one arm against the same number of another, with an interval and a p.

Three comparisons are made. "fine-tuning" is treatment minus control. "retraining" is placebo minus
control: the same model, another SAE, hence what differs there is SAE noise. "beyond retraining" is what
fine-tuning did on top of that: (treatment - control) - (placebo - control). The control cancels, and
both brackets share it, so they are not independent: treatment is compared with placebo directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.judgement import PRIMARY
from saeffect.comparison.measures import untested_reason
from saeffect.comparison.quantities import QUANTITIES, Kind, Quantity
from saeffect.stats.arguments import FloatArray
from saeffect.stats.bootstrap import bootstrap_difference
from saeffect.stats.effect_sizes import cliffs_delta, normalised_mean_difference
from saeffect.stats.estimate import Estimate
from saeffect.stats.permutation import permutation_test
from saeffect.stats.proportions import fisher_exact, newcombe_difference, risk_ratio
from saeffect.stats.resampling import (
    LEVEL,
    Resampling,
    cliffs_delta_interval,
    compare_counts,
    compare_moment,
    undefined,
)

__all__ = ["COMPARISONS", "ONE_SAE", "Contrast", "as_table", "contrasts", "pair_contrasts"]

COMPARISONS = ("fine-tuning", "retraining", "beyond retraining")
ONE_SAE = "one SAE on either side: the interval does not hold the noise of SAE training"
_NAN = float("nan")
_BY_FEATURES = "bootstrap over features, permutation test"


@dataclass(frozen=True)
class Contrast:
    """One quantity in arm `a` and arm `b`; `estimate` is b against a, between `low` and `high` (95 %).

    `reason` says why an estimate, interval or p is NaN, and is empty where all are defined. `declared` says
    whether the study named the test beforehand; all else is exploration. `saes_a` and `saes_b` count the SAEs
    behind either side, and `remark` says what noise the interval does not hold.
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


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two arms and a quantity, and all that it takes to write its rows."""

    comparison: str
    a: ArmTables
    b: ArmTables
    quantity: Quantity
    min_matches: int
    resampling: Resampling

    def read(self) -> tuple[Any, Any]:
        return self.quantity.read(self.a, self.min_matches), self.quantity.read(self.b, self.min_matches)

    def seed(self, *what: str) -> int:
        return self.resampling.seed_for(f"{self.quantity.name}|{self.a.name}|{self.b.name}", *what)

    def row(self, values: tuple[float, float], estimate: Estimate, p: float, method: str) -> Contrast:
        return Contrast(
            quantity=self.quantity.name,
            label=self.quantity.label.format(min_matches=self.min_matches),
            comparison=self.comparison,
            a=self.a.name,
            b=self.b.name,
            value_a=float(values[0]),
            value_b=float(values[1]),
            estimate=float(estimate.value),
            low=float(estimate.low),
            high=float(estimate.high),
            p=float(p),
            method=method,
            unit=self.quantity.unit,
            reason=estimate.reason,
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

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        min_matches: Top tokens in the vocabulary that make a feature count under a projection.
        resampling: Seed and number of resamples.
        tests: Quantities that were declared beforehand.

    Returns:
        One row per quantity and pair of arms, columns as the fields of `Contrast`.
        Shares and rates are from 0 to 1.
    """
    treatment, control = arms[roles.treatment], arms[roles.control]
    pairs = [("fine-tuning", control, treatment)]
    for name in roles.placebos:
        pairs += [("retraining", control, arms[name]), ("beyond retraining", arms[name], treatment)]
    rows = [
        row
        for comparison, a, b in pairs
        for row in pair_contrasts(comparison, a, b, min_matches=min_matches, resampling=resampling)
    ]
    return as_table(rows, tests)


def pair_contrasts(
    comparison: str, a: ArmTables, b: ArmTables, *, min_matches: int, resampling: Resampling
) -> list[Contrast]:
    """Every quantity of arm `b` against arm `a`, as rows of one comparison."""
    return [
        row
        for quantity in QUANTITIES.values()
        for row in _COMPARE[quantity.kind](_Pair(comparison, a, b, quantity, min_matches, resampling))
    ]


def as_table(rows: Sequence[Contrast], tests: Sequence[str]) -> pd.DataFrame:
    """Rows as a table, those of the declared `tests` marked; a test of several SAEs counts as its quantity's."""
    marked = [replace(row, declared=row.quantity.removesuffix("_seeds") in tests) for row in rows]
    return pd.DataFrame([asdict(row) for row in marked], columns=[field.name for field in fields(Contrast)])


def _shares(pair: _Pair) -> list[Contrast]:
    """Difference and ratio of two proportions."""
    a, b = pair.read()
    values = (a[0] / a[1] if a[1] else _NAN, b[0] / b[1] if b[1] else _NAN)
    p = _NAN
    if a[1] and b[1]:
        difference, ratio = newcombe_difference(*a, *b, level=LEVEL), risk_ratio(*a, *b, level=LEVEL)
        if not a[0]:  # said with the arm's name
            ratio = undefined(f"{pair.a.name} has none, so there is no ratio to it", a[1] + b[1])
        p = fisher_exact(*a, *b).p
    else:
        arm = pair.b if a[1] else pair.a
        untested = untested_reason(arm) if pair.quantity.steered else ""
        difference = ratio = undefined(untested or f"no feature to count in {arm.name}")
    row = pair.row(values, difference, p, "Newcombe interval, Fisher's exact test")
    ratio_row = pair.row(values, ratio, p, "log-ratio interval, Fisher's exact test")
    return [row, _derived(ratio_row, "_ratio", f"{row.label} (ratio)", "ratio")]


def _averages(pair: _Pair) -> list[Contrast]:
    """Difference of means or medians of one number a feature."""
    a, b = pair.read()
    statistic = pair.quantity.kind
    values = [float(np.median(side) if statistic == "median" else np.mean(side)) if len(side) else _NAN
              for side in (a, b)]  # fmt: skip
    if min(len(a), len(b)) < 2:
        estimate, p = undefined(_too_few(pair, a, b), len(a) + len(b), values[1] - values[0]), _NAN
    else:
        n_boot, n_permutations = pair.resampling.n_boot, pair.resampling.n_permutations
        function = np.median if statistic == "median" else np.mean
        estimate = bootstrap_difference(a, b, function, n_boot=n_boot, level=LEVEL, seed=pair.seed("bootstrap"))
        p = permutation_test(a, b, statistic=statistic, n_permutations=n_permutations, seed=pair.seed("permutation")).p
    return [pair.row((values[0], values[1]), estimate, p, _BY_FEATURES)]


def _mean_range(pair: _Pair) -> list[Contrast]:
    """The difference of the means, divided by the mean of the two ranges (Gupta & Sica 2024, Table 2)."""
    a, b = pair.read()
    # Under the name of the mean it gets the resamples of the mean, so that the two rows agree.
    name = f"{pair.quantity.name.rpartition('_')[0]}_mean"
    means = _averages(replace(pair, quantity=replace(pair.quantity, name=name, kind="mean")))[0]
    scale = (float(np.ptp(a)) + float(np.ptp(b))) / 2 if len(a) and len(b) else 0.0
    if scale > 0:
        value = normalised_mean_difference(a, b)
        estimate = Estimate(value, means.low / scale, means.high / scale, len(a) + len(b), means.reason)
        p = means.p
    else:
        estimate, p = undefined("no range of coherence to divide by", len(a) + len(b)), _NAN
    method = "mean difference and interval divided by the mean of the two ranges; p of the mean difference"
    return [pair.row((means.value_a, means.value_b), estimate, p, method)]


def _dominance(pair: _Pair) -> list[Contrast]:
    a, b = pair.read()
    values = (float(np.mean(a)) if len(a) else _NAN, float(np.mean(b)) if len(b) else _NAN)
    if min(len(a), len(b)) >= 2:
        name = f"{pair.quantity.name}|{pair.a.name}|{pair.b.name}"
        estimate = cliffs_delta_interval(a, b, float(cliffs_delta(a, b)), pair.resampling, name)
        p = float(mannwhitneyu(a, b, alternative="two-sided").pvalue)
    else:
        estimate, p = undefined(_too_few(pair, a, b), len(a) + len(b)), _NAN
    return [pair.row(values, estimate, p, "bootstrap over features, Mann-Whitney test")]


def _token_moments(pair: _Pair) -> list[Contrast]:
    """Mean or variance of several numbers a feature, and its change in %."""
    a, b = pair.read()
    moment = pair.quantity.kind.removeprefix("token ")
    name = f"{pair.quantity.name}|{pair.a.name}|{pair.b.name}"
    found = compare_moment(a, b, moment, pair.resampling, name)
    values, method = (found.value_a, found.value_b), "cluster bootstrap by feature, permutation of features"
    row, change = pair.row(values, found.difference, found.p, method), pair.row(values, found.change, found.p, method)
    return [row, _derived(change, "_change", f"{row.label}, percentage change", "%")]


def _counts(pair: _Pair) -> list[Contrast]:
    name = f"{pair.quantity.name}|{pair.a.name}|{pair.b.name}"
    found = compare_counts(*pair.read(), pair.resampling, name)
    return [pair.row((found.value_a, found.value_b), found.difference, found.p, _BY_FEATURES)]


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
