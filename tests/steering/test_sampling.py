"""Noise that paired rows share, and the tokens that are drawn with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from saeffect.errors import ConfigError
from saeffect.steering.sampling import (
    NoiseCell,
    Sampling,
    exponential_noise,
    exponential_noise_at,
    next_tokens,
    penalise,
    philox,
)

D_VOCAB = 4099  # not a multiple of four


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that come with the paper's Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox(words(*counter), words(*key))) == expected


@pytest.mark.parametrize("d_vocab", [1, 3, 4, 5, D_VOCAB])
def test_noise_at_tokens_equals_the_whole(d_vocab):
    cells = [NoiseCell(3, "Hello", 0), NoiseCell(3, "Hello", 1), NoiseCell(3, "Hello", 0)]
    ids = torch.randint(d_vocab, (3, 37), generator=torch.Generator().manual_seed(0))
    found = exponential_noise_at(cells, 7, ids)
    assert found.dtype == torch.float32
    for row, cell in enumerate(cells):
        whole = exponential_noise(cell, 7, d_vocab)
        assert whole.shape == (d_vocab,)
        assert torch.equal(found[row], whole[ids[row]])


def test_a_longer_vocabulary_begins_with_the_same_noise():
    cell = NoiseCell(0, "p", 0)
    assert torch.equal(exponential_noise(cell, 0, 50), exponential_noise(cell, 0, 61)[:50])


def test_noise_is_frozen():
    # Texts of studies depend on it: when these numbers must change, so must the steering stage's version.
    found = exponential_noise(NoiseCell(0, "Hi", 1), 2, 4)
    assert found.tolist() == pytest.approx(FROZEN, rel=1e-6)


FROZEN = [2.32708263, 0.0960296243, 3.15999222, 0.836334825]


def test_one_step_is_exponential():
    noise = exponential_noise(NoiseCell(0, "p", 0), 0, 200_000).double().numpy()
    assert noise.min() > 0
    assert stats.kstest(noise, "expon").pvalue > 0.001
    # Gumbel-max looks at the smallest draws: of 200,000 the lowest hundredth must be right on its own scale.
    low = np.sort(noise)[:2000]
    assert stats.kstest(-np.expm1(-low) / -np.expm1(-low[-1]), "uniform").pvalue > 0.001


def test_one_token_over_cells_and_steps_is_exponential():
    ids = torch.full((400, 1), 17)
    for cells, steps in (
        ([NoiseCell(0, "p", i) for i in range(400)], range(50)),
        ([NoiseCell(i, "p", 0) for i in range(400)], range(50)),
    ):
        noise = torch.cat([exponential_noise_at(cells, step, ids) for step in steps]).double()
        assert stats.kstest(noise.flatten().numpy(), "expon").pvalue > 0.001


@pytest.mark.parametrize(
    ("cell", "step"),
    [
        (NoiseCell(0, "Hello", 1), 4),
        (NoiseCell(0, "Hello", 2), 3),
        (NoiseCell(1, "Hello", 1), 3),
        (NoiseCell(0, "Hello!", 1), 3),
    ],
)
def test_cells_and_steps_are_independent(cell, step):
    a = exponential_noise(NoiseCell(0, "Hello", 1), 3, 100_000).double().numpy()
    b = exponential_noise(cell, step, 100_000).double().numpy()
    for lag in (0, 1, 4):  # four tokens share a counter
        n = len(a) - lag
        assert abs(stats.spearmanr(a[lag:], b[:n]).statistic) < 4 / np.sqrt(n)
    # Ten by ten cells of equal probability.
    table = np.histogram2d(np.exp(-a), np.exp(-b), bins=10, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.ravel()).pvalue > 0.001


def test_neighbouring_tokens_are_independent():
    noise = exponential_noise(NoiseCell(0, "p", 0), 0, 400_000).double().numpy().reshape(-1, 4)
    correlation = np.corrcoef(noise.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(noise))


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


def test_tiny_top_p_and_zero_temperature_are_greedy():
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
    drawn = next_tokens(logits[:1500], cells[:1500], 1, Sampling(top_p=1.0)).bincount(minlength=4) / 1500
    assert torch.allclose(drawn, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.052)


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((200, 600), -math.inf)
    logits[:, 7] = 0.0
    cells = [NoiseCell(0, "p", i) for i in range(200)]
    for sampling in (Sampling(top_p=0.99), Sampling(top_p=1), Sampling(temperature=0)):
        assert next_tokens(logits, cells, 0, sampling).unique().tolist() == [7]


def test_only_equal_cells_share_noise():
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


def test_draws_do_not_depend_on_other_rows():
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
    penalise(logits, generated[:, :0], 0.5)
    penalise(logits, generated, 0.0)
    assert logits.tolist() == [[1.0, 2.0, 3.0]] * 2
    penalise(logits, generated, 0.5)
    assert logits.tolist() == [[0.5, 2.0, 2.0], [1.0, 0.5, 3.0]]


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
