"""Values that come in clusters: what may be counted as independent."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MIN_CLUSTERS", "independent_values"]

MIN_CLUSTERS = 6
"""Clusters from which a cluster, and not a single value, is taken for what was drawn at random.

Texts that continue one prompt resemble each other. Where there are prompts enough, their samples are averaged before
anything is tested: 12 prompts with 2 samples are 12 independent differences, not 24. With five prompts no result could
be less likely by luck than one in 32, so with fewer than six every value counts, and what is found holds for them."""


def independent_values(
    values: npt.ArrayLike, clusters: npt.ArrayLike, *, min_clusters: int = MIN_CLUSTERS
) -> npt.NDArray[np.float64]:
    """The mean of each cluster, or the values themselves where clusters are few.

    Args:
        values: Finite numbers, shape [n].
        clusters: To which cluster each belongs: labels of any kind that sorts, shape [n].
        min_clusters: So many clusters are enough.

    Returns:
        Float64: [n_clusters], in the order of the labels, or [n].

    Example:
        >>> independent_values([1.0, 3.0, 5.0, 5.0], ["a", "a", "b", "b"], min_clusters=2)
        array([2., 5.])
        >>> independent_values([1.0, 3.0, 5.0, 5.0], ["a", "a", "b", "b"])
        array([1., 3., 5., 5.])
    """
    numbers = np.asarray(values, dtype=np.float64)
    found: tuple[npt.NDArray[Any], npt.NDArray[np.int64]] = np.unique(np.asarray(clusters), return_inverse=True)
    labels, place = found
    if len(labels) < min_clusters:
        return numbers
    return np.bincount(place.ravel(), weights=numbers) / np.bincount(place.ravel())
