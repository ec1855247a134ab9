"""Sampling noise that can be asked for at any token: a function of seed, prompt, sample, step and token id.

Rows that are to be compared must meet the same luck, whatever else is in the batch, and with top_p only a few of
fifty thousand tokens need any noise. A generator that runs through the vocabulary would draw it for all; a
counter-based one is evaluated where it is needed: word number `id` of step `step` of a cell is a fixed function of
the three. The function is Philox 4x32-10; the cell's name decides its key and half of its counter.

Source:
    Salmon et al. (2011), Parallel Random Numbers: As Easy as 1, 2, 3.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import ShapeMismatch

__all__ = ["NoiseCell", "exponential_noise", "exponential_noise_at", "philox"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class NoiseCell:
    """What the sampling noise of a row depends on; rows with equal cells share it.

    Attributes:
        seed: The study's seed.
        prompt: The prompt's text (not its number, so that leaving a prompt out changes no other).
        sample: Number of the repetition, from 0.
    """

    seed: int
    prompt: str
    sample: int


def exponential_noise(cell: NoiseCell, step: int, d_vocab: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The noise of one step at every token: standard exponential draws, float32 `[d_vocab]`, above 0.

    Minus the logarithm of it is Gumbel noise; kept in this form, the logarithm is taken only where needed.

    Example:
        >>> a, b = (exponential_noise(NoiseCell(0, "Hi", 1), step=3, d_vocab=4) for _ in range(2))
        >>> bool((a == b).all())
        True
    """
    blocks = torch.arange((d_vocab + 3) // 4, device=device)
    words = torch.stack(philox(*_counter(_names([cell], device), step, blocks[None])), dim=-1)
    return _exponential(words.flatten()[:d_vocab])


def exponential_noise_at(cells: Sequence[NoiseCell], step: int, ids: Tensor) -> Tensor:
    """The same noise at some tokens only.

    Args:
        cells: One a row.
        step: How many tokens were generated before.
        ids: Token ids, int64 `[rows, n]`.

    Returns:
        Float32 `[rows, n]`, on the device of `ids`: entry (r, i) is
        `exponential_noise(cells[r], step, d_vocab)[ids[r, i]]`.

    Raises:
        ShapeMismatch: Not as many cells as rows.

    Example:
        >>> cell = NoiseCell(0, "Hi", 1)
        >>> at = exponential_noise_at([cell], 3, torch.tensor([[2, 0]]))[0]
        >>> bool((at == exponential_noise(cell, 3, 4)[[2, 0]]).all())
        True
    """
    if ids.ndim != 2 or len(ids) != len(cells):
        raise ShapeMismatch(f"token ids have shape {tuple(ids.shape)}; expected [{len(cells)}, n], one row a cell.")
    # One call gives the words of four neighbouring tokens.
    words = philox(*_counter(_names(cells, ids.device), step, ids >> 2))
    word = ids & 3
    low = torch.where(word == 0, words[0], words[1])
    high = torch.where(word == 2, words[2], words[3])
    return _exponential(torch.where(word < 2, low, high))


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox 4x32-10: four random words from a counter and a key, all int64 tensors of 32-bit values, broadcast.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [f"{int(word):08x}" for word in philox((zero, zero, zero, zero), (zero, zero))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for number in range(_ROUNDS):
        if number:
            k, l = (k + _KEY_STEPS[0]) & _MASK, (l + _KEY_STEPS[1]) & _MASK  # noqa: E741
        # A product of two 32-bit words wraps around to a negative int64, with the right 64 bits all the same.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((second >> 32) & _MASK) ^ b ^ k, second & _MASK, ((first >> 32) & _MASK) ^ d ^ l, first & _MASK
    return a, b, c, d


def _counter(names: Tensor, step: int, blocks: Tensor) -> tuple[Words, tuple[Tensor, Tensor]]:
    """Counter and key for some blocks of four tokens: `names` `[rows, 4]`, `blocks` `[rows, n]`."""
    k, l, c, d = names.unsqueeze(-1).unbind(1)  # noqa: E741
    return (blocks, torch.full_like(c, step), c, d), (k, l)


def _names(cells: Sequence[NoiseCell], device: torch.device | str) -> Tensor:
    """Four 32-bit words a cell, int64 `[cells, 4]`."""
    return torch.tensor([_name(cell) for cell in cells], device=device).view(-1, 4)


@functools.lru_cache(maxsize=4096)
def _name(cell: NoiseCell) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr((cell.seed, cell.prompt, cell.sample)).encode(), digest_size=16).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))


def _exponential(words: Tensor) -> Tensor:
    """Standard exponential draws from 32-bit words: float32, from 1.2e-10 to 22.9, in steps of 2^-32 near 0."""
    uniform = (words.double() + 0.5) * 2.0**-32
    return (-torch.log1p(-uniform)).float()
