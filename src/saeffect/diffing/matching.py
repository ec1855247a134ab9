"""Which feature of one SAE resembles which of another: nearest neighbours both ways, streamed.

Nothing of size `n_a × n_b` is ever held: blocks of rows are made, their best entries kept, and let go.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, ShapeMismatch

__all__ = ["NOBODY", "Matching", "Neighbours", "TopPairs", "match_decoders", "mutual_neighbours", "neighbours_of"]

NOBODY = -1
"""Stands for a feature number where there is no neighbour."""

# Neighbours kept beyond those asked for, since ranks are settled in float64 after a search in float32.
_SPARE = 4
_RERANK_ROWS = 256


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For each feature of one SAE, the features of the other that resemble it most.

    Attributes:
        indices: int64 [n_features, n], best first, equals in order of their number; `NOBODY` where there are
            fewer than n.
        similarity: float64 [n_features, n], at most 1; NaN where there is nobody.
        reason: [n_features], why a feature has no neighbour at all; "" if it has one.
        alone: bool [n_features], True for features that could be compared and found nobody; those that could
            not (never firing, say) are False.
    """

    indices: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float64]
    reason: tuple[str, ...]
    alone: npt.NDArray[np.bool_]

    @property
    def match(self) -> npt.NDArray[np.int64]:
        """The nearest feature of each, [n_features]; `NOBODY` for none."""
        return self.indices[:, 0]

    @property
    def best(self) -> npt.NDArray[np.float64]:
        """Similarity to the nearest, [n_features]; NaN for none."""
        return self.similarity[:, 0]

    @property
    def runner_up(self) -> npt.NDArray[np.float64]:
        """Similarity to the second nearest, [n_features]; NaN for none."""
        if self.similarity.shape[1] < 2:
            return np.full(len(self.similarity), np.nan)
        return self.similarity[:, 1]


@dataclass(frozen=True, eq=False)
class Matching:
    """Neighbours between two SAEs, `a` (the reference) and `b`.

    Attributes:
        measure: "decoder cosine" or "activation correlation".
        forward: One row a feature of `a`; indices are features of `b`.
        backward: One row a feature of `b`; indices are features of `a`.
    """

    measure: str
    forward: Neighbours
    backward: Neighbours

    @property
    def n_a(self) -> int:
        """Features of `a`."""
        return len(self.forward.indices)

    @property
    def n_b(self) -> int:
        """Features of `b`."""
        return len(self.backward.indices)

    def reversed(self) -> Matching:
        """The same with `a` and `b` exchanged."""
        return Matching(self.measure, self.backward, self.forward)


class TopPairs:
    """Keeps the best entries of each row and of each column of a matrix that arrives in blocks of rows.

    Equal entries are ranked by their number, so the result does not depend on how the rows were cut.

    Args:
        n_a: Rows of the whole matrix.
        n_b: Columns.
        n: Entries to keep.

    Example:
        >>> top = TopPairs(2, 2, 1)
        >>> top.add(0, torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
        >>> top.forward[0].tolist(), top.backward[0].tolist()
        ([[1], [0]], [[1], [0]])
    """

    def __init__(self, n_a: int, n_b: int, n: int) -> None:
        self.n = n
        self._forward = _nobody(n_a, n)
        self._backward = _nobody(n_b, n)

    @property
    def forward(self) -> tuple[Tensor, Tensor]:
        """Column numbers int64 [n_a, n] and entries float64 [n_a, n]; `NOBODY` and minus infinity for none."""
        return self._forward

    @property
    def backward(self) -> tuple[Tensor, Tensor]:
        """Row numbers int64 [n_b, n] and entries float64 [n_b, n]."""
        return self._backward

    def add(self, first: int, block: Tensor) -> None:
        """Add rows `first`, `first + 1`, ...: float [n_rows, n_b], minus infinity where no pair is possible.

        Blocks must come in order of their rows.
        """
        rows = slice(first, first + len(block))
        indices, values = _top(block, self.n)
        self._forward[0][rows, : indices.shape[1]] = indices
        self._forward[1][rows, : indices.shape[1]] = values
        indices, values = _top(block.T.contiguous(), self.n)
        # Kept rows come first, and their numbers are lower: a stable sort leaves equals in order.
        both = torch.cat([self._backward[1], values], dim=1)
        owners = torch.cat([self._backward[0], torch.where(indices == NOBODY, NOBODY, indices + first)], dim=1)
        order = both.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        self._backward = owners.gather(1, order), both.gather(1, order)


