"""Continuations of prompts of different lengths in one batch, without padding.

Padding needs masks and positions that not every architecture takes, and moves what the others compute. Here all rows
begin at their first token and go on together: the passes that read the rest of a longer prompt are those that write the
first tokens after a shorter one. Each row meets the very positions that it would meet alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.steering.generate import Progress, end_tokens, forbidden_tokens, until_end
from saeffect.steering.key_value_memory import can_spread, with_room
from saeffect.steering.prompt_pass import last_logits
from saeffect.steering.sampling import NoiseCell, Sampling, next_tokens, penalise_

__all__ = ["continue_prompts"]


@torch.inference_mode()
def continue_prompts(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continue each prompt once; no intervention.

    A row's output is what `generate` gives for its prompt alone, up to the rounding of another batch (see there).

    Args:
        lm: The model.
        prompts: Token ids of each row's prompt, at least one each; lengths may differ.
        cells: One a row: the noise that the row is sampled with.
        sampling: How tokens are chosen, and how many.
        batch_size: Rows at once. Rows of like length stand together.
        progress: Called after each batch.

    Returns:
        New token ids, one list a row in the order of `prompts`, as `generate` gives them.

    Raises:
        ConfigError: A prompt has no tokens, or `batch_size` is below 1.
        ShapeMismatch: Not one cell per prompt.
    """
    if len(prompts) != len(cells):
        raise ShapeMismatch(f"{len(prompts)} prompts, but {len(cells)} noise cells.")
    if not all(len(ids) for ids in prompts):
        raise ConfigError("a prompt has no tokens; expected at least one.", at="prompts")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1. Got {batch_size}.", at="batch_size")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outputs: dict[int, list[int]] = {}
    with fused(lm):
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            made = _continue(lm, [prompts[i] for i in some], [cells[i] for i in some], sampling)
            outputs |= dict(zip(some, made, strict=True))
            if progress is not None:
                progress(len(outputs), len(prompts))
    return [outputs[i] for i in range(len(prompts))]


def _continue(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], cells: Sequence[NoiseCell], sampling: Sampling
) -> list[list[int]]:
    """One batch, its prompts in order of length."""
    n_steps = sampling.max_new_tokens
    lengths = [len(ids) for ids in prompts]
    shortest, longest = lengths[0], lengths[-1]
    rows = torch.zeros((len(prompts), longest + n_steps), dtype=torch.int64)
    for row, ids in enumerate(prompts):
        rows[row, : len(ids)] = torch.tensor(list(ids))
    rows = rows.to(lm.device)
    forbidden = forbidden_tokens(lm, sampling.allow_end)
    logits, cache = last_logits(lm, rows[:, :shortest].contiguous())
    if can_spread(cache):
        cache = with_room(cache, len(rows), longest + n_steps - 1 - shortest)
    # Rows of one length are at the same step of their texts.
    alike = [(n, slice(lengths.index(n), lengths.index(n) + lengths.count(n))) for n in dict.fromkeys(lengths)]
    for position in range(shortest, longest + n_steps):
        if position > shortest:
            logits, cache = last_logits(lm, rows[:, position - 1 : position].contiguous(), cache)
        for length, where in alike:
            step = position - length
            if 0 <= step < n_steps:
                rows[where, position] = _drawn(
                    logits[where], rows[where, length:position], cells[where], step, sampling, forbidden
                )
    final = set(end_tokens(lm))
    return [until_end(row[n : n + n_steps], final) for row, n in zip(rows.tolist(), lengths, strict=True)]


def _drawn(
    logits: Tensor, generated: Tensor, cells: Sequence[NoiseCell], step: int, sampling: Sampling, forbidden: Tensor
) -> Tensor:
    penalise_(logits, generated, sampling.frequency_penalty)
    logits.index_fill_(1, forbidden, -math.inf)
    return next_tokens(logits, cells, step, sampling)
