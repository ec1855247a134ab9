"""Neighbours by decoder cosine: against a dense product, for ties, and for features that cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeffect.diffing.matching import NOBODY, TopPairs, match_decoders, mutual_neighbours
from saeffect.errors import BadFile, ConfigError, ShapeMismatch


def decoders(n_a: int = 60, n_b: int = 45, d_in: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_a, d_in, generator=generator), 3 * torch.randn(n_b, d_in, generator=generator)


def dense_cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    rows = [one.double().numpy() / np.linalg.norm(one.double().numpy(), axis=1, keepdims=True) for one in (a, b)]
    return rows[0] @ rows[1].T


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_neighbours_are_those_of_the_whole_matrix(chunk: int) -> None:
    a, b = decoders()
    cosines = dense_cosines(a, b)
    found = match_decoders(a, b, n=5, chunk=chunk)
    np.testing.assert_array_equal(found.forward.indices, np.argsort(-cosines, axis=1)[:, :5])
    np.testing.assert_array_equal(found.backward.indices, np.argsort(-cosines.T, axis=1)[:, :5])
    np.testing.assert_allclose(found.forward.similarity, -np.sort(-cosines, axis=1)[:, :5], atol=1e-12)
    np.testing.assert_allclose(found.backward.similarity, -np.sort(-cosines.T, axis=1)[:, :5], atol=1e-12)
    assert set(found.forward.reason) == {""}


def test_a_permuted_copy_is_found_whatever_its_scale() -> None:
    a, _ = decoders()
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(1))
    pairs = mutual_neighbours(match_decoders(a, 7 * a[order], n=2))
    np.testing.assert_array_equal(order.numpy()[pairs["b"]], pairs["a"])
    np.testing.assert_allclose(pairs["similarity"], 1.0, atol=1e-12)
    assert len(pairs) == len(a)


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_equal_features_rank_by_number_however_the_rows_are_cut(chunk: int) -> None:
    a = torch.ones(20, 4)
    found = match_decoders(a, torch.ones(30, 4), n=3, chunk=chunk)
    assert found.forward.indices.tolist() == [[0, 1, 2]] * 20
    assert found.backward.indices.tolist() == [[0, 1, 2]] * 30
    assert mutual_neighbours(found).to_numpy().tolist() == [[0.0, 0.0, 1.0]]


def test_ties_at_the_edge_of_a_block_go_to_the_lowest_number() -> None:
    top = TopPairs(2, 6, 2)
    top.add(0, torch.tensor([[0.5, 0.1, 0.5, 0.5, 0.5, 0.9]]))
    top.add(1, torch.tensor([[0.5, 0.5, 0.2, 0.5, 0.5, 0.5]]))
    assert top.forward[0].tolist() == [[5, 0], [0, 1]]
    assert top.backward[0].tolist() == [[0, 1], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1]]


def test_zero_rows_and_those_left_out_have_nobody_and_are_nobodys() -> None:
    a, b = decoders(6, 5)
    a[2], b[1] = 0, 0
    found = match_decoders(a, b, n=5, use_a=np.arange(6) != 4)
    assert found.forward.match[[2, 4]].tolist() == [NOBODY, NOBODY]
    assert np.isnan(found.forward.similarity[[2, 4]]).all()
    assert found.forward.reason[2] == "its decoder is zero"
    assert found.forward.reason[4] == "left out of the matching"
    assert not np.isin(found.backward.indices, [2, 4]).any()
    assert not (found.forward.indices == 1).any()
    assert found.forward.indices[0].tolist()[-1] == NOBODY  # only four of five can be compared
    assert {2, 4}.isdisjoint(mutual_neighbours(found)["a"])


def test_nobody_on_the_other_side() -> None:
    a, b = decoders(3, 2)
    found = match_decoders(a, b, use_b=np.zeros(2, dtype=bool))
    assert set(found.forward.reason) == {"the other SAE has no feature to compare with"}
    assert found.forward.alone.all()
    assert not found.backward.alone.any()
    assert len(mutual_neighbours(found)) == 0


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
    with pytest.raises(ShapeMismatch, match="no rows"):
        match_decoders(a[:0], b)
    with pytest.raises(ShapeMismatch, match="use_a"):
        match_decoders(a, b, use_a=np.ones(3, dtype=bool))
    with pytest.raises(ConfigError, match="n must be at least 1"):
        match_decoders(a, b, n=0)
    b[3, 3] = torch.nan
    with pytest.raises(BadFile):
        match_decoders(a, b)
