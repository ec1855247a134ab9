from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from saeffect.errors import ShapeMismatch, Undefined
from saeffect.stats.proportions import (
    bounded_mean,
    newcombe_difference,
    paired_difference,
    risk_ratio,
    sum_of_independent,
    wilson,
)

TABLES = [(48, 80, 56, 70), (0, 10, 3, 10), (10, 10, 3, 12), (1, 7, 1, 30), (5, 9, 9, 9), (0, 4, 5, 5)]


def test_wilson_by_hand() -> None:
    # z = 1.96: centre (0.5 + 0.19208) / 1.38416, half width 1.96 * sqrt(0.025 + 0.009604) / 1.38416.
    interval = wilson(5, 10)
    assert interval.value == 0.5
    assert interval.low == pytest.approx(0.2366, abs=5e-5)
    assert interval.high == pytest.approx(0.7634, abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (101, 4608)])
def test_wilson_agrees_with_statsmodels(k: int, n: int) -> None:
    interval = wilson(k, n)
    theirs = proportion_confint(k, n, alpha=0.05, method="wilson")
    assert (interval.low, interval.high) == pytest.approx(theirs, abs=1e-12)


def test_wilson_reaches_its_ends_exactly() -> None:
    for n in range(1, 60):
        assert wilson(0, n).low == 0.0
        assert wilson(n, n).high == 1.0
        assert 0.0 < wilson(0, n).high < 1.0


def test_wilson_covers_as_it_says() -> None:
    # No simulation: add up the binomial probabilities of the counts whose interval holds the truth.
    n = 30
    intervals = [wilson(k, n) for k in range(n + 1)]
    truths = np.linspace(0.05, 0.95, 91)
    coverage = [
        sum(
            scipy.stats.binom.pmf(k, n, truth)
            for k, interval in enumerate(intervals)
            if interval.low <= truth <= interval.high
        )
        for truth in truths
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.90


def test_newcombe_by_hand() -> None:
    # Newcombe (1998), table II, example (a): 56/70 against 48/80.
    interval = newcombe_difference(48, 80, 56, 70)
    assert interval.value == pytest.approx(0.2)
    assert interval.low == pytest.approx(0.0524, abs=5e-5)
    assert interval.high == pytest.approx(0.3339, abs=5e-5)
    assert interval.n == 150


@pytest.mark.parametrize("table", TABLES)
def test_newcombe_agrees_with_statsmodels(table: tuple[int, int, int, int]) -> None:
    k_a, n_a, k_b, n_b = table
    interval = newcombe_difference(*table)
    theirs = confint_proportions_2indep(k_b, n_b, k_a, n_a, method="newcomb", compare="diff", alpha=0.05)
    assert (interval.low, interval.high) == pytest.approx(theirs, abs=1e-12)
    assert interval.low <= interval.value <= interval.high


def test_newcombe_turns_round_with_the_groups() -> None:
    there, back = newcombe_difference(3, 20, 9, 15), newcombe_difference(9, 15, 3, 20)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


@pytest.mark.parametrize(("p_a", "p_b"), [(0.3, 0.6), (0.1, 0.1), (0.5, 0.9)])
def test_newcombe_covers_as_it_says(p_a: float, p_b: float) -> None:
    n_a, n_b = 8, 10
    coverage = 0.0
    for k_a, k_b in itertools.product(range(n_a + 1), range(n_b + 1)):
        interval = newcombe_difference(k_a, n_a, k_b, n_b)
        if interval.low <= p_b - p_a <= interval.high:
            coverage += scipy.stats.binom.pmf(k_a, n_a, p_a) * scipy.stats.binom.pmf(k_b, n_b, p_b)
    assert 0.93 < coverage <= 0.995


def test_risk_ratio_by_hand() -> None:
    # log 2 -+ 1.96 * sqrt(1/10 - 1/100 + 1/20 - 1/100) = log 2 -+ 1.96 * 0.36056.
    interval = risk_ratio(10, 100, 20, 100)
    assert interval.value == 2.0
    assert math.log(interval.low) == pytest.approx(math.log(2) - 1.959964 * math.sqrt(0.13), abs=1e-6)
    assert math.log(interval.high) == pytest.approx(math.log(2) + 1.959964 * math.sqrt(0.13), abs=1e-6)


@pytest.mark.parametrize("table", [(48, 80, 56, 70), (10, 10, 3, 12), (1, 7, 1, 30)])
def test_risk_ratio_agrees_with_statsmodels(table: tuple[int, int, int, int]) -> None:
    k_a, n_a, k_b, n_b = table
    interval = risk_ratio(*table)
    theirs = confint_proportions_2indep(k_b, n_b, k_a, n_a, method="log", compare="ratio")
    assert (interval.low, interval.high) == pytest.approx(theirs)


def test_risk_ratios_without_an_answer_say_why() -> None:
    assert risk_ratio(0, 5, 2, 5).reason == "a has no successes, so the ratio has no finite value"
    assert math.isnan(risk_ratio(0, 5, 2, 5).value)
    assert risk_ratio(2, 5, 0, 5).value == 0.0
    assert risk_ratio(2, 5, 0, 5).reason == "b has no successes, and the interval needs at least one"
    assert risk_ratio(5, 5, 4, 4).value == 1.0
    assert "standard error is zero" in risk_ratio(5, 5, 4, 4).reason
    assert risk_ratio(0, 0, 0, 0).reason == "there are no trials in a and b"


def test_fisher_by_hand() -> None:
    # 3 of 4 against 1 of 4: of the 70 ways to choose 4 of 8, 16 + 1 are as good, and as many the other way.
    assert newcombe_difference(1, 4, 3, 4).p == pytest.approx(34 / 70)
    assert newcombe_difference(0, 3, 0, 3).p == 1.0


@pytest.mark.parametrize("table", TABLES)
def test_fisher_sums_tables_no_more_likely(table: tuple[int, int, int, int]) -> None:
    k_a, n_a, k_b, n_b = table
    chances = scipy.stats.hypergeom(n_a + n_b, k_a + k_b, n_b).pmf(np.arange(n_b + 1))
    p = chances[chances <= chances[k_b] * (1 + 1e-7)].sum()
    assert newcombe_difference(*table).p == pytest.approx(p)


def test_no_trials_have_no_share() -> None:
    assert wilson(0, 0).reason == "there are no trials"
    assert math.isnan(wilson(0, 0).value)
    assert newcombe_difference(0, 0, 1, 2).reason == "there are no trials in a"
    assert math.isnan(newcombe_difference(1, 2, 0, 0).low)
    assert math.isnan(newcombe_difference(0, 0, 1, 2).p)
    assert newcombe_difference(1, 2, 0, 0).reason == "there are no trials in b"


def test_counts_of_numpy_and_whole_floats_are_read() -> None:
    assert wilson(np.int64(5), np.int32(10)) == wilson(5, 10)  # type: ignore[arg-type]
    assert wilson(5.0, 10.0) == wilson(5, 10)  # type: ignore[arg-type]
    narrow = np.array([60_000, 120_000, 30_000, 120_000], dtype=np.int32)  # the products overflow 32 bits
    assert newcombe_difference(*narrow) == newcombe_difference(60_000, 120_000, 30_000, 120_000)


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 2), (0.5, 2), (math.nan, 2), (True, 2), ("1", 2), (1, math.inf)])
def test_impossible_counts_are_refused(k: object, n: object) -> None:
    with pytest.raises(Undefined):
        wilson(k, n)  # type: ignore[arg-type]
    with pytest.raises(Undefined):
        newcombe_difference(k, n, 1, 2)  # type: ignore[arg-type]
    with pytest.raises(Undefined, match="_b"):
        risk_ratio(1, 2, k, n)  # type: ignore[arg-type]


