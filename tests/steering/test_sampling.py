from __future__ import annotations

import math

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.steering import NoiseCell, Sampling, exponential_noise, next_tokens, penalise


def reference_tokens(logits, cells, step, sampling):
    """Row by row, the whole vocabulary sorted in float64."""
    tokens = []
    for row, cell in zip(logits.double() / sampling.temperature, cells, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))
        probabilities = row.softmax(dim=-1)
        kept, mass = [], 0.0
        for i in order:
            if mass >= sampling.top_p:
                break
            kept.append(i)
            mass += probabilities[i].item()
        noise = exponential_noise(cell, step, len(row)).double()
        tokens.append(max(kept, key=lambda i: row[i].item() - math.log(noise[i].item())))
    return tokens


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
def test_top_p_equals_a_full_sort(top_p, spread):
    # Spread 0.02 is almost uniform: the first few hundred tokens cannot hold the mass.
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 1500, generator=generator) * spread
    cells = [NoiseCell(0, "p", i) for i in range(12)]
    sampling = Sampling(top_p=top_p, temperature=0.8)
    assert next_tokens(logits, cells, 0, sampling).tolist() == reference_tokens(logits, cells, 0, sampling)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.7])
def test_top_p_with_ties_keeps_the_lower_ids(top_p):
    # Coarse logits as bfloat16 gives: hundreds of equal values straddle the border of the set.
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 3, (12, 1500), generator=generator).float()
    cells = [NoiseCell(0, "p", i) for i in range(12)]
    sampling = Sampling(top_p=top_p)
    assert next_tokens(logits, cells, 5, sampling).tolist() == reference_tokens(logits, cells, 5, sampling)


def test_a_tiny_top_p_is_greedy_and_so_is_temperature_zero():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    cells = [NoiseCell(0, "p", 0)]
    assert next_tokens(logits, cells, 0, Sampling(top_p=1e-9)).tolist() == [1]
    assert next_tokens(logits, cells, 0, Sampling(temperature=0)).tolist() == [1]


def test_draws_follow_the_softmax_within_the_set():
    # Probabilities 0.5, 0.25, 0.125, 0.125; top_p 0.7 keeps the first two: 2/3 and 1/3.
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(6000, 1)
    cells = [NoiseCell(0, "p", i) for i in range(6000)]
    drawn = next_tokens(logits, cells, 0, Sampling(top_p=0.7)).bincount(minlength=4)
    assert drawn[2:].tolist() == [0, 0]
    assert abs(drawn[0].item() / 6000 - 2 / 3) < 0.025  # 4 standard errors
    drawn = next_tokens(logits, cells, 1, Sampling(top_p=1.0)).bincount(minlength=4) / 6000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.026)


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((200, 600), -math.inf)
    logits[:, 7] = 0.0
    cells = [NoiseCell(0, "p", i) for i in range(200)]
    for sampling in (Sampling(top_p=0.99), Sampling(top_p=1), Sampling(temperature=0)):
        assert next_tokens(logits, cells, 0, sampling).unique().tolist() == [7]


def test_equal_cells_share_noise_and_different_ones_do_not():
    base = exponential_noise(NoiseCell(0, "Hello", 1), 3, 50)
    assert torch.equal(base, exponential_noise(NoiseCell(0, "Hello", 1), 3, 50))
    assert (base > 0).all()
    for cell, step in [
        (NoiseCell(1, "Hello", 1), 3),
        (NoiseCell(0, "Hello!", 1), 3),
        (NoiseCell(0, "Hello", 2), 3),
        (NoiseCell(0, "Hello", 1), 4),
    ]:
        assert not torch.equal(base, exponential_noise(cell, step, 50))


def test_rows_of_one_cell_draw_the_same_token_whatever_is_beside_them():
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(1, 300, generator=generator)
    other = torch.randn(4, 300, generator=generator)
    cell, sampling = NoiseCell(0, "p", 2), Sampling(top_p=0.9)
    alone = next_tokens(row, [cell], 0, sampling).item()
    mixed = next_tokens(
        torch.cat([other, row, row]), [NoiseCell(0, "q", i) for i in range(4)] + [cell, cell], 0, sampling
    )
    assert mixed[4:].tolist() == [alone, alone]


def test_frequency_penalty_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    generated = torch.tensor([[2, 2, 0], [1, 1, 1]])
    assert penalise(logits, generated, 0.5).tolist() == [[0.5, 2.0, 2.0], [1.0, 0.5, 3.0]]
    assert logits.tolist() == [[1.0, 2.0, 3.0]] * 2
    assert penalise(logits, generated[:, :0], 0.5) is logits


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_new_tokens", 0),
        ("frequency_penalty", math.nan),
    ],
)
def test_bad_settings(field, value):
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})


def test_cells_must_match_rows():
    with pytest.raises(ShapeMismatch):
        next_tokens(torch.zeros(2, 3), [NoiseCell(0, "p", 0)], 0, Sampling())
