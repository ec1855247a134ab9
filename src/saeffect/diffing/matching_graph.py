"""The best one-to-one pairing of two SAEs' features, on the graph of their nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saeffect.diffing.matching import NOBODY, Matching
from saeffect.errors import ConfigError

__all__ = ["Assignment", "assign", "edges"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Assignment:
    """A one-to-one pairing of features; not everybody has a partner.

    Attributes:
        b_of_a: int64 [n_a], the partner in `b` of each feature of `a`; `NOBODY` for none.
        a_of_b: int64 [n_b], the same seen from `b`.
        similarity: float64 [n_a], of each feature of `a` with its partner; NaN for none.
        reason: [n_a], why a feature of `a` has no partner; "" if it has one.
        total: The sum of the similarities above the floor: no pairing on the graph has a larger one.
    """

    b_of_a: IntArray
    a_of_b: IntArray
    similarity: FloatArray
    reason: tuple[str, ...]
    total: float


def edges(matching: Matching) -> tuple[IntArray, IntArray, FloatArray]:
    """Every pair in which one feature is among the other's neighbours, once: a [n], b [n], similarity [n].

    Ordered by a, then b.
    """
    forward, backward = matching.forward, matching.backward
    a = np.repeat(np.arange(matching.n_a), forward.indices.shape[1])
    b = np.repeat(np.arange(matching.n_b), backward.indices.shape[1])
    pairs_a = np.concatenate([a, backward.indices.ravel()])
    pairs_b = np.concatenate([forward.indices.ravel(), b])
    similarity = np.concatenate([forward.similarity.ravel(), backward.similarity.ravel()])
    real = (pairs_a != NOBODY) & (pairs_b != NOBODY)
    keys, first = np.unique(pairs_a[real] * np.int64(matching.n_b) + pairs_b[real], return_index=True)
    return keys // matching.n_b, keys % matching.n_b, similarity[real][first]


def assign(matching: Matching, *, floor: float = 0.0) -> Assignment:
    """Pair features one to one so that the similarities above `floor` add up to the most.

    Only pairs of the nearest-neighbour graph are considered, which keeps the problem sparse: with n
    neighbours there are at most 2 n edges a feature. Leaving a feature alone counts as `floor`, so no pair at
    or below it is ever made. The same input gives the same pairing, ties included.

    Args:
        matching: Neighbours both ways.
        floor: Least similarity worth a pair.

    Raises:
        ConfigError: `floor` is not a number.

    Source:
        Jonker & Volgenant (1987) for sparse graphs, through scipy.

    Example:
        >>> import torch
        >>> from saeffect.diffing.matching import match_decoders
        >>> a, b = torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([[1.0, 0.05], [0.6, 0.8]])
        >>> assign(match_decoders(a, b)).b_of_a.tolist()  # both are nearest to 0, but one must take 1
        [0, 1]
    """
    # scipy's graph code takes a while to import, and most commands never ask for it.
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    if not np.isfinite(floor):
        raise ConfigError(f"floor must be a finite number. Got {floor} instead.", at="floor")
    n_a, n_b = matching.n_a, matching.n_b
    a, b, similarity = edges(matching)
    worth = similarity > floor
    a, b, similarity = a[worth], b[worth], similarity[worth]
    b_of_a = np.full(n_a, NOBODY)
    if len(a):
        players = np.unique(a)
        row = np.searchsorted(players, a)
        # Each player may also stay alone: an edge to a dummy of its own. Every player takes exactly one edge,
        # so a constant on all costs changes nothing; it keeps them above 0, which scipy takes for "no edge".
        alone = float(similarity.max()) - floor + 1.0
        costs = np.concatenate([alone - (similarity - floor), np.full(len(players), alone)])
        rows = np.concatenate([row, np.arange(len(players))])
        columns = np.concatenate([b, n_b + np.arange(len(players))])
        graph = csr_matrix((costs, (rows, columns)), shape=(len(players), n_b + len(players)))
        row_ind, col_ind = min_weight_full_bipartite_matching(graph)
        real = col_ind < n_b
        b_of_a[players[row_ind[real]]] = col_ind[real]
    return _result(matching, b_of_a, (a, b, similarity), floor)


def _result(
    matching: Matching, b_of_a: IntArray, graph: tuple[IntArray, IntArray, FloatArray], floor: float
) -> Assignment:
    a, b, similarity = graph
    chosen = b_of_a[a] == b
    of_a = np.full(matching.n_a, np.nan)
    of_a[a[chosen]] = similarity[chosen]
    a_of_b = np.full(matching.n_b, NOBODY)
    a_of_b[b[chosen]] = a[chosen]
    has_edge = np.zeros(matching.n_a, dtype=bool)
    has_edge[a] = True
    reason = tuple(
        ""
        if partner != NOBODY
        else why
        or (f"no neighbour is more similar than {floor:g}" if not edge else "its neighbours have better partners")
        for partner, why, edge in zip(b_of_a.tolist(), matching.forward.reason, has_edge.tolist(), strict=True)
    )
    return Assignment(b_of_a, a_of_b, of_a, reason, float((similarity[chosen] - floor).sum()))
