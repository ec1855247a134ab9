"""Neighbours by decoder cosine: against a dense product, for ties, and for features that cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saeffect.diffing import matching
from saeffect.diffing.matching import NO_MATCH, TopPairs, assign, match_decoders
from saeffect.errors import BadFile, ShapeMismatch


def decoders(n_a: int = 60, n_b: int = 45, d_in: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_a, d_in, generator=generator), 3 * torch.randn(n_b, d_in, generator=generator)


def dense_cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    rows = [one.double().numpy() / np.linalg.norm(one.double().numpy(), axis=1, keepdims=True) for one in (a, b)]
    return rows[0] @ rows[1].T


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_neighbours_are_those_of_the_whole_matrix(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_ROWS", chunk)
    a, b = decoders()
    cosines = dense_cosines(a, b)
    found = match_decoders(a, b, n=5)
    np.testing.assert_array_equal(found.forward.indices, np.argsort(-cosines, axis=1)[:, :5])
    np.testing.assert_array_equal(found.backward.indices, np.argsort(-cosines.T, axis=1)[:, :5])
    np.testing.assert_allclose(found.forward.similarity, -np.sort(-cosines, axis=1)[:, :5], atol=1e-12)
    np.testing.assert_allclose(found.backward.similarity, -np.sort(-cosines.T, axis=1)[:, :5], atol=1e-12)
    assert set(found.forward.reason) == {""}


def test_a_permuted_copy_is_found_whatever_its_scale() -> None:
    a, _ = decoders()
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(1))
    found = match_decoders(a, 7 * a[order], n=2)
    np.testing.assert_array_equal(order.numpy()[found.forward.match], np.arange(len(a)))
    np.testing.assert_allclose(found.forward.best, 1.0, atol=1e-12)
    assert found.mutual.all()


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_ties_rank_by_number_in_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_ROWS", chunk)
    a = torch.ones(20, 4)
    found = match_decoders(a, torch.ones(30, 4), n=3)
    assert found.forward.indices.tolist() == [[0, 1, 2]] * 20
    assert found.backward.indices.tolist() == [[0, 1, 2]] * 30
    assert np.flatnonzero(found.mutual).tolist() == [0]
    assert np.flatnonzero(found.reversed().mutual).tolist() == [0]


def test_ties_at_a_block_edge_take_lowest_number() -> None:
    top = TopPairs(2, 6, 2)
    top.add(0, torch.tensor([[0.5, 0.1, 0.5, 0.5, 0.5, 0.9]]))
    top.add(1, torch.tensor([[0.5, 0.5, 0.2, 0.5, 0.5, 0.5]]))
    assert top.forward[0].tolist() == [[5, 0], [0, 1]]
    assert top.backward[0].tolist() == [[0, 1], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1]]


def test_zero_and_excluded_rows_have_no_match() -> None:
    a, b = decoders(6, 5)
    a[2], b[1] = 0, 0
    found = match_decoders(a, b, n=5, use_a=np.arange(6) != 4)
    assert found.forward.match[[2, 4]].tolist() == [NO_MATCH, NO_MATCH]
    assert np.isnan(found.forward.similarity[[2, 4]]).all()
    assert found.forward.reason[2] == "its decoder is zero"
    assert found.forward.reason[4] == "left out of the matching"
    assert not np.isin(found.backward.indices, [2, 4]).any()
    assert not (found.forward.indices == 1).any()
    assert found.forward.indices[0].tolist()[-1] == NO_MATCH  # only four of five can be compared
    assert not found.mutual[[2, 4]].any()


def test_nobody_on_the_other_side() -> None:
    a, b = decoders(3, 2)
    found = match_decoders(a, b, use_b=np.zeros(2, dtype=bool))
    assert set(found.forward.reason) == {"the other SAE has no feature to compare with"}
    assert set(found.backward.reason) == {"left out of the matching"}
    assert not found.mutual.any()


def test_opposite_directions_are_not_alike() -> None:
    found = match_decoders(torch.eye(2), -torch.eye(2), n=2)
    assert found.forward.match.tolist() == [1, 0]
    assert found.forward.best.tolist() == [0.0, 0.0]
    assert found.forward.runner_up.tolist() == [-1.0, -1.0]
    assert found.reversed().forward is found.backward


def test_bad_input() -> None:
    a, b = decoders()
    with pytest.raises(ShapeMismatch, match="same d_in"):
        match_decoders(a, b[:, :5])
    with pytest.raises(ShapeMismatch, match="at least one row"):
        match_decoders(a[:0], b)
    with pytest.raises(ShapeMismatch, match="use_a"):
        match_decoders(a, b, use_a=np.ones(3, dtype=bool))
    b[3, 3] = torch.nan
    with pytest.raises(BadFile):
        match_decoders(a, b)


@pytest.mark.parametrize(("n_a", "n_b"), [(30, 30), (40, 25), (25, 40)])
def test_pairing_agrees_with_the_dense_solver(n_a: int, n_b: int) -> None:
    generator = torch.Generator().manual_seed(n_a)
    a, b = torch.randn(n_a, 6, generator=generator), torch.randn(n_b, 6, generator=generator)
    found = assign(match_decoders(a, b, n=max(n_a, n_b)))
    cosines = torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=2).numpy()
    worth = np.maximum(cosines, 0)  # not worth a pair: alone
    rows, columns = linear_sum_assignment(worth, maximize=True)
    real = worth[rows, columns] > 0
    expected = np.full(n_a, NO_MATCH)
    expected[rows[real]] = columns[real]
    np.testing.assert_array_equal(found.b_of_a, expected)
    assert np.nansum(found.similarity) == pytest.approx(worth[rows, columns].sum())


def test_on_the_neighbour_graph_no_pairing_is_better() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(50, 5, generator=generator), torch.randn(50, 5, generator=generator)
    neighbours = match_decoders(a, b, n=3)
    from_a, to_b, similarity = matching._edges(neighbours)
    graph = np.zeros((50, 50))
    graph[from_a, to_b] = np.maximum(similarity, 0)
    rows, columns = linear_sum_assignment(graph, maximize=True)
    found = assign(neighbours)
    assert np.nansum(found.similarity) == pytest.approx(graph[rows, columns].sum())
    paired = np.flatnonzero(found.b_of_a != NO_MATCH)
    assert len(set(found.b_of_a[paired])) == len(paired)
    np.testing.assert_array_equal(found.a_of_b[found.b_of_a[paired]], paired)
    assert len(from_a) == len(set(zip(from_a.tolist(), to_b.tolist(), strict=True)))
    assert set(zip(paired.tolist(), found.b_of_a[paired].tolist(), strict=True)) <= set(
        zip(from_a.tolist(), to_b.tolist(), strict=True)
    )


def test_pairing_leaves_the_worse_alone() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [0.0, 0.0]])
    found = assign(match_decoders(a, torch.tensor([[1.0, 0.1]]), n=1))
    assert found.b_of_a.tolist() == [NO_MATCH, 0, NO_MATCH, NO_MATCH]
    assert found.a_of_b.tolist() == [1]
    np.testing.assert_allclose(found.similarity, [np.nan, 1, np.nan, np.nan])


def test_ties_come_out_the_same_every_time() -> None:
    a = torch.eye(3).repeat(2, 1)
    first, second = (assign(match_decoders(a, a, n=6)) for _ in range(2))
    np.testing.assert_array_equal(first.b_of_a, second.b_of_a)
    assert np.nansum(first.similarity) == pytest.approx(6)
    assert sorted(first.b_of_a) == list(range(6))


def test_nothing_to_pair() -> None:
    found = assign(match_decoders(torch.eye(2), -torch.eye(2), n=1))
    assert found.b_of_a.tolist() == [NO_MATCH, NO_MATCH]
    assert np.isnan(found.similarity).all()
