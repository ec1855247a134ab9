"""Sampling with temperature, top_p, frequency penalty, and Gumbel noise shared by paired rows.

The token with the largest `logit / temperature + Gumbel noise` is a draw from the softmax. The noise is a function of
(seed, prompt, sample, step, token) alone (*common random numbers*), by Philox 4x32-10 (Salmon et al. 2011).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from saeffect.config import SamplingConfig
from saeffect.config_keys import config_error
from saeffect.errors import Undefined

__all__ = [
    "NoiseCell",
    "Sampling",
    "exponential_noise",
    "exponential_noise_at",
    "next_tokens",
    "penalise",
    "philox",
]

# Most probable tokens tried before the whole vocabulary is sorted (a set of mass 0.3 has a handful).
_FIRST_TRIES = (16, 128, 1024)
# Tokens per block maximum in the search for the most probable ones.
_BLOCK = 64
_NOISE_CHUNK = 1 << 18  # draws: enough for all threads, few enough for the cache
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class NoiseCell:
    """Determines the sampling noise of a row; rows with equal cells have equal noise."""

    seed: int
    prompt: str
    sample: int


def exponential_noise(cell: NoiseCell, step: int, d_vocab: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Standard exponential draws at every token, float32 `[d_vocab]`, above 0; minus the logarithm is Gumbel noise."""
    return _noise([cell], step, d_vocab, device)[0]


def _noise(cells: Sequence[NoiseCell], step: int, d_vocab: int, device: torch.device | str) -> Tensor:
    """`exponential_noise` with one row a cell; several cells at once if the vocabulary is small."""
    blocks = torch.arange((d_vocab + 3) // 4, device=device)[None]
    n = max(1, _NOISE_CHUNK // d_vocab)
    parts = [
        _exponential(torch.stack(philox(*_counter(cells[i : i + n], step, blocks)), dim=-1).flatten(1)[:, :d_vocab])
        for i in range(0, len(cells), n)
    ]
    return torch.cat(parts)


def exponential_noise_at(cells: Sequence[NoiseCell], step: int, ids: Tensor) -> Tensor:
    """`exponential_noise` at tokens `ids` (int64 `[rows, n]`) only, one cell a row."""
    # One call gives the words of four neighbouring tokens.
    words = philox(*_counter(cells, step, ids >> 2))
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
        # A product of two 32-bit words can wrap around to a negative int64; its 64 bits are still right.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((second >> 32) & _MASK) ^ b ^ k, second & _MASK, ((first >> 32) & _MASK) ^ d ^ l, first & _MASK
    return a, b, c, d


def _counter(cells: Sequence[NoiseCell], step: int, blocks: Tensor) -> tuple[Words, tuple[Tensor, Tensor]]:
    """Counter and key for blocks of four tokens, `[cells, n]`."""
    cell_words = torch.tensor([_cell_words(cell) for cell in cells], device=blocks.device).view(-1, 4)
    k, l, c, d = cell_words.unsqueeze(-1).unbind(1)  # noqa: E741
    return (blocks, torch.full_like(c, step), c, d), (k, l)


@functools.lru_cache(maxsize=4096)
def _cell_words(cell: NoiseCell) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr((cell.seed, cell.prompt, cell.sample)).encode(), digest_size=16).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))


def _exponential(words: Tensor) -> Tensor:
    """Standard exponential draws from 32-bit words: float32, from 1.2e-10 to 22.9, in steps of 2^-32 near 0."""
    uniform = (words.double() + 0.5) * 2.0**-32
    return (-torch.log1p(-uniform)).float()


class Sampling(SamplingConfig):
    """How continuations are drawn. The defaults are the paper's, except for end-of-text.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: Only the smallest set of most probable tokens with at least this mass may be drawn; ties go to the lower
            id.
        frequency_penalty: Subtracted from a token's logit, before the temperature, for each time it was generated.
        allow_end: False forbids end-of-text and all other special tokens, so that all continuations have
            `max_new_tokens` tokens and their similarities and repetition are comparable.
    """

    allow_end: bool = False

    @property
    def as_published(self) -> bool:
        """Whether texts are sampled and scored as in the paper's code: BOS is steered like the prompt, the penalty
        counts BOS and prompt, special tokens may be drawn and do not end a text, rows share no noise, and the
        similarity is that of prompt and continuation to the tokens as the vocabulary spells them (`Ġdrug`).
        """
        return self.protocol == "paper"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(type(self), error) from error


def penalise(logits: Tensor, generated: Tensor, frequency_penalty: float) -> None:
    """Take the penalty (nats) off `logits` `[rows, d_vocab]`, in place, for each time a token was generated.

    Example:
        >>> logits = torch.zeros(1, 4)
        >>> penalise(logits, torch.tensor([[2, 0, 2]]), 0.5)
        >>> logits.tolist()
        [[-0.5, 0.0, -1.0, 0.0]]
    """
    if frequency_penalty == 0 or generated.shape[1] == 0:
        return
    # Counted first, since a sum of small penalties rounds differently. Repeated tokens are rewritten with equal values.
    counts = (generated[:, :, None] == generated[:, None, :]).sum(dim=-1, dtype=logits.dtype)
    logits.scatter_(1, generated, logits.gather(1, generated) - frequency_penalty * counts)


