"""Choosing the next token: temperature, top_p, frequency penalty, and noise that paired rows share.

Sampling is by the Gumbel-max trick: the token with the largest `logit / temperature + Gumbel noise` is a draw
from the softmax. The noise is a function of (seed, prompt, sample, step, token) alone, so every condition, dose
and feature of the same prompt and sample meets the same luck (*common random numbers*): their outputs differ
because of the intervention, not because of the dice, and paired differences are much less noisy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch, Undefined
from saeffect.steering.noise import NoiseCell, exponential_noise, exponential_noise_at

__all__ = ["NoiseCell", "Sampling", "exponential_noise", "next_tokens", "penalise", "penalise_"]

# How many of the most probable tokens are tried before the whole vocabulary is sorted: a trained model's set of
# mass 0.3 has a handful.
_FIRST_TRIES = (16, 128, 1024)
# Tokens of which one maximum is taken before the most probable are looked for.
_BLOCK = 64


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn. The defaults are the paper's, but for end-of-text.

    Attributes:
        max_new_tokens: Length of a continuation.
        temperature: Logits are divided by it; 0 takes the most probable token.
        top_p: Only the smallest set of most probable tokens with at least this mass may be drawn; of equally
            probable ones the lower id goes first. 1 allows all.
        frequency_penalty: Taken off a token's logit for each time it was already generated (the prompt does
            not count), before the temperature.
        allow_end: Whether the model may end its text. By default end-of-text and every other special token
            are forbidden, so that all continuations have `max_new_tokens` tokens: their similarities and
            repetition are then measured on equal lengths, and a steered text cannot score by stopping early.
    """

    max_new_tokens: int = 50
    temperature: float = 1.0
    top_p: float = 0.3
    frequency_penalty: float = 1.0
    allow_end: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1. Got {self.max_new_tokens}.", at="max_new_tokens")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be at least 0. Got {self.temperature}.", at="temperature")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1. Got {self.top_p}.", at="top_p")
        if not math.isfinite(self.frequency_penalty):
            raise ConfigError(
                f"frequency_penalty must be finite. Got {self.frequency_penalty}.", at="frequency_penalty"
            )


def penalise(logits: Tensor, generated: Tensor, frequency_penalty: float) -> Tensor:
    """Logits less the penalty for each time a token was generated.

    Args:
        logits: Float32 `[rows, d_vocab]`; not changed.
        generated: Token ids so far, int64 `[rows, steps]`.
        frequency_penalty: In logits (nats).

    Example:
        >>> penalise(torch.zeros(1, 4), torch.tensor([[2, 0, 2]]), 0.5).tolist()
        [[-0.5, 0.0, -1.0, 0.0]]
    """
    if frequency_penalty == 0 or generated.shape[1] == 0:
        return logits
    return penalise_(logits.clone(), generated, frequency_penalty)


def penalise_(logits: Tensor, generated: Tensor, frequency_penalty: float) -> Tensor:
    """`penalise` that changes `logits` themselves, at the generated tokens only, and returns them."""
    if frequency_penalty == 0 or generated.shape[1] == 0:
        return logits
    # Counted first: a sum of many small penalties would round differently. A token that is there twice is
    # written twice, with the same value.
    counts = (generated[:, :, None] == generated[:, None, :]).sum(dim=-1, dtype=logits.dtype)
    return logits.scatter_(1, generated, logits.gather(1, generated) - frequency_penalty * counts)


