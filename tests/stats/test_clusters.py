"""What counts as independent, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from saeffect.stats import independent_values
from saeffect.stats.clusters import MIN_CLUSTERS


def test_means_of_clusters_of_unequal_size_in_the_order_of_their_labels() -> None:
    found = independent_values([4.0, 1.0, 2.0, 3.0, 7.0], [9, 2, 2, 2, 5], min_clusters=3)
    assert found.tolist() == [2.0, 7.0, 4.0]


@pytest.mark.parametrize("n_clusters", [1, MIN_CLUSTERS - 1, MIN_CLUSTERS])
def test_few_clusters_leave_the_values_alone(n_clusters: int) -> None:
    values = np.arange(2.0 * n_clusters)
    found = independent_values(values, np.repeat(np.arange(n_clusters), 2))
    assert len(found) == (n_clusters if n_clusters >= MIN_CLUSTERS else 2 * n_clusters)


def test_nothing_is_nothing() -> None:
    assert independent_values([], []).tolist() == []
