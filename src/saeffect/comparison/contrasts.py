"""Every number of one arm against the same number of another, with an interval and a p.

Three comparisons are made. "fine-tuning" is treatment minus control. "retraining" is placebo minus
control: the same model, another SAE, hence what differs there is SAE noise. "beyond retraining" is what
fine-tuning did on top of that: (treatment - control) - (placebo - control). The control cancels, and
both brackets share it, so they are not independent: treatment is compared with placebo directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.judgement import PRIMARY
from saeffect.comparison.measures import (
    FloatArray,
    activity_of,
    coherence_of,
    direct_effect_of,
    effect_of,
    match_counts_of,
    pass_counts,
    scale_count,
    untested_reason,
    weights_of,
)
from saeffect.stats.bootstrap import bootstrap_difference
from saeffect.stats.effect_sizes import cliffs_delta, normalised_mean_difference
from saeffect.stats.estimate import Estimate
from saeffect.stats.permutation import permutation_test
from saeffect.stats.proportions import fisher_exact, newcombe_difference, risk_ratio
from saeffect.stats.resampling import (
    LEVEL,
    Resampling,
    TwoSample,
    cliffs_delta_interval,
    compare_counts,
    compare_moment,
    undefined,
)

__all__ = ["COMPARISONS", "ONE_SAE", "QUANTITIES", "TESTABLE", "Contrast", "as_table", "contrasts", "pair_contrasts"]

COMPARISONS = ("fine-tuning", "retraining", "beyond retraining")
ONE_SAE = "one SAE on either side: the interval does not hold the noise of SAE training"
QUANTITIES = (
    *("domain_share", "domain_share_ratio", "share_dot", "share_dot_ratio", "share_cosine", "share_cosine_ratio"),
    *("pass_rate", "pass_rate_ratio", "paper_pass_rate", "paper_pass_rate_ratio"),
    *("coherence_mean", "coherence_median", "coherence_normalised", "coherence_delta"),
    *("weight_mean", "weight_mean_change", "weight_variance", "weight_variance_change"),
    *("density", "mean_activation", "matches_mean", "effect", "direct_effect"),
)
"""Every quantity that is compared, in the order of the table; more SAEs add `<quantity>_seeds`."""

TESTABLE = (*(name for name in QUANTITIES if not name.endswith("_ratio")), "fates", "cross_activity")
"""What a study can declare as a test. A ratio says what its difference says, around 1 instead of 0."""

_NAN = float("nan")
_STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}


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
    """Two arms, and all that it takes to write one row about them."""

    comparison: str
    a: ArmTables
    b: ArmTables
    min_matches: int
    resampling: Resampling

    def named(self, quantity: str) -> str:
        return f"{quantity}|{self.a.name}|{self.b.name}"

    def row(
        self,
        quantity: str,
        label: str,
        values: tuple[float, float],
        estimate: Estimate,
        p: float,
        method: str,
        unit: str,
    ) -> Contrast:
        return Contrast(
            quantity=quantity,
            label=label,
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
            unit=unit,
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
    pair = _Pair(comparison, a, b, min_matches, resampling)
    parts: tuple[Callable[[_Pair], list[Contrast]], ...] = (
        _domain_shares,
        _pass_rates,
        _coherence,
        _weights,
        _activity,
        _matches,
        _steering,
    )
    return [row for part in parts for row in part(pair)]


def as_table(rows: Sequence[Contrast], tests: Sequence[str]) -> pd.DataFrame:
    """Rows as a table, those of the declared `tests` marked; a test of several SAEs counts as its quantity's."""
    marked = [replace(row, declared=row.quantity.removesuffix("_seeds") in tests) for row in rows]
    return pd.DataFrame([asdict(row) for row in marked], columns=[field.name for field in fields(Contrast)])


