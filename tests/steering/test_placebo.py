from __future__ import annotations

import pytest
import torch

from saeffect.errors import BadFile, EmptySelection, Undefined, UnknownName
from saeffect.steering import Directions, random_direction
from saeffect.steering.placebo import turned_at_random


def test_random_directions_depend_on_their_arguments_only():
    first = random_direction(16, seed=1, feature=7, draw=(2, 0))
    assert torch.equal(first, random_direction(16, seed=1, feature=7, draw=(2, 0)))
    assert first.norm().item() == pytest.approx(1, abs=1e-6)
    others = [
        random_direction(16, seed=2, feature=7, draw=(2, 0)),
        random_direction(16, seed=1, feature=8, draw=(2, 0)),
        random_direction(16, seed=1, feature=7, draw=(2, 1)),
        random_direction(16, seed=1, feature=7, draw=(0, 2)),
        random_direction(16, seed=1, feature=7),
        random_direction(16, seed=1, feature=7, draw=(2,)),
    ]
    assert all((first @ other).abs() < 0.95 for other in others)


def test_random_directions_point_nowhere_in_particular():
    drawn = torch.stack([random_direction(8, seed=0, feature=f) for f in range(4000)])
    assert drawn.mean(dim=0).abs().max() < 4 * (1 / 8 / 4000) ** 0.5
    assert (drawn.var(dim=0) * 8 - 1).abs().max() < 0.1


def test_directions():
    directions = Directions(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, float("nan")]]).half())
    assert directions.norm(0) == 5
    assert torch.allclose(directions.unit(0, "steered"), torch.tensor([0.6, 0.8]))
    assert directions.unit(0, "random", (1, 2)).norm().item() == pytest.approx(1)
    with pytest.raises(Undefined, match="feature 1 is zero"):
        directions.unit(1, "steered")
    with pytest.raises(BadFile, match="feature 2"):
        directions.norm(2)
    with pytest.raises(UnknownName):
        directions.unit(0, "randon")


@pytest.mark.parametrize("n", [1, 2, 3, 8, 11])
def test_several_directions_are_turned_as_one(n):
    rows = torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) * torch.arange(1.0, n + 1)[:, None]
    turned = turned_at_random(rows, 1, 7, (2, 0))
    torch.testing.assert_close(turned @ turned.T, rows @ rows.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(turned, turned_at_random(rows, 1, 7, (2, 0)))
    assert not torch.allclose(turned, turned_at_random(rows, 1, 7, (2, 1)), atol=0.1)
    assert not torch.allclose(turned, rows, atol=0.1)
    if n == 1:
        torch.testing.assert_close(turned[0], random_direction(8, seed=1, feature=7, draw=(2, 0)) * rows[0].norm())


def test_parallel_directions_stay_parallel():
    row = torch.arange(1.0, 9)
    turned = turned_at_random(torch.stack([row, -2 * row]), 0, 3)
    torch.testing.assert_close(turned[1], -2 * turned[0], rtol=1e-4, atol=1e-4)


def test_matched_placebos_take_turns_over_prompts_and_samples():
    W_dec = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 0, 5.0]])
    directions = Directions(W_dec, matched={0: [1, 2]})
    assert directions.unit(0, "matched", (0, 0)).tolist() == [0, 1, 0]
    assert directions.unit(0, "matched", (0, 1)).tolist() == [0, 0, 1]
    assert directions.unit(0, "matched", (1, 1)).tolist() == [0, 1, 0]
    with pytest.raises(EmptySelection, match="feature 1 has no matched"):
        directions.unit(1, "matched", (0, 0))
