"""Means over features and prompts crossed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp, ttest_ind

from saeffect.errors import ShapeMismatch
from saeffect.stats.nested import complete_tables, two_way_mean


def test_one_table_by_hand() -> None:
    # Feature means 1.5 and 4.5: 4.5 / 2. Prompt means 2 and 4: 2 / 2. Rest ±½: 1 / 4 off. 2.25 + 1 − 0.25 = 3.
    found = two_way_mean([[[1.0, 2.0], [3.0, 6.0]]])
    assert found.estimate.value == 3.0
    assert found.error == pytest.approx(math.sqrt(3.0))
    assert found.freedom == pytest.approx(3.0**2 / (2.25**2 + 1.0**2))
    reach = t.ppf(0.975, found.freedom) * math.sqrt(3.0)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((3 - reach, 3 + reach))
    assert found.estimate.p == pytest.approx(2 * t.sf(3.0 / math.sqrt(3.0), found.freedom))


def test_variance_is_at_least_each_source() -> None:
    # A table of rest alone: features and prompts have equal means, so the plain formula gives less than nothing.
    table = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.1], [0.0, 0.1, -0.1]])
    found = two_way_mean([table])
    of_features, of_prompts = (table.mean(axis=axis).var(ddof=1) / 3 for axis in (1, 0))
    assert found.error == pytest.approx(math.sqrt(max(of_features, of_prompts)))
    assert found.freedom >= 2


def test_without_prompts_it_is_students_and_welchs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((9, 1)), 2 * rng.standard_normal((15, 1))
    one, two = two_way_mean([a]).estimate, two_way_mean([a, b], [-1.0, 1.0]).estimate
    assert one.p == pytest.approx(float(ttest_1samp(a[:, 0], 0).pvalue))
    welch = ttest_ind(b[:, 0], a[:, 0], equal_var=False)
    assert two.p == pytest.approx(float(welch.pvalue))
    assert (two.low, two.high) == pytest.approx(tuple(welch.confidence_interval()))
    assert two.n == 24


def test_many_features_leave_the_test_over_prompts() -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal((1, 8)) + np.zeros((4000, 1))
    found = two_way_mean([table]).estimate
    assert found.p == pytest.approx(float(ttest_1samp(table[0], 0).pvalue))


def test_no_interval_has_a_reason() -> None:
    assert "one feature" in two_way_mean([[[1.0, 2.0]]]).estimate.reason
    assert "all values are equal" in two_way_mean([[[1.0, 1.0], [1.0, 1.0]]]).estimate.reason
    assert "not finite" in two_way_mean([[[1.0, math.nan], [1.0, 1.0]]]).estimate.reason
    assert "no values" in two_way_mean([np.empty((0, 3))]).estimate.reason
    twice = np.arange(3.0)[None] + np.zeros((4, 1))
    assert "cancels" in two_way_mean([twice, twice], [-1.0, 1.0]).estimate.reason
    for tables, weights in (([[1.0]], [1.0]), ([[[1.0]], [[1.0, 2.0]]], [1.0, 1.0]), ([[[1.0]]], [1.0, 1.0])):
        with pytest.raises(ShapeMismatch, match="expected tables"):
            two_way_mean(tables, weights)  # type: ignore[arg-type]


def test_what_lacks_most_is_left_out() -> None:
    table = np.ones((4, 5))
    table[1, [0, 2]] = math.nan
    table[:3, 4] = math.nan
    rows, columns = complete_tables([table, np.ones((2, 5))])
    assert [part.tolist() for part in rows] == [[0, 2, 3], [0, 1]]
    assert columns.tolist() == [0, 1, 2, 3]
    rows, columns = complete_tables([np.full((2, 2), math.nan)])
    assert rows[0].size * columns.size == 0


@pytest.mark.simulation
@pytest.mark.parametrize(("features", "prompts", "rest"), [(0.3, 0.3, 1.0), (1.0, 0.0, 0.3), (0.0, 1.0, 0.3)])
def test_intervals_hold_the_truth(features: float, prompts: float, rest: float) -> None:
    rng, n, held = np.random.default_rng(2), 3000, 0
    for _ in range(n):
        table = features * rng.standard_normal((10, 1)) + prompts * rng.standard_normal(6)
        found = two_way_mean([table + rest * rng.standard_normal((10, 6))]).estimate
        held += found.low <= 0 <= found.high
    assert 0.94 <= held / n <= 0.975