def _domain_shares(pair: _Pair) -> list[Contrast]:
    a, b = pair.a, pair.b
    rows = _two_rows(
        pair,
        "domain_share",
        "Share of features that are domain features",
        (len(a.domain), a.n_features),
        (len(b.domain), b.n_features),
    )
    scales: tuple[tuple[Literal["dot", "cosine"], str], ...] = (("dot", "dot product"), ("cosine", "cosine"))
    for scale, words in scales:
        counts = [(scale_count(arm, scale, pair.min_matches), arm.n_features) for arm in (a, b)]
        label = f"Share of features with {pair.min_matches} or more vocabulary tokens, {words}"
        rows += _two_rows(pair, f"share_{scale}", label, counts[0], counts[1])
    return rows


def _pass_rates(pair: _Pair) -> list[Contrast]:
    a, b = pass_counts(pair.a), pass_counts(pair.b)
    ours = _two_rows(
        pair,
        "pass_rate",
        "Share of tested features that pass against placebo",
        (a.passed, a.tested),
        (b.passed, b.tested),
    )
    papers = _two_rows(
        pair,
        "paper_pass_rate",
        "Share of tested features that pass by the paper's rule",
        (a.paper_passed, a.paper_tested),
        (b.paper_passed, b.paper_tested),
    )
    return ours + papers


def _two_rows(pair: _Pair, quantity: str, label: str, a: tuple[int, int], b: tuple[int, int]) -> list[Contrast]:
    """Difference and ratio of two proportions, each given as (successes, trials)."""
    values = tuple(k / n if n else _NAN for k, n in (a, b))
    pair_values = (values[0], values[1])
    if not (a[1] and b[1]):
        arm = pair.b if a[1] else pair.a
        untested = untested_reason(arm) if quantity.endswith("pass_rate") else ""
        difference = ratio = undefined(untested or f"no feature to count in {arm.name}")
        p = _NAN
    else:
        difference = newcombe_difference(*a, *b, level=LEVEL)
        ratio = risk_ratio(*a, *b, level=LEVEL)
        if not a[0]:  # said with the arm's name
            ratio = undefined(f"{pair.a.name} has none, so there is no ratio to it", a[1] + b[1])
        p = fisher_exact(*a, *b).p
    return [
        pair.row(quantity, label, pair_values, difference, p, "Newcombe interval, Fisher's exact test", "share"),
        pair.row(
            f"{quantity}_ratio",
            f"{label} (ratio)",
            pair_values,
            ratio,
            p,
            "log-ratio interval, Fisher's exact test",
            "ratio",
        ),
    ]


def _coherence(pair: _Pair) -> list[Contrast]:
    a, b = coherence_of(pair.a), coherence_of(pair.b)
    means = _difference_row(pair, "coherence_mean", "Mean coherence of domain features", a, b, "mean", "coherence")
    medians = _difference_row(
        pair, "coherence_median", "Median coherence of domain features", a, b, "median", "coherence"
    )
    values = (means.value_a, means.value_b)
    ranges = (float(np.ptp(a)) if len(a) else 0.0, float(np.ptp(b)) if len(b) else 0.0)
    scale = sum(ranges) / 2
    if scale > 0 and len(a) and len(b):
        value = float(normalised_mean_difference(a, b))
        normalised = Estimate(value, means.low / scale, means.high / scale, len(a) + len(b), means.reason)
        p = means.p
    else:
        normalised, p = undefined("no range of coherence to divide by", len(a) + len(b)), _NAN
    rows = [means, medians]
    rows.append(
        pair.row(
            "coherence_normalised",
            "Normalised mean difference of coherence (the paper's)",
            values,
            normalised,
            p,
            "mean difference and interval divided by the mean of the two ranges; p of the mean difference",
            "mean range",
        )
    )
    if min(len(a), len(b)) >= 2:
        delta = cliffs_delta_interval(a, b, float(cliffs_delta(a, b)), pair.resampling, pair.named("coherence_delta"))
        p = float(mannwhitneyu(a, b, alternative="two-sided").pvalue)
    else:
        delta, p = undefined(_too_few(pair, a, b), len(a) + len(b)), _NAN
    method = "bootstrap over features, Mann-Whitney test"
    rows.append(pair.row("coherence_delta", "Cliff's delta of coherence", values, delta, p, method, "from -1 to 1"))
    return rows


