"""Matching the features of two SAEs: nearest neighbours both ways, and the best one-to-one pairing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saeffect.errors import BadFile, ShapeMismatch
from saeffect.stats.arguments import BoolArray, FloatArray, IntArray

__all__ = [
    "NO_MATCH",
    "Assignment",
    "Matching",
    "Neighbours",
    "TopPairs",
    "assign",
    "match_decoders",
    "make_neighbours",
    "unit_rows",
]


NO_MATCH = -1
"""The feature number that stands for no neighbour."""

_ROWS = 1024  # of `a` in one matrix product
# Additional candidates of the search in float32, which are then ranked in float64.
_EXTRA = 4
_RERANK_ROWS = 256


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For each feature of one SAE, the most similar features of another.

    Attributes:
        indices: int64 [n_features, n], best first, ties by number; `NO_MATCH` where there are fewer.
        similarity: float64 [n_features, n], at most 1. Without a neighbour NaN, or 0 for correlations of activations.
        reason: [n_features], why a feature has no neighbour at all; "" if it has one.
    """

    indices: IntArray
    similarity: FloatArray
    reason: tuple[str, ...]

    @property
    def match(self) -> IntArray:
        """The nearest feature of each, [n_features]; `NO_MATCH` for none."""
        return self.indices[:, 0]

    @property
    def best(self) -> FloatArray:
        """Similarity to the nearest, [n_features]."""
        return self.similarity[:, 0]

    @property
    def runner_up(self) -> FloatArray:
        """Similarity to the second nearest, [n_features]; NaN where only one was sought."""
        return self.similarity[:, 1] if self.similarity.shape[1] > 1 else np.full(len(self.similarity), np.nan)


@dataclass(frozen=True, eq=False)
class Matching:
    """Neighbours between two SAEs: `forward` from `a` (the reference) to `b`, `backward` from `b` to `a`.

    `measure` is "decoder cosine" or "activation correlation".
    """

    measure: str
    forward: Neighbours
    backward: Neighbours

    @property
    def n_a(self) -> int:
        return len(self.forward.indices)

    @property
    def n_b(self) -> int:
        return len(self.backward.indices)

    @property
    def mutual(self) -> BoolArray:
        """Bool [n_a]: features of `a` whose match has them as its match."""
        has_match = self.forward.match != NO_MATCH
        mutual = np.zeros(self.n_a, dtype=bool)
        mutual[has_match] = self.backward.match[self.forward.match[has_match]] == np.flatnonzero(has_match)
        return mutual

    def reversed(self) -> Matching:
        """The same with `a` and `b` exchanged."""
        return Matching(self.measure, self.backward, self.forward)


class TopPairs:
    """Keeps the n best entries of each row and column of a matrix [n_a, n_b] given in blocks of rows; ties by number.

    `forward` has column numbers int64 [n_a, n] and entries float64 [n_a, n], `backward` row numbers and entries [n_b,
    n]; `NO_MATCH` and minus infinity for none.

    Example:
        >>> top = TopPairs(2, 2, 1)
        >>> top.add(0, torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
        >>> top.forward[0].tolist(), top.backward[0].tolist()
        ([[1], [0]], [[1], [0]])
    """

    def __init__(self, n_a: int, n_b: int, n: int) -> None:
        self._n = n
        self.forward, self.backward = (
            (torch.full((rows, n), NO_MATCH), torch.full((rows, n), -torch.inf, dtype=torch.float64))
            for rows in (n_a, n_b)
        )

    def add(self, first: int, block: Tensor) -> None:
        """Add rows `first`, `first + 1`, ..., in order: float [n_rows, n_b], minus infinity for impossible pairs."""
        rows = slice(first, first + len(block))
        indices, values = _top_columns(block, self._n)
        self.forward[0][rows, : indices.shape[1]] = indices
        self.forward[1][rows, : indices.shape[1]] = values
        indices, values = _top_columns(block.T.contiguous(), self._n)
        # Rows added before come first and have lower numbers, so a stable sort orders ties by number.
        entries = torch.cat([self.backward[1], values], dim=1)
        row_numbers = torch.cat([self.backward[0], torch.where(indices == NO_MATCH, NO_MATCH, indices + first)], dim=1)
        order = entries.argsort(dim=1, descending=True, stable=True)[:, : self._n]
        self.backward = row_numbers.gather(1, order), entries.gather(1, order)