def match_decoders(
    W_dec_a: Tensor,
    W_dec_b: Tensor,
    *,
    n: int = 8,
    use_a: npt.NDArray[np.bool_] | None = None,
    use_b: npt.NDArray[np.bool_] | None = None,
    chunk: int = 1024,
) -> Matching:
    """Nearest neighbours by the cosine of decoder rows.

    The search runs in float32, one block of `chunk × d_sae_b` at a time; what it finds is measured again and
    ranked in float64, so equal rows have equal similarities.

    Args:
        W_dec_a: [d_sae_a, d_in], any float dtype.
        W_dec_b: [d_sae_b, d_in].
        n: Neighbours a feature.
        use_a: bool [d_sae_a], False for features to leave out (such as those that never fire); all if None.
        use_b: The same for `b`.
        chunk: Rows of `a` in one matrix product.

    Returns:
        Cosines from -1 to 1. A feature left out, or with a decoder of zeros, has no neighbours and is nobody's.

    Raises:
        ShapeMismatch: Widths differ, or a mask does not fit.
        ConfigError: `n` or `chunk` is below 1.
        BadFile: A weight is NaN or infinite.

    Example:
        >>> found = match_decoders(torch.eye(2), torch.tensor([[0.0, 2.0], [3.0, 0.0]]), n=1)
        >>> found.forward.match.tolist(), found.forward.best.tolist()
        ([1, 0], [1.0, 1.0])
    """
    _check(W_dec_a, W_dec_b, n, chunk)
    a, reason_a = _unit_rows(W_dec_a, use_a, "use_a")
    b, reason_b = _unit_rows(W_dec_b, use_b, "use_b")
    out_a, out_b = (torch.tensor([bool(text) for text in reason]) for reason in (reason_a, reason_b))
    top = TopPairs(len(a), len(b), n + _SPARE)
    columns = b.T
    for first in range(0, len(a), chunk):
        block = a[first : first + chunk] @ columns
        block[:, out_b] = -torch.inf
        block[out_a[first : first + chunk]] = -torch.inf
        top.add(first, block)
    nobody = "the other SAE has no feature to compare with"
    return Matching(
        "decoder cosine",
        neighbours_of(*_in_float64(top.forward[0], W_dec_a, W_dec_b), reason_a, n, nobody),
        neighbours_of(*_in_float64(top.backward[0], W_dec_b, W_dec_a), reason_b, n, nobody),
    )


def mutual_neighbours(matching: Matching) -> pd.DataFrame:
    """Pairs of features each of which is the other's nearest.

    Returns:
        `a`, `b` (int64), `similarity`, ordered by `a`. A feature is in at most one pair.

    Example:
        >>> found = match_decoders(torch.eye(2), torch.tensor([[0.0, 2.0], [1.0, 2.0]]))
        >>> mutual_neighbours(found).to_numpy().tolist()
        [[1.0, 0.0, 1.0]]
    """
    a = np.flatnonzero(matching.forward.match != NOBODY)
    b = matching.forward.match[a]
    kept = matching.backward.match[b] == a
    a, b = a[kept], b[kept]
    return pd.DataFrame({"a": a.astype(np.int64), "b": b, "similarity": matching.forward.best[a]})


def neighbours_of(indices: Tensor, values: Tensor, reason: list[str], n: int, nobody: str) -> Neighbours:
    """The first `n` of ranked candidates; features that found none say `nobody` unless they have a reason."""
    kept, similarity = indices[:, :n].numpy(), values[:, :n].double().numpy()
    alone = (kept[:, 0] == NOBODY) & np.array([not why for why in reason], dtype=bool)
    reasons = tuple(why or (nobody if nobody_found else "") for why, nobody_found in zip(reason, alone, strict=True))
    return Neighbours(kept, np.where(kept == NOBODY, np.nan, similarity), reasons, alone)


