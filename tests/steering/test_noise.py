from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from saeffect.errors import ShapeMismatch
from saeffect.steering import NoiseCell, exponential_noise, exponential_noise_at
from saeffect.steering.noise import philox

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
def test_noise_at_tokens_is_the_whole_vocabularys_noise_there(d_vocab):
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


def test_it_does_not_change_from_one_release_to_the_next():
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


def test_as_many_cells_as_rows():
    with pytest.raises(ShapeMismatch, match="one row a cell"):
        exponential_noise_at([NoiseCell(0, "p", 0)], 0, torch.zeros(2, 3, dtype=torch.int64))
