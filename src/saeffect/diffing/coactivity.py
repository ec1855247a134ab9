"""Which features of two SAEs fire together on the same tokens: activations kept sparse, and matching by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saeffect.diffing.matching import Matching, TopPairs, neighbours_of
from saeffect.errors import BadFile, ConfigError, ShapeMismatch

__all__ = ["FiringLog", "match_activity"]

FloatArray = npt.NDArray[np.float64]
_BLOCK_CELLS = 16_000_000  # entries of the d_sae_a × d_sae_b matrix at once: 128 MB in float64


class FiringLog:
    """Remembers the activations above 0 of one SAE on a text, token by token, in 8 bytes each.

    A million tokens with 32 active features are 256 MB. Logs of two SAEs can be compared when they were fed
    the same tokens in the same order.

    Args:
        d_sae: Number of features.

    Raises:
        ConfigError: `d_sae` is below 1.

    Example:
        >>> log = FiringLog(3)
        >>> log.update(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> log.matrix().toarray().tolist()
        [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]
    """

    def __init__(self, d_sae: int) -> None:
        if d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1. Got {d_sae} instead.", at="d_sae")
        self.d_sae = d_sae
        self.n_tokens = 0
        self._counts: list[npt.NDArray[np.int64]] = []
        self._features: list[npt.NDArray[np.int32]] = []
        self._values: list[npt.NDArray[np.float32]] = []

    def update(self, feature_acts: Tensor) -> None:
        """Add tokens: `feature_acts` [n, d_sae], any float dtype; values at or below 0 are inactive.

        Raises:
            ShapeMismatch: The shape is not [n, d_sae].
            BadFile: An activation is NaN or infinite.
        """
        if feature_acts.ndim != 2 or feature_acts.shape[1] != self.d_sae:
            raise ShapeMismatch(
                f"feature_acts must be [n, {self.d_sae}]. Got {list(feature_acts.shape)} instead.", at="feature_acts"
            )
        acts = feature_acts.detach()
        if bool(torch.isnan(acts).any()):
            raise _not_finite()
        row, feature = (acts > 0).nonzero(as_tuple=True)
        self._add(len(acts), row.cpu(), feature.cpu(), acts[row, feature].cpu())

    def update_sparse(self, indices: Tensor, values: Tensor) -> None:
        """Add tokens that list the features that may be active: indices int64 [n, k], values [n, k].

        Within a row no feature is active twice; entries at or below 0 are padding.

        Raises:
            ShapeMismatch: The shapes differ, or a feature is outside the SAE.
            BadFile: An activation is NaN or infinite.
        """
        if indices.ndim != 2 or indices.shape != values.shape:
            raise ShapeMismatch(
                f"indices and values must both be [n, k]. Got {list(indices.shape)} and {list(values.shape)} instead.",
                at="indices, values",
            )
        values = values.detach().cpu()
        if bool(torch.isnan(values).any()):
            raise _not_finite()
        row, place = (values > 0).nonzero(as_tuple=True)
        feature = indices.detach().cpu()[row, place]
        if len(feature) and not (int(feature.min()) >= 0 and int(feature.max()) < self.d_sae):
            raise ShapeMismatch(f"indices must be from 0 to {self.d_sae - 1}.", at="indices")
        self._add(len(indices), row, feature, values[row, place])

    def matrix(self) -> Any:
        """A scipy CSR matrix, float32 [n_tokens, d_sae]."""
        from scipy.sparse import csr_matrix

        pointers = np.concatenate([np.zeros(1, dtype=np.int64), *self._counts]).cumsum()
        features = np.concatenate([np.empty(0, dtype=np.int32), *self._features])
        values = np.concatenate([np.empty(0, dtype=np.float32), *self._values])
        return csr_matrix((values, features, pointers), shape=(self.n_tokens, self.d_sae))

    def only(self, tokens: npt.NDArray[np.bool_]) -> FiringLog:
        """The same log without the tokens that are False in `tokens`, bool [n_tokens].

        Raises:
            ShapeMismatch: There is not one entry a token.
        """
        if np.shape(tokens) != (self.n_tokens,):
            raise ShapeMismatch(f"tokens must be bool [{self.n_tokens}]. Got {list(np.shape(tokens))}.", at="tokens")
        kept = self.matrix()[np.flatnonzero(tokens)]
        log = FiringLog(self.d_sae)
        log.n_tokens = kept.shape[0]
        log._counts = [np.diff(kept.indptr).astype(np.int64)]
        log._features, log._values = [kept.indices.astype(np.int32)], [kept.data]
        return log

    def _add(self, n: int, row: Tensor, feature: Tensor, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise _not_finite()
        self.n_tokens += n
        self._counts.append(torch.bincount(row, minlength=n).numpy())
        self._features.append(feature.numpy().astype(np.int32))
        self._values.append(value.float().numpy())


def match_activity(a: FiringLog, b: FiringLog, *, n: int = 8, min_active: int = 10, min_coactive: int = 5) -> Matching:
    """Nearest neighbours by Pearson's correlation of activations over the same tokens.

    Tokens on which a feature is off count as 0. Features that never fire together correlate below 0 and are
    no neighbours, which is why only pairs that do are ever computed: a block of features of `a` against all
    of `b` at a time, summed in float64.

    Args:
        a: Activations of one SAE.
        b: Those of the other on the same tokens.
        n: Neighbours a feature.
        min_active: Tokens on which a feature must fire to be matched.
        min_coactive: Tokens on which both must fire.

    Returns:
        Correlations above 0, at most 1. A feature that never fires, fires too seldom, or always fires alike
        has no neighbours, with the reason.

    Raises:
        ShapeMismatch: The logs have different numbers of tokens.
        ConfigError: A number is below 1.

    Example:
        >>> a, b = FiringLog(1), FiringLog(2)
        >>> a.update(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> b.update(torch.tensor([[5.0, 0.0], [0.0, 3.0], [0.0, 6.0]]))
        >>> found = match_activity(a, b, n=1, min_active=1, min_coactive=1)
        >>> found.forward.match.tolist(), found.backward.reason
        ([1], ('no feature of the other SAE fires with it often enough', ''))
    """
    for name, value in (("n", n), ("min_active", min_active), ("min_coactive", min_coactive)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1. Got {value} instead.", at=name)
    if a.n_tokens != b.n_tokens:
        raise ShapeMismatch(
            f"the logs hold {a.n_tokens} and {b.n_tokens} tokens; they must be of the same text.", at="b"
        )
    acts_a, acts_b = a.matrix().tocsc(), b.matrix()
    moments_a, moments_b = _Moments(acts_a, min_active), _Moments(acts_b.tocsc(), min_active)
    top = TopPairs(a.d_sae, b.d_sae, n)
    for first, block in _correlations(acts_a, acts_b, moments_a, moments_b, min_coactive):
        top.add(first, block)
    nobody = "no feature of the other SAE fires with it often enough"
    return Matching(
        "activation correlation",
        neighbours_of(*top.forward, moments_a.reason, n, nobody),
        neighbours_of(*top.backward, moments_b.reason, n, nobody),
    )


class _Moments:
    """Mean and deviation of each feature over tokens, and why a feature cannot be correlated."""

    def __init__(self, acts: Any, min_active: int) -> None:
        n_tokens = max(1, acts.shape[0])
        acts = acts.astype(np.float64)
        total = np.asarray(acts.sum(axis=0)).ravel()
        squares = np.asarray(acts.multiply(acts).sum(axis=0)).ravel()
        active = np.diff(acts.indptr)
        self.mean: FloatArray = total / n_tokens
        spread = squares / n_tokens - self.mean**2
        flat = spread <= 1e-12 * squares / n_tokens
        self.std: FloatArray = np.sqrt(np.where(flat, np.nan, spread))
        self.reason = [
            "it never fires on this text"
            if count == 0
            else f"it fires on {count} tokens, and {min_active} are needed"
            if count < min_active
            else "it fires alike on every token"
            if even
            else ""
            for count, even in zip(active.tolist(), flat.tolist(), strict=True)
        ]
        self.out = np.array([bool(why) for why in self.reason])


def _correlations(
    acts_a: Any, acts_b: Any, a: _Moments, b: _Moments, min_coactive: int
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of correlations float64 [n_rows, d_sae_b], minus infinity where there is none above 0."""
    n_tokens, d_sae_b = acts_b.shape
    rows = max(1, _BLOCK_CELLS // d_sae_b)
    values_b = acts_b.astype(np.float64)
    fires_b = acts_b.copy()
    fires_b.data = np.ones_like(fires_b.data)
    for first in range(0, acts_a.shape[1], rows):
        some = acts_a[:, first : first + rows].T.tocsr()
        fires = some.copy()
        fires.data = np.ones_like(fires.data)
        together = (fires @ fires_b).toarray()
        products = (some.astype(np.float64) @ values_b).toarray()
        mine = slice(first, first + len(products))
        products /= max(1, n_tokens)
        products -= np.outer(a.mean[mine], b.mean)
        products /= np.outer(a.std[mine], b.std)
        impossible = (together < min_coactive) | ~(products > 0) | a.out[mine, None] | b.out
        products[impossible] = -np.inf
        yield first, torch.from_numpy(np.minimum(products, 1.0))


def _not_finite() -> BadFile:
    return BadFile(
        "an activation is NaN or infinite.",
        at="feature_acts",
        fix="check the SAE's weights and the model's precision.",
    )