def _nobody(rows: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.full((rows, n), NOBODY), torch.full((rows, n), -torch.inf, dtype=torch.float64)


def _top(block: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The best n columns of each row, best first and equals by number: int64 and float64 [n_rows, <= n]."""
    width = block.shape[1]
    n = min(n, width)
    values, indices = block.topk(min(n + 1, width), dim=1)
    if n < width:
        # Which of several equal entries topk keeps is its own affair: rows with a tie at the edge are sorted.
        tied = (values[:, n - 1] == values[:, n]) & (values[:, n] > -torch.inf)
        values, indices = values[:, :n], indices[:, :n]
        rows = tied.nonzero()[:, 0]
        for some in rows.split(256):
            order = block[some].argsort(dim=1, descending=True, stable=True)[:, :n]
            indices[some], values[some] = order, block[some].gather(1, order)
    by_number = indices.argsort(dim=1)
    values, indices = values.gather(1, by_number), indices.gather(1, by_number)
    order = values.argsort(dim=1, descending=True, stable=True)
    values, indices = values.gather(1, order).double(), indices.gather(1, order)
    return indices.masked_fill(values == -torch.inf, NOBODY), values


def _in_float64(indices: Tensor, rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates ranked anew by cosines summed in float64."""
    exact = torch.full(indices.shape, -torch.inf, dtype=torch.float64)
    norms = torch.linalg.vector_norm(others.detach(), dim=1, dtype=torch.float64)
    for first in range(0, len(indices), _RERANK_ROWS):
        some = indices[first : first + _RERANK_ROWS]
        mine = rows[first : first + _RERANK_ROWS].detach().double()
        theirs = others.detach()[some.clamp(min=0)].double()
        length = mine.norm(dim=1, keepdim=True) * norms[some.clamp(min=0)]
        cosines = ((theirs * mine[:, None, :]).sum(dim=2) / length).clamp(-1, 1)
        exact[first : first + len(some)] = cosines.masked_fill(some == NOBODY, -torch.inf)
    by_number = torch.where(indices == NOBODY, torch.iinfo(torch.int64).max, indices).argsort(dim=1)
    exact, indices = exact.gather(1, by_number), indices.gather(1, by_number)
    order = exact.argsort(dim=1, descending=True, stable=True)
    return indices.gather(1, order), exact.gather(1, order)


def _unit_rows(W_dec: Tensor, use: npt.NDArray[np.bool_] | None, name: str) -> tuple[Tensor, list[str]]:
    """Rows of length 1 in float32, and why a feature cannot be matched ("" if it can)."""
    W_dec = W_dec.detach().float()
    if use is not None and (np.shape(use) != (len(W_dec),) or np.asarray(use).dtype != np.bool_):
        raise ShapeMismatch(f"{name} must be bool [{len(W_dec)}]. Got shape {list(np.shape(use))} instead.", at=name)
    norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    if not bool(torch.isfinite(norms).all()):
        raise BadFile("a decoder holds NaN or infinity.", at=name.replace("use", "W_dec"))
    reason = ["its decoder is zero" if norm == 0 else "" for norm in norms[:, 0].tolist()]
    if use is not None:
        reason = [why if used else "left out of the matching" for why, used in zip(reason, use.tolist(), strict=True)]
    return W_dec / norms.clamp(min=torch.finfo(torch.float32).tiny), reason


def _check(W_dec_a: Tensor, W_dec_b: Tensor, n: int, chunk: int) -> None:
    for name, value in (("n", n), ("chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1. Got {value} instead.", at=name)
    if W_dec_a.ndim != 2 or W_dec_b.ndim != 2 or W_dec_a.shape[1] != W_dec_b.shape[1]:
        raise ShapeMismatch(
            "decoders must both be [d_sae, d_in] with the same d_in. "
            f"Got {list(W_dec_a.shape)} and {list(W_dec_b.shape)} instead.",
            at="W_dec_b",
            fix="compare SAEs of one hook of one architecture.",
        )
    if len(W_dec_a) == 0 or len(W_dec_b) == 0:
        raise ShapeMismatch("a decoder has no rows.", at="W_dec_a" if len(W_dec_a) == 0 else "W_dec_b")
