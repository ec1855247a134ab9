"""Which features of two SAEs fire together on the same tokens: sparse activations, and matching by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saeffect.diffing.matching import Matching, TopPairs, make_neighbours
from saeffect.errors import ShapeMismatch
from saeffect.features.activity import check_finite
from saeffect.stats.arguments import FloatArray

__all__ = ["FiringLog", "coactivation", "match_activity"]

_BLOCK_CELLS = 16_000_000  # entries of the d_sae_a × d_sae_b matrix at once: 128 MB in float64


class FiringLog:
    """Stores the activations above 0 of one SAE, 8 bytes each (1M tokens with 32 active features: 256 MB).

    Example:
        >>> log = FiringLog(3)
        >>> log.update(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> log.matrix().toarray().tolist()
        [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]
    """

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.n_tokens = 0
        self._counts: list[npt.NDArray[np.int64]] = []
        self._features: list[npt.NDArray[np.int32]] = []
        self._values: list[npt.NDArray[np.float32]] = []

    def update(self, feature_acts: Tensor) -> None:
        """Add tokens: `feature_acts` [n, d_sae], any float dtype; `ShapeMismatch`, or `BadFile` if not finite."""
        if feature_acts.ndim != 2 or feature_acts.shape[1] != self.d_sae:
            raise ShapeMismatch(
                f"feature_acts must be [n, {self.d_sae}]. Got {list(feature_acts.shape)} instead.", at="feature_acts"
            )
        acts = feature_acts.detach()
        row, feature = (acts > 0).nonzero(as_tuple=True)
        value = acts[row, feature]
        if len(acts):
            check_finite(acts.amax(dim=0))  # a NaN anywhere in a column is its maximum
        self.n_tokens += len(acts)
        self._counts.append(torch.bincount(row.cpu(), minlength=len(acts)).numpy())
        self._features.append(feature.cpu().numpy().astype(np.int32))
        self._values.append(value.cpu().float().numpy())

    def matrix(self) -> Any:
        """A scipy CSR matrix, float32 [n_tokens, d_sae]."""
        from scipy.sparse import csr_matrix

        pointers = np.concatenate([np.zeros(1, dtype=np.int64), *self._counts]).cumsum()
        features = np.concatenate([np.empty(0, dtype=np.int32), *self._features])
        values = np.concatenate([np.empty(0, dtype=np.float32), *self._values])
        return csr_matrix((values, features, pointers), shape=(self.n_tokens, self.d_sae))

    def only(self, tokens: npt.NDArray[np.bool_]) -> FiringLog:
        """The log of the tokens that are True in `tokens`, bool [n_tokens]."""
        rows = self.matrix()[np.flatnonzero(tokens)]
        log = FiringLog(self.d_sae)
        log.n_tokens = rows.shape[0]
        log._counts = [np.diff(rows.indptr).astype(np.int64)]
        log._features, log._values = [rows.indices.astype(np.int32)], [rows.data]
        return log


def match_activity(a: FiringLog, b: FiringLog, *, n: int = 8, min_active: int = 10, min_coactive: int = 5) -> Matching:
    """Nearest neighbours by Pearson's correlation of activations over the same tokens, inactive ones as 0.

    Only pairs that fire together on `min_coactive` tokens are computed, in float64: all others correlate below 0 and
    are no neighbours. Correlations are above 0, at most 1; 0 where no feature fires together with it. A feature that
    fires on fewer than `min_active` tokens, or always equally strongly, has no neighbours, with the reason.
    `ShapeMismatch` if the logs have different numbers of tokens.

    Example:
        >>> a, b = FiringLog(1), FiringLog(2)
        >>> a.update(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> b.update(torch.tensor([[5.0, 0.0], [0.0, 3.0], [0.0, 6.0]]))
        >>> matching = match_activity(a, b, n=1, min_active=1, min_coactive=1)
        >>> matching.forward.match.tolist(), matching.backward.reason
        ([1], ('no feature of the other SAE fires with it often enough', ''))
    """
    if a.n_tokens != b.n_tokens:
        raise ShapeMismatch(
            f"the logs hold {a.n_tokens} and {b.n_tokens} tokens; they must be of the same text.", at="b"
        )
    acts_a, acts_b = a.matrix().tocsc(), b.matrix()
    moments_a, moments_b = _moments(acts_a, min_active), _moments(acts_b.tocsc(), min_active)
    top = TopPairs(a.d_sae, b.d_sae, n)
    for first, block in _correlations(acts_a, acts_b, moments_a, moments_b, min_coactive):
        top.add(first, block)
    no_neighbour = "no feature of the other SAE fires with it often enough"
    return Matching(
        "activation correlation",
        make_neighbours(*top.forward, moments_a.reason, n, no_neighbour, absent=0.0),
        make_neighbours(*top.backward, moments_b.reason, n, no_neighbour, absent=0.0),
    )


def coactivation(log: FiringLog, *, min_active: int = 10, min_coactive: int = 5) -> Iterator[tuple[int, FloatArray]]:
    """Correlations of the features of one SAE, in blocks: the first feature of the block, and float64 [n, d_sae].

    Pearson's over all tokens, inactive ones as 0. Negative values become 0, as do those of features that fire on fewer
    than `min_active` tokens and of pairs that fire together on fewer than `min_coactive`.
    """
    acts = log.matrix().tocsc()
    moments = _moments(acts, min_active)
    for first, block in _correlations(acts, log.matrix(), moments, moments, min_coactive):
        yield first, block.clamp(min=0).numpy()


class _Moments(NamedTuple):
    """Mean and deviation of each feature over tokens, and why a feature cannot be correlated."""

    mean: FloatArray
    std: FloatArray
    reason: list[str]


def _moments(acts: Any, min_active: int) -> _Moments:
    n_tokens = max(1, acts.shape[0])
    acts = acts.astype(np.float64)
    squares = np.asarray(acts.multiply(acts).sum(axis=0)).ravel()
    mean = np.asarray(acts.sum(axis=0)).ravel() / n_tokens
    spread = squares / n_tokens - mean**2
    flat = spread <= 1e-12 * squares / n_tokens
    reason = [
        "it never fires on this text"
        if count == 0
        else f"it fires on {count} tokens, and {min_active} are needed"
        if count < min_active
        else "it fires alike on every token"
        if is_flat
        else ""
        for count, is_flat in zip(np.diff(acts.indptr).tolist(), flat.tolist(), strict=True)
    ]
    return _Moments(mean, np.sqrt(np.where(flat, np.nan, spread)), reason)


def _correlations(
    acts_a: Any, acts_b: Any, a: _Moments, b: _Moments, min_coactive: int
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of correlations float64 [n_rows, d_sae_b], minus infinity where there is none above 0."""
    n_tokens, d_sae_b = acts_b.shape
    rows = max(1, _BLOCK_CELLS // d_sae_b)
    values_b, fires_b = acts_b.astype(np.float64), _indicator(acts_b)
    excluded_a, excluded_b = (np.array([bool(reason) for reason in moments.reason]) for moments in (a, b))
    for first in range(0, acts_a.shape[1], rows):
        block = acts_a[:, first : first + rows].T.tocsr()
        n_together = (_indicator(block) @ fires_b).toarray()
        products = (block.astype(np.float64) @ values_b).toarray()
        rows_a = slice(first, first + len(products))
        products /= max(1, n_tokens)
        products -= np.outer(a.mean[rows_a], b.mean)
        products /= np.outer(a.std[rows_a], b.std)
        products[(n_together < min_coactive) | ~(products > 0) | excluded_a[rows_a, None] | excluded_b] = -np.inf
        yield first, torch.from_numpy(np.minimum(products, 1.0))


def _indicator(acts: Any) -> Any:
    fires = acts.copy()
    fires.data = np.ones_like(fires.data)
    return fires
