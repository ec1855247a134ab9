"""Where a statistic has no value or no interval: its n, what is known of it, and the reason, case by case."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_ind

from saeffect.errors import ShapeMismatch
from saeffect.stats.agreement import cohens_kappa, krippendorff_alpha
from saeffect.stats.bootstrap import bootstrap, bootstrap_difference, cluster_bootstrap
from saeffect.stats.power import detectable_few_means
from saeffect.stats.proportions import newcombe_difference, risk_ratio, wilson

NAN = math.nan
CASES = {
    "no trials": (lambda: wilson(0, 0), 0, NAN, "no trials"),
    "no trials in one group": (lambda: newcombe_difference(1, 2, 0, 0), 2, NAN, "b"),
    "a ratio to nothing": (lambda: risk_ratio(0, 4, 1, 5), 9, NAN, "a"),
    "a ratio of nothing": (lambda: risk_ratio(2, 4, 0, 5), 9, 0.0, "b has no successes"),
    "every trial succeeded": (lambda: risk_ratio(4, 4, 5, 5), 9, 1.0, "every trial succeeded"),
    "no values": (lambda: bootstrap([]), 0, NAN, ""),
    "one value": (lambda: bootstrap([2.5]), 1, 2.5, "one value"),
    "equal values": (lambda: bootstrap([2.0, 2.0, 2.0]), 3, 2.0, "equal"),
    "NaN among the values": (lambda: bootstrap([1.0, NAN, 2.0]), 3, NAN, "NaN"),
    "NaN on one side": (lambda: bootstrap_difference([1.0, NAN], [2.0, 3.0]), 4, NAN, "NaN"),
    "one value on one side": (lambda: bootstrap_difference([1.0], [2.0, 4.0]), 3, 2.0, "a: one value"),
    "two constant sides": (lambda: bootstrap_difference([1.0, 1.0], [4.0, 4.0]), 4, 3.0, "neither a nor b varies"),
    "one cluster": (lambda: cluster_bootstrap([1.0, 3.0], ["x", "x"]), 1, 2.0, "cluster"),
    "alike clusters": (lambda: cluster_bootstrap([2.0, 2.0, 2.0], ["x", "y", "y"]), 2, 2.0, "equal"),
    "no items": (lambda: cohens_kappa([], []), 0, NAN, "no items"),
    "a label missing": (lambda: cohens_kappa(["yes", None], ["yes", "no"]), 2, NAN, "1 of 2 items"),
    "one label only": (lambda: cohens_kappa(["yes"] * 3, ["yes"] * 3), 3, NAN, "'yes'"),
    "full agreement": (lambda: cohens_kappa(["yes", "no"], ["yes", "no"]), 2, 1.0, "agree on everything"),
    "nothing rated twice": (lambda: krippendorff_alpha([["yes", None], [None, "no"]]), 0, NAN, "two ratings"),
}


@pytest.mark.parametrize("case", CASES)
def test_undefined_says_how_many_what_is_known_and_why(case: str) -> None:
    call, n, value, reason = CASES[case]
    found = call()
    assert found.n == n
    assert found.value == pytest.approx(value, nan_ok=True)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert reason in found.reason and found.reason


def test_unequal_lengths_name_the_argument() -> None:
    with pytest.raises(ShapeMismatch, match="2 values but 1 cluster labels") as caught:
        cluster_bootstrap([1.0, 2.0], ["x"])
    assert caught.value.at == "clusters"
    with pytest.raises(ShapeMismatch, match="got 2 and 1 labels") as caught:
        cohens_kappa(["yes", "no"], ["yes"])
    assert caught.value.at == "b"


@pytest.mark.parametrize(("n_a", "n_b", "alpha", "power"), [(3, 3, 0.05, 0.8), (6, 2, 0.05, 0.5), (4, 3, 0.017, 0.8)])
def test_few_means_are_found_as_often_by_scipys_tests(n_a: int, n_b: int, alpha: float, power: float) -> None:
    found = detectable_few_means(2.0, n_a, n_b, alpha=alpha, power=power)
    draws = 2.0 * np.random.default_rng(0).standard_normal((20_000, n_a + n_b))
    a, b = draws[:, :n_a], draws[:, n_a:] + found.difference
    p = np.maximum(ttest_ind(a, b, axis=1).pvalue, ttest_ind(a, b, axis=1, equal_var=False).pvalue)
    assert (p <= alpha).mean() == pytest.approx(power, abs=2e-4)
    assert (found.n, found.reason) == (min(n_a, n_b), "")


def test_single_value_uses_students_test() -> None:
    found = detectable_few_means(1.0, 4, 1)
    draws = np.random.default_rng(0).standard_normal((20_000, 5))
    pooled = draws[:, :4].var(axis=1, ddof=1) * (1 / 4 + 1)
    t = np.abs(draws[:, 4] + found.difference - draws[:, :4].mean(axis=1)) / np.sqrt(pooled)
    assert (t >= 3.182446305284263).mean() == pytest.approx(0.8, abs=2e-4)  # two-sided 5 % point, three degrees