def match_decoders(
    W_dec_a: Tensor, W_dec_b: Tensor, *, n: int = 8, use_a: BoolArray | None = None, use_b: BoolArray | None = None
) -> Matching:
    """Nearest `n` neighbours by the cosine of decoder rows [d_sae, d_in], searched in float32, ranked in float64.

    A feature left out (False in `use_a` or `use_b`, bool [d_sae]), or with a decoder row of zeros, has no neighbours
    and is no neighbour. `ShapeMismatch`: widths differ, or a mask does not fit; `BadFile`: a weight is NaN or
    infinite.

    Example:
        >>> matching = match_decoders(torch.eye(2), torch.tensor([[0.0, 2.0], [3.0, 0.0]]), n=1)
        >>> matching.forward.match.tolist(), matching.forward.best.tolist()
        ([1, 0], [1.0, 1.0])
    """
    shapes_fit = W_dec_a.ndim == W_dec_b.ndim == 2 and W_dec_a.shape[1] == W_dec_b.shape[1]
    if not (shapes_fit and len(W_dec_a) and len(W_dec_b)):
        raise ShapeMismatch(
            "decoders must both be [d_sae, d_in] with the same d_in and at least one row. "
            f"Got {list(W_dec_a.shape)} and {list(W_dec_b.shape)} instead.",
            at="W_dec_b",
            fix="compare SAEs of one hook of one architecture.",
        )
    a, reason_a = _comparable_rows(W_dec_a, use_a, "use_a")
    b, reason_b = _comparable_rows(W_dec_b, use_b, "use_b")
    excluded_a, excluded_b = (torch.tensor([bool(text) for text in reason]) for reason in (reason_a, reason_b))
    top = TopPairs(len(a), len(b), n + _EXTRA)
    columns = b.T
    for first in range(0, len(a), _ROWS):
        block = a[first : first + _ROWS] @ columns
        block[:, excluded_b] = -torch.inf
        block[excluded_a[first : first + _ROWS]] = -torch.inf
        top.add(first, block)
    no_neighbour = "the other SAE has no feature to compare with"
    return Matching(
        "decoder cosine",
        make_neighbours(*_rerank(top.forward[0], W_dec_a, W_dec_b), reason_a, n, no_neighbour, absent=np.nan),
        make_neighbours(*_rerank(top.backward[0], W_dec_b, W_dec_a), reason_b, n, no_neighbour, absent=np.nan),
    )


