from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import optimize, stats

from saeffect.stats.ratio import fieller
from saeffect.stats.student import mean_interval

Numbers = npt.NDArray[np.float64]


def _interval(top: Numbers, bottom: Numbers) -> tuple[float, float]:
    """Of one ratio, from clusters `[n]`."""
    sums = ([top.sum()], [bottom.sum()])
    squares = ([(top**2).sum()], [(top * bottom).sum()], [(bottom**2).sum()])
    low, high = fieller(sums, squares, [len(top)])
    return float(low[0]), float(high[0])


def _draw(seed: int, n: int, ratio: float) -> tuple[Numbers, Numbers]:
    generator = np.random.default_rng(seed)
    bottom = generator.normal(2.0, 1.0, n)
    return ratio * bottom + generator.normal(0.0, 1.0, n), bottom


def test_with_a_certain_denominator_it_is_students() -> None:
    top = np.array([1.0, 2.0, 3.0, 7.0])
    expected = mean_interval(top)
    assert _interval(top, np.ones(4)) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("seed", range(4))
def test_its_ends_are_the_ratios_that_a_t_test_just_keeps(seed: int) -> None:
    top, bottom = _draw(seed, 9, 0.3)

    def p_less_five_percent(ratio: float) -> float:
        return float(stats.ttest_1samp(top - ratio * bottom, 0.0).pvalue) - 0.05

    middle = top.sum() / bottom.sum()
    low, high = _interval(top, bottom)
    assert low == pytest.approx(optimize.brentq(p_less_five_percent, middle - 20, middle))
    assert high == pytest.approx(optimize.brentq(p_less_five_percent, middle, middle + 20))


def test_clusters_of_zeros_change_nothing() -> None:
    top, bottom = _draw(1, 9, 0.3)
    sums = ([top.sum()], [bottom.sum()])
    squares = ([(top**2).sum()], [(top * bottom).sum()], [(bottom**2).sum()])
    both = fieller(sums, squares, [9]), _interval(top, bottom)
    assert (float(both[0][0][0]), float(both[0][1][0])) == both[1]


def test_no_interval_where_any_ratio_is_possible() -> None:
    assert np.isnan(_interval(np.array([1.0, 2.0]), np.array([1.0, -1.0]))).all()
    assert np.isnan(_interval(np.array([1.0]), np.array([1.0]))).all()
    assert np.isnan(_interval(np.zeros(3), np.zeros(3))).all()


def _coverage(n_studies: int, n: int) -> float:
    draws = (_draw(seed, n, 0.3) for seed in range(n_studies))
    found = [_interval(top, bottom) for top, bottom in draws]
    return float(np.mean([not (low > 0.3 or high < 0.3) for low, high in found]))


def test_coverage_in_brief() -> None:
    assert 0.9 < _coverage(300, 10) <= 1.0


@pytest.mark.simulation
@pytest.mark.parametrize("n", [4, 10, 40])
def test_coverage(n: int) -> None:
    # With few clusters some intervals are unbounded, and count as right.
    assert 0.942 < _coverage(8000, n) < 0.965
