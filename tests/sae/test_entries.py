"""Sparse and dense entries do the same, and both what whole matrices do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeffect.sae.entries import DenseEntries, Entries, SparseEntries


def sparse_entries(dense: Tensor) -> SparseEntries:
    """The positive entries of a matrix."""
    token, feature = (dense > 0).nonzero(as_tuple=True)
    return SparseEntries(token, feature, dense[token, feature], (dense.shape[0], dense.shape[1]))


FORMS: dict[str, Callable[[Tensor], Entries]] = {
    "sparse": sparse_entries,
    "dense": DenseEntries,
    "dense with scratch": lambda dense: DenseEntries(dense, scratch=torch.full_like(dense, torch.nan)),
}
both = pytest.mark.parametrize("form", FORMS)


class Problem:
    """A mostly empty matrix of positive entries, and what it is multiplied with."""

    def __init__(self, seed: int, n: int, d_sae: int, d_in: int, share: float) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.acts = torch.rand(n, d_sae, generator=draw) + 0.1
        self.acts *= torch.rand(n, d_sae, generator=draw) < share
        self.left = torch.randn(n, d_in, generator=draw)
        self.W = torch.randn(d_sae, d_in, generator=draw)
        self.of_feature = torch.randn(d_sae, generator=draw)
        self.of_token = torch.randn(n, generator=draw)


problems = st.builds(
    Problem,
    st.integers(0, 9999),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([0, 0.1, 1]),
)


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@both
@given(problem=problems)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_products(problem: Problem, form: str) -> None:
    acts, left, W = problem.acts, problem.left, problem.W
    entries = FORMS[form](acts.clone())
    on = acts > 0
    # Values other than the entries' own: twice them, less one.
    values, A = 2 * entries.values - 1, torch.where(on, 2 * acts - 1, 0)
    if isinstance(entries, DenseEntries):
        values = values * (entries.values > 0)
    _same(entries.decode(entries.values, W), acts @ W)
    _same(entries.decode(values, W), A @ W)
    _same(entries.outer(values, left, torch.full_like(W, torch.nan)), A.T @ left)
    _same(entries.outer(values, left, W.clone(), add=True), W + A.T @ left)
    _same(entries.feature_sums(values), A.sum(0))
    _same(entries.to_dense(values), A)
    assert torch.equal(entries.to_dense(), acts)
    assert torch.equal(entries.counts(), on.sum(0))
    assert entries.counts().dtype == torch.int64
    inner = entries.inner(left, W)
    assert inner.shape == entries.values.shape
    _same(entries.to_dense(inner) * on, (left @ W.T) * on)


@both
@given(problem=problems)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_number_a_feature(problem: Problem, form: str) -> None:
    entries, on = FORMS[form](problem.acts.clone()), problem.acts > 0
    by_feature = entries.values * entries.per_feature(problem.of_feature)
    _same(entries.to_dense(by_feature) * on, problem.acts * problem.of_feature)


@both
@given(problem=problems, lowest=st.floats(0, 1.2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_only_some(problem: Problem, form: str, lowest: float) -> None:
    entries = FORMS[form](problem.acts.clone())
    kept = entries.where(entries.values > lowest)
    acts = problem.acts * (problem.acts > lowest)
    assert torch.equal(kept.to_dense(), acts)
    assert torch.equal(kept.counts(), (acts > 0).sum(0))
    _same(kept.decode(kept.values, problem.W), acts @ problem.W)
    _same(kept.outer(kept.values, problem.left, torch.empty_like(problem.W)), acts.T @ problem.left)
    assert torch.equal(entries.to_dense(), problem.acts), "the entries that were asked stay as they are"


@both
def test_results_are_written_where_asked(form: str) -> None:
    problem = Problem(0, 5, 9, 4, 0.5)
    entries, out = FORMS[form](problem.acts), torch.zeros(9, 4)
    assert entries.outer(entries.values, problem.left, out).data_ptr() == out.data_ptr()
    assert out.abs().sum() > 0


def test_by_hand() -> None:
    """[[0, 3], [0, 0], [5, 7]]"""
    entries = sparse_entries(torch.tensor([[0.0, 3.0], [-1.0, 0.0], [5.0, 7.0]]))
    assert (entries.token.tolist(), entries.feature.tolist()) == ([0, 2, 2], [1, 0, 1])
    assert entries.values.tolist() == [3.0, 5.0, 7.0]
    W = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    assert entries.decode(entries.values, W).tolist() == [[300.0, 3000.0], [0.0, 0.0], [705.0, 7050.0]]
    left = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 2.0]])
    assert entries.inner(left, W).tolist() == [100.0, 20.0, 2000.0]
    assert entries.outer(entries.values, left, torch.empty(2, 2)).tolist() == [[0.0, 10.0], [3.0, 14.0]]
    assert entries.counts().tolist() == [1, 2]
    assert entries.feature_sums(torch.tensor([1.0, -1.0, 1.0])).tolist() == [-1.0, 2.0]


def test_zero_entries_do_not_count_as_firing() -> None:
    entries = SparseEntries(torch.tensor([0, 0]), torch.tensor([1, 3]), torch.tensor([0.0, 2.0]), (1, 4))
    assert entries.counts().tolist() == [0, 0, 0, 1]
