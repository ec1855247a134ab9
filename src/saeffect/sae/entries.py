"""Sparse feature activations and the products that training needs of them: `SparseEntries` when few features are on,
`DenseEntries` for whole matrices at the start of a run, when half of all features are on.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

__all__ = ["DenseEntries", "Entries", "ListedByFeature", "SparseEntries"]


class Entries(ABC):
    """The stored entries of a matrix of `shape` `[n_tokens, d_sae]`; their `values` are float32, `[nnz]` when sparse,
    `[n_tokens, d_sae]` when dense.
    """

    values: Tensor
    shape: tuple[int, int]

    @abstractmethod
    def per_feature(self, of_feature: Tensor) -> Tensor:
        """Numbers of features, `[d_sae]`, in a shape that broadcasts with `values`."""

    @abstractmethod
    def where(self, kept: Tensor) -> Entries:
        """Only the entries for which the bool tensor `kept`, shaped like `values`, is true."""

    @abstractmethod
    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """`A @ W_dec`, float32 `[n_tokens, d_in]`, where A has the given values at these entries."""

    @abstractmethod
    def inner(self, left: Tensor, W: Tensor) -> Tensor:
        """`left @ W.T` at the entries: left `[n_tokens, d_in]`, W `[d_sae, d_in]`; shaped like `values`."""

    @abstractmethod
    def outer(
        self, values: Tensor, right: Tensor, out: Tensor, *, add: bool = False, rows: slice = slice(None)
    ) -> Tensor:
        """`A.T @ right` into (or added to) `out`, float32 `[d_sae, d_in]`; right is `[n_tokens, d_in]`. With `rows`,
        a range of features, only those: `out` is then `[features in the range, d_in]`.
        """

    @abstractmethod
    def feature_sums(self, values: Tensor) -> Tensor:
        """Sum over tokens, `[d_sae]`."""

    @abstractmethod
    def counts(self) -> Tensor:
        """Tokens on which each feature has a positive value, int64 `[d_sae]`."""

    @abstractmethod
    def to_dense(self, values: Tensor | None = None) -> Tensor:
        """The whole matrix `[n_tokens, d_sae]`, zero elsewhere."""


class SparseEntries(Entries):
    """Entries listed one by one, ordered by token, then by feature; both are int64 `[nnz]`."""

    def __init__(self, token: Tensor, feature: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        self.token, self.feature, self.values, self.shape = token, feature, values, shape

    def per_feature(self, of_feature: Tensor) -> Tensor:
        return of_feature[self.feature]

    def where(self, kept: Tensor) -> SparseEntries:
        if bool(kept.all()):
            return self
        selected = SparseEntries(self.token[kept], self.feature[kept], self.values[kept], self.shape)
        if "_transposed" in self.__dict__:  # faster than sorting again
            order, _, token = self._transposed
            picked = kept[order]
            position = kept.cumsum(0).sub_(1)[order[picked]]
            selected.__dict__["_transposed"] = position, _starts(selected.feature, self.shape[1]), token[picked]
        return selected

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        out = W_dec.new_empty(self.shape[0], W_dec.shape[1])
        return torch.addmm(out, self._by_token(values), W_dec, beta=0, out=out)

    def inner(self, left: Tensor, W: Tensor) -> Tensor:
        if not self.values.numel():
            return self.values.new_zeros(0)
        # By feature, so that each row of W is read from memory once and `left` stays in the cache.
        products = _products(self._by_feature(self.values), left, W)
        return torch.empty_like(products).index_copy_(0, self._transposed[0], products)

    def outer(
        self, values: Tensor, right: Tensor, out: Tensor, *, add: bool = False, rows: slice = slice(None)
    ) -> Tensor:
        # `out` is memory that is already mapped: allocating [d_sae, d_in] costs ten times the product.
        return torch.addmm(out, self._by_feature(values, rows), right, beta=1 if add else 0, out=out)

    def feature_sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape[1]).index_add_(0, self.feature, values)

    def counts(self) -> Tensor:
        return torch.bincount(self.feature[self.values > 0], minlength=self.shape[1])

    def to_dense(self, values: Tensor | None = None) -> Tensor:
        dense = self.values.new_zeros(self.shape)
        dense[self.token, self.feature] = self.values if values is None else values
        return dense

    def _by_token(self, values: Tensor) -> Tensor:
        return _csr(self._token_starts, self._feature32, values, self.shape)

    def _by_feature(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        order, starts, token = self._transposed
        first, last, _ = rows.indices(self.shape[1])
        if last - first < self.shape[1]:
            inside = slice(int(starts[first]), int(starts[last]))
            starts = starts[first : last + 1] - starts[first]
            order, token = order[inside], token[inside]
        return _csr(starts, token, values[order], (last - first, self.shape[0]))

    @cached_property
    def _feature32(self) -> Tensor:  # MKL and cuSPARSE take 32-bit indices; 64-bit ones are copied at every product
        return self.feature.to(torch.int32)

    @cached_property
    def _token_starts(self) -> Tensor:
        return _starts(self.token, self.shape[0])

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.sort(self._feature32, stable=True).indices
        return order, _starts(self.feature, self.shape[1]), self.token[order].to(torch.int32)


class DenseEntries(Entries):
    """All entries; `values` is zero where a feature is off, and `inner` may write its result to `scratch`."""

    def __init__(self, values: Tensor, scratch: Tensor | None = None) -> None:
        self.values, self._scratch = values, scratch
        self.shape = (values.shape[0], values.shape[1])

    def per_feature(self, of_feature: Tensor) -> Tensor:
        return of_feature

    def where(self, kept: Tensor) -> DenseEntries:
        return DenseEntries(self.values * kept)

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        return values @ W_dec

    def inner(self, left: Tensor, W: Tensor) -> Tensor:
        return torch.mm(left, W.T, out=self._scratch) if self._scratch is not None else left @ W.T

    def outer(
        self, values: Tensor, right: Tensor, out: Tensor, *, add: bool = False, rows: slice = slice(None)
    ) -> Tensor:
        return torch.addmm(out, values[:, rows].T, right, beta=1 if add else 0, out=out)

    def feature_sums(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def counts(self) -> Tensor:
        return (self.values > 0).sum(0)

    def to_dense(self, values: Tensor | None = None) -> Tensor:
        return self.values if values is None else values


@dataclass(frozen=True, eq=False)
class ListedByFeature:
    """Entries ordered by feature, then token; both int64 `[nnz]`, values float32, `shape` (n_tokens, d_sae)."""

    token: Tensor
    feature: Tensor
    values: Tensor
    shape: tuple[int, int]

    def where(self, kept: Tensor) -> ListedByFeature:
        if bool(kept.all()):
            return self
        return ListedByFeature(self.token[kept], self.feature[kept], self.values[kept], self.shape)

    def inner(self, left: Tensor, W: Tensor) -> Tensor:
        if not self.values.numel():
            return self.values.new_zeros(0)
        return _products(_csr(self._starts, self._token32, self.values, self.shape[::-1]), left, W)

    def entries(self) -> SparseEntries:
        """The same entries ordered by token; the order by feature is kept for later products."""
        order = torch.sort(self._token32, stable=True).indices
        entries = SparseEntries(self.token[order], self.feature[order], self.values[order], self.shape)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        entries.__dict__["_transposed"] = position, self._starts, self._token32
        return entries

    @cached_property
    def _token32(self) -> Tensor:
        return self.token.to(torch.int32)

    @cached_property
    def _starts(self) -> Tensor:
        return _starts(self.feature, self.shape[1])


def _starts(of_entry: Tensor, n: int) -> Tensor:
    starts = torch.zeros(n + 1, dtype=torch.int32, device=of_entry.device)
    starts[1:] = torch.bincount(of_entry, minlength=n).cumsum(0)
    return starts


def _products(pattern: Tensor, left: Tensor, W: Tensor) -> Tensor:
    """`W @ left.T` where a CSR matrix `[d_sae, n_tokens]` has entries, in their order."""
    return torch.sparse.sampled_addmm(pattern, W, left.T, beta=0).values()


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    _silence_csr_beta_warning()
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@cache
def _silence_csr_beta_warning() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse.*")
        torch.sparse_csr_tensor(
            torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (0, 1)
        )
