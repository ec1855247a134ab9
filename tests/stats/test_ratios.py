from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import optimize, stats
from scipy.optimize import brentq

from saeffect.errors import ShapeMismatch
from saeffect.stats.student import fieller, mean_interval, ratio_of_means


def _draw(rng: np.random.Generator, n: int, *, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses of texts: skewed, unlike in size, and the part follows the whole only roughly."""
    whole = rng.gamma(2.0, 0.3, size=n) + rng.normal(0, 0.1, size=n)
    return share * whole + rng.normal(0, 0.08, size=n) * (1 + whole), whole


def test_by_hand() -> None:
    # Means 2 and 100, both with squared error 1 and covariance 1: (2 - 100 r)² = t² (1 - r)².
    t = stats.t.ppf(0.975, 1)
    found = ratio_of_means([1.0, 3.0], [99.0, 101.0])
    assert found.value == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx(((2 - t) / (100 - t), (2 + t) / (100 + t)))
    unclear = ratio_of_means([1.0, 3.0], [9.0, 11.0])  # 10 is less than t = 12.7 times its error
    assert math.isnan(unclear.value) and "the whole, 10 [-2.7" in unclear.reason


def test_the_ends_are_where_students_t_refutes() -> None:
    rng = np.random.default_rng(5)
    for n in (8, 12, 40):
        part, whole = _draw(rng, n, share=0.4)
        found = ratio_of_means(part, whole)

        def excess(ratio: float, part: np.ndarray = part, whole: np.ndarray = whole) -> float:
            return float(stats.ttest_1samp(part - ratio * whole, 0).pvalue) - 0.05

        assert found.low == pytest.approx(brentq(excess, found.value - 30, found.value), rel=1e-6)
        assert found.high == pytest.approx(brentq(excess, found.value, found.value + 30), rel=1e-6)
        assert found.p == pytest.approx(stats.ttest_1samp(part, 0).pvalue)
        assert found.n == n


def test_exact_parts_have_exact_intervals() -> None:
    whole = [2.0, 2.1, 2.3]
    assert (ratio_of_means(whole, whole).low, ratio_of_means(whole, whole).high) == (1.0, 1.0)
    nothing = ratio_of_means([0.0, 0.0, 0.0], whole)
    assert (nothing.value, nothing.low, nothing.high, nothing.p) == (0.0, 0.0, 0.0, 1.0)


def test_sign_of_the_whole_does_not_matter() -> None:
    part, whole = _draw(np.random.default_rng(1), 20, share=0.3)
    up, down = ratio_of_means(part, whole), ratio_of_means(-part, -whole)
    assert (up.value, up.low, up.high, up.p) == pytest.approx((down.value, down.low, down.high, down.p))


def test_what_cannot_be_said() -> None:
    assert ratio_of_means([], []).reason == "part: there are none"
    assert ratio_of_means([1.0], [2.0]).reason == "one unit shows no spread"
    assert "NaN" in ratio_of_means([1.0, math.nan], [1.0, 2.0]).reason
    unclear = ratio_of_means([1.0, 2.0, 3.0], [-1.0, 0.1, 1.0])
    assert math.isnan(unclear.value) and "is not clear of zero" in unclear.reason
    alike = ratio_of_means([1.0, 1.0], [2.0, 2.0])
    assert alike.value == 0.5 and not alike.defined and "equal" in alike.reason
    with pytest.raises(ShapeMismatch, match="one of each"):
        ratio_of_means([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    "studies", [400, pytest.param(4_000, marks=pytest.mark.simulation)], ids=["quick", "simulation"]
)
@pytest.mark.parametrize("n", [12, 32])
def test_the_interval_covers_the_truth(n: int, studies: int) -> None:
    rng = np.random.default_rng(n)
    found = [ratio_of_means(*_draw(rng, n, share=0.4)) for _ in range(studies)]
    covered = np.mean([one.low <= 0.4 <= one.high for one in found if one.defined])
    error = 3 * math.sqrt(0.05 * 0.95 / studies)
    assert np.mean([one.defined for one in found]) > 0.95
    assert 0.95 - error - 0.01 <= covered <= 0.95 + error + 0.01
    alarms = np.mean([ratio_of_means(*_draw(rng, n, share=0.0)).p < 0.05 for _ in range(studies)])
    assert alarms <= 0.05 + error + 0.01


# Ratios of sums over clusters.
Numbers = npt.NDArray[np.float64]


def _fieller(top: Numbers, bottom: Numbers) -> tuple[float, float]:
    """Of one ratio, from clusters `[n]`."""
    sums = ([top.sum()], [bottom.sum()])
    squares = ([(top**2).sum()], [(top * bottom).sum()], [(bottom**2).sum()])
    low, high = fieller(sums, squares, [len(top)])
    return float(low[0]), float(high[0])


def _clusters(seed: int, n: int, ratio: float) -> tuple[Numbers, Numbers]:
    generator = np.random.default_rng(seed)
    bottom = generator.normal(2.0, 1.0, n)
    return ratio * bottom + generator.normal(0.0, 1.0, n), bottom


def test_with_a_certain_denominator_it_is_students() -> None:
    top = np.array([1.0, 2.0, 3.0, 7.0])
    expected = mean_interval(top)
    assert _fieller(top, np.ones(4)) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("seed", range(4))
def test_interval_ends_are_where_t_test_rejects(seed: int) -> None:
    top, bottom = _clusters(seed, 9, 0.3)

    def p_less_five_percent(ratio: float) -> float:
        return float(stats.ttest_1samp(top - ratio * bottom, 0.0).pvalue) - 0.05

    middle = top.sum() / bottom.sum()
    low, high = _fieller(top, bottom)
    assert low == pytest.approx(optimize.brentq(p_less_five_percent, middle - 20, middle))
    assert high == pytest.approx(optimize.brentq(p_less_five_percent, middle, middle + 20))


def test_clusters_of_zeros_change_nothing() -> None:
    top, bottom = _clusters(1, 9, 0.3)
    sums = ([top.sum()], [bottom.sum()])
    squares = ([(top**2).sum()], [(top * bottom).sum()], [(bottom**2).sum()])
    both = fieller(sums, squares, [9]), _fieller(top, bottom)
    assert (float(both[0][0][0]), float(both[0][1][0])) == both[1]


def test_no_interval_where_any_ratio_is_possible() -> None:
    assert np.isnan(_fieller(np.array([1.0, 2.0]), np.array([1.0, -1.0]))).all()
    assert np.isnan(_fieller(np.array([1.0]), np.array([1.0]))).all()
    assert np.isnan(_fieller(np.zeros(3), np.zeros(3))).all()


def _coverage(n_studies: int, n: int) -> float:
    draws = (_clusters(seed, n, 0.3) for seed in range(n_studies))
    found = [_fieller(top, bottom) for top, bottom in draws]
    return float(np.mean([not (low > 0.3 or high < 0.3) for low, high in found]))


def test_coverage_in_brief() -> None:
    assert 0.9 < _coverage(300, 10) <= 1.0


@pytest.mark.simulation
@pytest.mark.parametrize("n", [4, 10, 40])
def test_coverage(n: int) -> None:
    # With few clusters some intervals are unbounded, and count as right.
    assert 0.942 < _coverage(8000, n) < 0.965