def _weights(pair: _Pair) -> list[Contrast]:
    a, b = weights_of(pair.a), weights_of(pair.b)
    rows: list[Contrast] = []
    for moment in ("mean", "variance"):
        quantity = f"weight_{moment}"
        result = compare_moment(
            (a.weight, a.feature), (b.weight, b.feature), moment, pair.resampling, pair.named(quantity)
        )
        label = f"{moment.capitalize()} of the top-token weights (the paper's activations)"
        unit = "weight" if moment == "mean" else "weight squared"
        rows += _moment_rows(pair, quantity, label, result, unit)
    return rows


_ACTIVITY: tuple[tuple[Literal["density", "mean_activation"], str, str], ...] = (
    ("density", "Mean density of domain features", "share of tokens"),
    ("mean_activation", "Mean activation of domain features, where active", "activation"),
)


def _activity(pair: _Pair) -> list[Contrast]:
    return [
        _difference_row(pair, column, label, activity_of(pair.a, column), activity_of(pair.b, column), "mean", unit)
        for column, label, unit in _ACTIVITY
    ]


def _matches(pair: _Pair) -> list[Contrast]:
    result = compare_counts(
        match_counts_of(pair.a), match_counts_of(pair.b), pair.resampling, pair.named("matches_mean")
    )
    values = (result.value_a, result.value_b)
    method = "bootstrap over features, permutation test"
    label = "Mean number of top tokens in the vocabulary, all features"
    return [pair.row("matches_mean", label, values, result.difference, result.p, method, "tokens")]


def _steering(pair: _Pair) -> list[Contrast]:
    label, direct = "Mean effect of steering beyond placebo", "Mean direct effect beyond placebo"
    return [
        _difference_row(pair, "effect", label, effect_of(pair.a), effect_of(pair.b), "mean", "cosine similarity"),
        _difference_row(
            pair, "direct_effect", direct, direct_effect_of(pair.a), direct_effect_of(pair.b), "mean", "nats"
        ),
    ]


def _moment_rows(pair: _Pair, quantity: str, label: str, result: TwoSample, unit: str) -> list[Contrast]:
    values = (result.value_a, result.value_b)
    method = "cluster bootstrap by feature, permutation of features"
    change = f"{label}, percentage change"
    return [
        pair.row(quantity, label, values, result.difference, result.p, method, unit),
        pair.row(f"{quantity}_change", change, values, result.change, result.p, method, "%"),
    ]


def _difference_row(
    pair: _Pair, quantity: str, label: str, a: FloatArray, b: FloatArray, statistic: str, unit: str
) -> Contrast:
    """Difference of means or medians of one number a feature."""
    function = _STATISTICS[statistic]
    value_a, value_b = (float(function(values)) if len(values) else _NAN for values in (a, b))
    resampling, name = pair.resampling, pair.named(quantity)
    if min(len(a), len(b)) < 2:
        estimate, p = undefined(_too_few(pair, a, b), len(a) + len(b), value_b - value_a), _NAN
    else:
        estimate = bootstrap_difference(
            a, b, function, n_boot=resampling.n_boot, level=LEVEL, seed=resampling.seed_for(name, "bootstrap")
        )
        p = permutation_test(
            a,
            b,
            statistic="median" if statistic == "median" else "mean",
            alternative="two-sided",
            n_permutations=resampling.n_permutations,
            seed=resampling.seed_for(name, "permutation"),
        ).p
    method = "bootstrap over features, permutation test"
    return pair.row(quantity, label, (value_a, value_b), estimate, p, method, unit)


def _too_few(pair: _Pair, a: FloatArray, b: FloatArray) -> str:
    few = [f"{arm.name} has {len(values)}" for arm, values in ((pair.a, a), (pair.b, b)) if len(values) < 2]
    return f"needs two features with a value in each arm: {', '.join(few)}"
