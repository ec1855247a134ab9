"""The one-to-one pairing: against scipy's dense solver, for ties, and where somebody must stay alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from saeffect.diffing.matching_graph import assign, edges
from scipy.optimize import linear_sum_assignment

from saeffect.diffing.matching import NOBODY, match_decoders
from saeffect.errors import ConfigError


@pytest.mark.parametrize(("n_a", "n_b"), [(30, 30), (40, 25), (25, 40)])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_it_agrees_with_the_dense_solver_on_a_whole_graph(n_a: int, n_b: int, floor: float) -> None:
    generator = torch.Generator().manual_seed(n_a)
    a, b = torch.randn(n_a, 6, generator=generator), torch.randn(n_b, 6, generator=generator)
    found = assign(match_decoders(a, b, n=max(n_a, n_b)), floor=floor)
    cosines = torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=2).numpy()
    worth = np.maximum(cosines - floor, 0)  # not worth a pair: alone
    rows, columns = linear_sum_assignment(worth, maximize=True)
    real = worth[rows, columns] > 0
    expected = np.full(n_a, NOBODY)
    expected[rows[real]] = columns[real]
    np.testing.assert_array_equal(found.b_of_a, expected)
    assert found.total == pytest.approx(worth[rows, columns].sum())


def test_on_the_neighbour_graph_no_pairing_is_better() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(50, 5, generator=generator), torch.randn(50, 5, generator=generator)
    matching = match_decoders(a, b, n=3)
    from_a, to_b, similarity = edges(matching)
    graph = np.zeros((50, 50))
    graph[from_a, to_b] = np.maximum(similarity, 0)
    rows, columns = linear_sum_assignment(graph, maximize=True)
    found = assign(matching)
    assert found.total == pytest.approx(graph[rows, columns].sum())
    paired = np.flatnonzero(found.b_of_a != NOBODY)
    assert len(set(found.b_of_a[paired])) == len(paired)
    np.testing.assert_array_equal(found.a_of_b[found.b_of_a[paired]], paired)
    assert len(from_a) == len(set(zip(from_a.tolist(), to_b.tolist(), strict=True)))
    assert set(zip(paired.tolist(), found.b_of_a[paired].tolist(), strict=True)) <= set(
        zip(from_a.tolist(), to_b.tolist(), strict=True)
    )


def test_who_stays_alone_and_why() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [0.0, 0.0]])
    found = assign(match_decoders(a, torch.tensor([[1.0, 0.1]]), n=1))
    assert found.b_of_a.tolist() == [NOBODY, 0, NOBODY, NOBODY]
    assert found.a_of_b.tolist() == [1]
    assert found.reason == (
        "its neighbours have better partners",
        "",
        "no neighbour is more similar than 0",
        "its decoder is zero",
    )
    np.testing.assert_allclose(found.similarity, [np.nan, 1, np.nan, np.nan])


def test_ties_come_out_the_same_every_time() -> None:
    a = torch.eye(3).repeat(2, 1)
    first, second = (assign(match_decoders(a, a, n=6)) for _ in range(2))
    np.testing.assert_array_equal(first.b_of_a, second.b_of_a)
    assert first.total == pytest.approx(6)
    assert sorted(first.b_of_a) == list(range(6))


def test_nothing_to_pair() -> None:
    found = assign(match_decoders(torch.eye(2), -torch.eye(2), n=1))
    assert found.b_of_a.tolist() == [NOBODY, NOBODY]
    assert found.total == 0
    with pytest.raises(ConfigError, match="floor"):
        assign(match_decoders(torch.eye(2), torch.eye(2)), floor=float("nan"))