def next_tokens(logits: Tensor, cells: Sequence[NoiseCell], step: int, sampling: Sampling) -> Tensor:
    """One token a row, int64 `[rows]`; top_p as in Holtzman et al. (2020). `logits` are `[rows, d_vocab]`, any float
    dtype, penalties already taken off, forbidden tokens at -inf; `step` counts the tokens generated before.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return _most_probable(logits)
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    if sampling.top_p == 1:
        index = {cell: i for i, cell in enumerate(dict.fromkeys(cells))}
        noise = _noise(list(index), step, scaled.shape[1], scaled.device)
        noise_row = torch.tensor([index[cell] for cell in cells], device=scaled.device)
        return (scaled - noise.log_()[noise_row]).argmax(dim=-1)
    return _draw_from_nucleus(scaled, cells, step, sampling.top_p)


def _draw_from_nucleus(scaled: Tensor, cells: Sequence[NoiseCell], step: int, top_p: float) -> Tensor:
    """Gumbel-max within the top_p set; a few tokens are searched first, the whole vocabulary only if needed."""
    n_rows, d_vocab = scaled.shape
    chosen = torch.full((n_rows,), -1, dtype=torch.int64, device=scaled.device)
    pending = torch.arange(n_rows, device=scaled.device)
    total = scaled.logsumexp(dim=-1, keepdim=True)
    if not bool(torch.isfinite(total).all()):
        raise Undefined(
            f"the logits of step {step} hold NaN, or allow no token.",
            fix="steer with a smaller dose, or run the model in float32 or bfloat16.",
        )
    for n_tried in (*(n for n in _FIRST_TRIES if n < d_vocab), d_vocab):
        rows = scaled if len(pending) == n_rows else scaled[pending]
        ids = _top_sorted(rows, n_tried)
        values = rows.gather(1, ids)
        mass = (values - total[pending]).exp().double()
        # A token stays if those before it do not reach top_p yet; the first always does.
        in_nucleus = mass.cumsum(dim=-1) - mass < top_p
        # Ties are common in half precision, and tokens equal to the last one tried may be left out: the set is complete
        # only if it ends strictly above that one.
        nucleus_sizes = in_nucleus.sum(dim=-1, keepdim=True)
        complete = (values.gather(1, nucleus_sizes - 1) > values[:, -1:])[:, 0] | (n_tried == d_vocab)
        # Nothing beyond the largest set needs noise.
        width = int(nucleus_sizes[complete].max()) if bool(complete.any()) else 0
        ids, values, in_nucleus = ids[complete, :width], values[complete, :width], in_nucleus[complete, :width]
        if len(ids):
            noise = exponential_noise_at([cells[i] for i in pending[complete].tolist()], step, ids)
            best = (values - noise.log_()).masked_fill_(~in_nucleus, -math.inf).argmax(dim=-1, keepdim=True)
            chosen[pending[complete]] = ids.gather(1, best)[:, 0]
        pending = pending[~complete]
        if len(pending) == 0:
            break
    return chosen


def _most_probable(logits: Tensor) -> Tensor:
    """Argmax, ties to the lowest id (which `argmax` does not promise)."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    is_best = logits == logits.amax(dim=-1, keepdim=True)
    return torch.where(is_best, ids, logits.shape[-1]).amin(dim=-1)


def _top_sorted(logits: Tensor, n: int) -> Tensor:
    """Ids of the n largest logits of each row, largest first, ties to lower ids except for the last."""
    if n >= logits.shape[1]:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    ids = _top_unsorted(logits, n).sort(dim=-1).values
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


def _top_unsorted(logits: Tensor, n: int) -> Tensor:
    """Ids of the n largest logits of each row, unordered; all lie in the n blocks with the largest maxima."""
    d_vocab = logits.shape[1]
    n_blocks = d_vocab // _BLOCK
    if n * 4 > n_blocks:
        return logits.topk(n, dim=-1).indices
    # A block is every n_blocks-th token: maxima over that axis run along memory.
    n_blocked = n_blocks * _BLOCK
    maxima = logits[:, :n_blocked].unflatten(1, (_BLOCK, n_blocks)).amax(dim=1)
    block = maxima.topk(n, dim=-1).indices
    stride = torch.arange(0, n_blocked, n_blocks, device=logits.device)
    ids = (block[:, :, None] + stride).flatten(1)
    remainder = torch.arange(n_blocked, d_vocab, device=logits.device).expand(len(logits), -1)
    ids = torch.cat([ids, remainder], dim=1)
    return ids.gather(1, logits.gather(1, ids).topk(n, dim=-1).indices)