def next_tokens(logits: Tensor, cells: Sequence[NoiseCell], step: int, sampling: Sampling) -> Tensor:
    """One token a row.

    Args:
        logits: `[rows, d_vocab]`, any float dtype, penalties already taken off; forbidden tokens at -inf.
        cells: The noise of each row.
        step: How many tokens were generated before.
        sampling: Temperature and top_p.

    Returns:
        Token ids, int64 `[rows]`. A row's token depends on its own logits and cell only.

    Raises:
        ShapeMismatch: Not as many cells as rows.

    Source:
        Holtzman et al. (2020), The Curious Case of Neural Text Degeneration (top_p).
    """
    if len(cells) != len(logits):
        raise ShapeMismatch(f"{len(logits)} rows of logits, but {len(cells)} noise cells.")
    logits = logits.float()
    if sampling.temperature == 0:
        return _most_probable(logits)
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    if sampling.top_p == 1:
        number = {cell: i for i, cell in enumerate(dict.fromkeys(cells))}
        noise = torch.stack([exponential_noise(cell, step, scaled.shape[1], device=scaled.device) for cell in number])
        noise_row = torch.tensor([number[cell] for cell in cells], device=scaled.device)
        return (scaled - noise.log_()[noise_row]).argmax(dim=-1)
    return _draw_from_nucleus(scaled, cells, step, sampling.top_p)


def _draw_from_nucleus(scaled: Tensor, cells: Sequence[NoiseCell], step: int, top_p: float) -> Tensor:
    """Gumbel-max within the top_p set, found among a few tokens first and only if need be among all."""
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
        ids = _most_probable_first(rows, n_tried)
        values = rows.gather(1, ids)
        mass = (values - total[pending]).exp().double()
        # A token stays if those before it do not reach top_p yet; the first always does.
        kept = mass.cumsum(dim=-1) - mass < top_p
        # Equal logits are common in half precision, and of those equal to the last one tried some were left
        # out, so the set is known only if it ends strictly above them.
        n_kept = kept.sum(dim=-1, keepdim=True)
        known = (values.gather(1, n_kept - 1) > values[:, -1:])[:, 0] | (n_tried == d_vocab)
        # Nothing beyond the largest set needs noise.
        width = int(n_kept[known].max()) if bool(known.any()) else 0
        ids, values, kept = ids[known, :width], values[known, :width], kept[known, :width]
        if len(ids):
            noise = exponential_noise_at([cells[i] for i in pending[known].tolist()], step, ids)
            best = (values - noise.log_()).masked_fill_(~kept, -math.inf).argmax(dim=-1, keepdim=True)
            chosen[pending[known]] = ids.gather(1, best)[:, 0]
        pending = pending[~known]
        if len(pending) == 0:
            break
    return chosen


def _most_probable(logits: Tensor) -> Tensor:
    """Argmax with the lowest id among equals, which `argmax` itself does not promise."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    is_best = logits == logits.amax(dim=-1, keepdim=True)
    return torch.where(is_best, ids, logits.shape[-1]).amin(dim=-1)


def _most_probable_first(logits: Tensor, n: int) -> Tensor:
    """Ids of n of the largest logits of each row, largest first, lower ids first among equals.

    Every token with a larger logit than the last of them is there; of those equal to it some may not be.
    """
    if n >= logits.shape[1]:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    ids = _largest(logits, n).sort(dim=-1).values
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


def _largest(logits: Tensor, n: int) -> Tensor:
    """Ids of n of the largest logits of each row, in any order.

    Found among the n blocks with the largest maxima: each of those holds a logit as large as the n-th of these
    maxima, and no other block holds a larger one.
    """
    d_vocab = logits.shape[1]
    n_blocks = d_vocab // _BLOCK
    if n * 4 > n_blocks:
        return logits.topk(n, dim=-1).indices
    # A block is every n_blocks-th token: maxima over that axis run along memory.
    whole = n_blocks * _BLOCK
    maxima = logits[:, :whole].unflatten(1, (_BLOCK, n_blocks)).amax(dim=1)
    block = maxima.topk(n, dim=-1).indices
    stride = torch.arange(0, whole, n_blocks, device=logits.device)
    ids = (block[:, :, None] + stride).flatten(1)
    rest = torch.arange(whole, d_vocab, device=logits.device).expand(len(logits), -1)
    ids = torch.cat([ids, rest], dim=1)
    return ids.gather(1, logits.gather(1, ids).topk(n, dim=-1).indices)