def unit_rows(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows of length 1, of the dtype given; rows of zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def make_neighbours(
    indices: Tensor, values: Tensor, reason: list[str], n: int, no_neighbour: str, *, absent: float
) -> Neighbours:
    """The first `n` of ranked candidates; without any, the reason is `no_neighbour` and the similarity `absent`."""
    nearest, similarity = indices[:, :n].numpy(), values[:, :n].double().numpy()
    comparable = np.array([not text for text in reason], dtype=bool)
    missing = np.where(comparable, absent, np.nan)[:, None]
    alone = comparable & (nearest[:, 0] == NO_MATCH)
    reasons = tuple(text or (no_neighbour if is_alone else "") for text, is_alone in zip(reason, alone, strict=True))
    return Neighbours(nearest, np.where(nearest == NO_MATCH, missing, similarity), reasons)


@dataclass(frozen=True, eq=False)
class Assignment:
    """Partners in `b` of the features of `a`, int64 [n_a], and the other way round; `NO_MATCH` for none.

    `similarity`, float64 [n_a], is that of a feature of `a` with its partner; NaN for none.
    """

    b_of_a: IntArray
    a_of_b: IntArray
    similarity: FloatArray


def assign(matching: Matching) -> Assignment:
    """Pair features one to one with the largest sum of similarities (Jonker & Volgenant 1987, sparse).

    Only nearest neighbours are paired, and none at similarity 0 or below. Deterministic, ties included.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([[1.0, 0.05], [0.6, 0.8]])
        >>> assign(match_decoders(a, b)).b_of_a.tolist()  # both are nearest to 0, but one must take 1
        [0, 1]
    """
    # scipy's graph code takes a while to import, and most commands do not need it.
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    a, b, similarity = _edges(matching)
    positive = similarity > 0
    a, b, similarity = a[positive], b[positive], similarity[positive]
    b_of_a, a_of_b = np.full(matching.n_a, NO_MATCH), np.full(matching.n_b, NO_MATCH)
    similarity_of_a = np.full(matching.n_a, np.nan)
    if len(a):
        matched_a = np.unique(a)
        n = len(matched_a)
        # An edge to a dummy of its own leaves a feature without partner. Each takes exactly one edge, so a constant on
        # all costs changes nothing; it keeps costs above 0, which scipy reads as "no edge".
        no_partner_cost = float(similarity.max()) + 1.0
        costs = np.concatenate([no_partner_cost - similarity, np.full(n, no_partner_cost)])
        rows = np.concatenate([np.searchsorted(matched_a, a), np.arange(n)])
        columns = np.concatenate([b, matching.n_b + np.arange(n)])
        graph = csr_matrix((costs, (rows, columns)), shape=(n, matching.n_b + n))
        row, column = min_weight_full_bipartite_matching(graph)
        has_partner = column < matching.n_b
        b_of_a[matched_a[row[has_partner]]] = column[has_partner]
    chosen = b_of_a[a] == b
    similarity_of_a[a[chosen]] = similarity[chosen]
    a_of_b[b[chosen]] = a[chosen]
    return Assignment(b_of_a, a_of_b, similarity_of_a)


def _edges(matching: Matching) -> tuple[IntArray, IntArray, FloatArray]:
    """Unique pairs in which one feature is a neighbour of the other, sorted by a, then b: a, b, similarity [n]."""
    forward, backward = matching.forward, matching.backward
    pairs_a = np.concatenate([np.repeat(np.arange(matching.n_a), forward.indices.shape[1]), backward.indices.ravel()])
    pairs_b = np.concatenate([forward.indices.ravel(), np.repeat(np.arange(matching.n_b), backward.indices.shape[1])])
    similarity = np.concatenate([forward.similarity.ravel(), backward.similarity.ravel()])
    is_pair = (pairs_a != NO_MATCH) & (pairs_b != NO_MATCH)
    keys, first = np.unique(pairs_a[is_pair] * np.int64(matching.n_b) + pairs_b[is_pair], return_index=True)
    return keys // matching.n_b, keys % matching.n_b, similarity[is_pair][first]


def _top_columns(block: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The best n columns of each row, best first, ties by number: int64 and float64 [n_rows, <= n]."""
    width = block.shape[1]
    n = min(n, width)
    values, indices = block.topk(min(n + 1, width), dim=1)
    if n < width:
        # topk may return any of equal entries, so rows with a tie at the end are sorted.
        tied = (values[:, n - 1] == values[:, n]) & (values[:, n] > -torch.inf)
        values, indices = values[:, :n], indices[:, :n]
        for rows in tied.nonzero()[:, 0].split(256):
            order = block[rows].argsort(dim=1, descending=True, stable=True)[:, :n]
            indices[rows], values[rows] = order, block[rows].gather(1, order)
    indices, values = _sort_by_value(indices, indices, values)
    values = values.double()
    return indices.masked_fill(values == -torch.inf, NO_MATCH), values


def _sort_by_value(number: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row by value, highest first, ties by `number`."""
    by_number = number.argsort(dim=1)
    values, indices = values.gather(1, by_number), indices.gather(1, by_number)
    order = values.argsort(dim=1, descending=True, stable=True)
    return indices.gather(1, order), values.gather(1, order)


def _rerank(indices: Tensor, rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Rank the candidates by cosines in float64."""
    exact = torch.full(indices.shape, -torch.inf, dtype=torch.float64)
    norms = torch.linalg.vector_norm(others.detach(), dim=1, dtype=torch.float64)
    for first in range(0, len(indices), _RERANK_ROWS):
        candidates = indices[first : first + _RERANK_ROWS]
        row_block = rows[first : first + _RERANK_ROWS].detach().double()
        candidate_rows = others.detach()[candidates.clamp(min=0)].double()
        length = row_block.norm(dim=1, keepdim=True) * norms[candidates.clamp(min=0)]
        cosines = ((candidate_rows * row_block[:, None, :]).sum(dim=2) / length).clamp(-1, 1)
        exact[first : first + len(candidates)] = cosines.masked_fill(candidates == NO_MATCH, -torch.inf)
    number = torch.where(indices == NO_MATCH, torch.iinfo(torch.int64).max, indices)
    return _sort_by_value(number, indices, exact)


def _comparable_rows(W_dec: Tensor, use: BoolArray | None, name: str) -> tuple[Tensor, list[str]]:
    """Rows of length 1 in float32, and why a feature cannot be matched ("" if it can)."""
    W_dec = W_dec.detach().float()
    if use is not None and (np.shape(use) != (len(W_dec),) or np.asarray(use).dtype != np.bool_):
        raise ShapeMismatch(f"{name} must be bool [{len(W_dec)}]. Got shape {list(np.shape(use))} instead.", at=name)
    norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    if not bool(torch.isfinite(norms).all()):
        raise BadFile("a decoder holds NaN or infinity.", at=name.replace("use", "W_dec"))
    reason = ["its decoder is zero" if norm == 0 else "" for norm in norms[:, 0].tolist()]
    if use is not None:
        reason = [text if used else "left out of the matching" for text, used in zip(reason, use.tolist(), strict=True)]
    return W_dec / norms.clamp(min=torch.finfo(torch.float32).tiny), reason