def test_paired_difference_as_published() -> None:
    # Newcombe (1998), Statistics in Medicine 17, 2635-2650, table II: 36, 12, 2 and 0 pairs, method 10.
    a = [1] * 36 + [0] * 12 + [1] * 2
    b = [1] * 36 + [1] * 12 + [0] * 2
    found = paired_difference(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    assert found.p == pytest.approx(float(scipy.stats.binomtest(2, 14).pvalue))
    back = paired_difference(b, a)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_paired_difference_of_equal_answers_has_a_width() -> None:
    found = paired_difference([1, 1, 1, 1], [1, 1, 1, 1])
    assert found.low < found.value == 0 < found.high
    assert found.p == 1
    assert paired_difference([], []).reason == "there are no items"
    with pytest.raises(Undefined, match="zeros and ones"):
        paired_difference([0.5], [1])
    with pytest.raises(ShapeMismatch, match="same items"):
        paired_difference([1], [1, 0])


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 7), (20, 20)])
def test_bounded_mean_of_zeros_and_ones_is_wilsons(k: int, n: int) -> None:
    found, theirs = bounded_mean([1] * k + [0] * (n - k)), wilson(k, n)
    assert (found.value, found.low, found.high, found.n) == pytest.approx(
        (theirs.value, theirs.low, theirs.high, n), abs=1e-12
    )
    with pytest.raises(Undefined, match="between 0 and 1"):
        bounded_mean([1.5])


def test_a_difference_of_independent_shares_is_newcombes() -> None:
    theirs = newcombe_difference(48, 80, 56, 70)
    parts = [wilson(48, 80), wilson(56, 70)]
    found = sum_of_independent(parts, [-1.0, 1.0])
    assert (found.value, found.low, found.high) == pytest.approx((theirs.value, theirs.low, theirs.high))
    assert not sum_of_independent([wilson(0, 0), parts[0]], [1.0, 1.0]).defined
