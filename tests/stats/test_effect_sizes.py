from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from saeffect.errors import ShapeMismatch
from saeffect.stats import cliffs_delta, normalised_mean_difference


def test_delta_by_hand() -> None:
    assert cliffs_delta([1, 2], [3, 4]) == 1.0
    assert cliffs_delta([3, 4], [1, 2]) == -1.0
    assert cliffs_delta([1, 3], [2]) == 0.0
    assert cliffs_delta([1, 2, 2], [2, 3]) == pytest.approx((4 - 0) / 6)  # 4 wins, 2 ties


def test_delta_agrees_with_mann_whitney_and_turns_round() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 20, size=57), rng.integers(2, 25, size=31)  # with ties
    u = scipy.stats.mannwhitneyu(b, a).statistic
    assert cliffs_delta(a, b) == pytest.approx(2 * u / (57 * 31) - 1)
    assert cliffs_delta(b, a) == pytest.approx(-cliffs_delta(a, b))


def test_delta_does_not_depend_on_the_unit() -> None:
    a, b = np.array([1.0, 5.0, 2.0]), np.array([4.0, 3.0])
    assert cliffs_delta(a, b) == cliffs_delta(np.exp(a), np.exp(b))


def test_normalised_difference_by_hand() -> None:
    # Means 2 and 5, ranges 2 and 4: 3 over 3.
    assert normalised_mean_difference([1, 2, 3], [3, 5, 7]) == 1.0
    assert normalised_mean_difference([3, 5, 7], [1, 2, 3]) == -1.0
    assert normalised_mean_difference([1, 1], [2, 4]) == 2.0


def test_without_an_answer_they_are_nan_and_never_zero() -> None:
    for function in (cliffs_delta, normalised_mean_difference):
        assert math.isnan(function([], [1.0]))
        assert math.isnan(function([1.0, 2.0], []))
        assert math.isnan(function([1.0, math.nan], [1.0, 2.0]))
        assert math.isnan(function([1.0, 2.0], [1.0, math.inf]))
        with pytest.raises(ShapeMismatch):
            function([[1.0]], [1.0])
    assert math.isnan(normalised_mean_difference([1.0], [2.0]))
    assert math.isnan(normalised_mean_difference([1.0, 1.0], [2.0, 2.0]))
    assert cliffs_delta([1.0, 1.0], [1.0]) == 0.0
    assert cliffs_delta([1.0], [2.0]) == 1.0
