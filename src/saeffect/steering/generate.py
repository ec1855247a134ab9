"""Many continuations at once: of one prompt, each row with its own intervention, or of different prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.hooks import edited
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.steering.operators import Intervention, PositionedEdit
from saeffect.steering.prompt_pass import can_spread, last_logits, read_prompt, with_room
from saeffect.steering.sampling import NoiseCell, Sampling, next_tokens, penalise

__all__ = ["Progress", "continue_prompts", "generate"]

Progress = Callable[[int, int], None]
"""Called with (how much is done, how much there is in all), in rows if nothing else is said."""


@torch.inference_mode()
def generate(
    lm: LanguageModel,
    hook: str,
    prompt_ids: Sequence[int],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    *,
    intervention: Intervention | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continue one prompt once per row.

    All rows have the same prompt, so there is no padding. A row's output depends on its own vector and noise
    cell only; beside which rows it is computed does not matter, except that matrix products over another
    number of rows may round differently (in float64 and float32 that hardly ever changes a token, in bfloat16
    now and then it does). With the same batches the same machine gives the same tokens.

    Args:
        lm: The model.
        hook: Where to intervene, a TransformerLens name.
        prompt_ids: Token ids of the prompt, at least one, see `LanguageModel.encode_prompt`.
        cells: One a row: the noise that the row is sampled with.
        sampling: How tokens are chosen, and how many.
        intervention: With one operator row per cell; None leaves the model as it is.
        batch_size: Rows at once. 64 rows of a 135M model take about 0.2 GB beside the weights.
        progress: Called after every token, with tokens done and in all, over all rows; what an ended row leaves out
            is done.

    Returns:
        New token ids, one list a row, without the prompt. With `sampling.allow_end` a row stops before its
        end-of-text token and may be shorter, even empty.

    Raises:
        ConfigError: The prompt has no tokens, `batch_size` is below 1, or the hook is not in the model.
        ShapeMismatch: The intervention has not one row per cell.
    """
    _check([prompt_ids], batch_size)
    if intervention is not None and intervention.operator.n_rows != len(cells):
        raise ShapeMismatch(f"{intervention.operator.n_rows} rows to steer, but {len(cells)} noise cells.")
    n_steps = sampling.max_new_tokens
    outputs: list[list[int]] = []
    with fused(lm):
        for first in range(0, len(cells), batch_size):
            batch = cells[first : first + batch_size]
            edit = None
            if intervention is not None:
                edit = intervention.take(first, first + len(batch)).edit(len(prompt_ids), lm.n_bos(prompt_ids))

            def done(tokens: int, rows_before: int = first, rows: int = len(batch)) -> None:
                if progress is not None:
                    progress(rows_before * n_steps + rows * tokens, len(cells) * n_steps)

            outputs += _continue(lm, hook, prompt_ids, batch, sampling, edit=edit, done=done)
    return outputs


def _continue(
    lm: LanguageModel,
    hook: str,
    prompt_ids: Sequence[int],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    *,
    edit: PositionedEdit | None,
    done: Callable[[int], None],
) -> list[list[int]]:
    """One batch: the prompt once, then a token of every row a pass."""
    n_rows, n_steps = len(cells), sampling.max_new_tokens
    ends = torch.tensor(_end_tokens(lm), dtype=torch.int64, device=lm.device)
    forbidden = _forbidden_tokens(lm, sampling.allow_end)
    generated = torch.empty((n_rows, n_steps), dtype=torch.int64, device=lm.device)
    ended = torch.zeros(n_rows, dtype=torch.bool, device=lm.device)
    logits, cache = read_prompt(lm, hook, prompt_ids, n_rows, edit, room=n_steps - 1)
    with _editing(lm, hook, edit):
        for step in range(n_steps):
            if step:
                if edit is not None:
                    edit.start = len(prompt_ids) + step - 1
                logits, cache = last_logits(lm, generated[:, step - 1 : step], cache)
            generated[:, step] = _draw(logits, generated[:, :step], cells, step, sampling, forbidden)
            if sampling.allow_end:
                ended |= torch.isin(generated[:, step], ends)
                if bool(ended.all()):
                    generated = generated[:, : step + 1]
                    done(n_steps)
                    break
            done(step + 1)
    return _until_end(generated, ends)


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
    """Continue each of many prompts once, without intervention and without padding.

    Padding needs masks and positions that not every architecture takes, and moves what the others compute. Here all
    rows begin at their first token and go on together: the passes that read the rest of a longer prompt are those that
    write the first tokens after a shorter one. A row's output is what `generate` gives for its prompt alone, up to the
    rounding of another batch.

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
    _check(prompts, batch_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outputs: dict[int, list[int]] = {}
    with fused(lm):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            texts = _continue_prompts(lm, [prompts[i] for i in batch], [cells[i] for i in batch], sampling)
            outputs |= dict(zip(batch, texts, strict=True))
            if progress is not None:
                progress(len(outputs), len(prompts))
    return [outputs[i] for i in range(len(prompts))]


def _continue_prompts(
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
    forbidden = _forbidden_tokens(lm, sampling.allow_end)
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
                before = rows[where, length:position]
                rows[where, position] = _draw(logits[where], before, cells[where], step, sampling, forbidden)
    texts = torch.stack([row[n : n + n_steps] for row, n in zip(rows, lengths, strict=True)])
    return _until_end(texts, torch.tensor(_end_tokens(lm), dtype=torch.int64))


def _draw(
    logits: Tensor, generated: Tensor, cells: Sequence[NoiseCell], step: int, sampling: Sampling, forbidden: Tensor
) -> Tensor:
    penalise(logits, generated, sampling.frequency_penalty)
    logits.index_fill_(1, forbidden, -math.inf)
    return next_tokens(logits, cells, step, sampling)


def _check(prompts: Sequence[Sequence[int]], batch_size: int) -> None:
    if not all(len(ids) for ids in prompts):
        raise ConfigError("a prompt has no tokens; expected at least one.", at="prompts")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1. Got {batch_size}.", at="batch_size")


def _end_tokens(lm: LanguageModel) -> list[int]:
    """Ids that end a text, by the tokenizer and by the model's generation settings."""
    settings = getattr(lm.model, "generation_config", None)
    found: set[int] = set()
    for value in (getattr(lm.tokenizer, "eos_token_id", None), getattr(settings, "eos_token_id", None)):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return sorted(i for i in found if 0 <= i < lm.d_vocab)


def _until_end(generated: Tensor, ends: Tensor) -> list[list[int]]:
    """For each row the tokens before the first one that ends a text."""
    final = set(ends.tolist())
    return [ids[: next((i for i, token in enumerate(ids) if token in final), len(ids))] for ids in generated.tolist()]


def _forbidden_tokens(lm: LanguageModel, allow_end: bool) -> Tensor:
    """Ids never generated, int64: those unknown to the tokenizer, and special ones."""
    forbidden: Tensor = ~lm.plain_tokens()
    # Some tokenizers end a text with a token that they do not count as special.
    forbidden[_end_tokens(lm)] = not allow_end
    return forbidden.nonzero()[:, 0].to(lm.device)


def _editing(lm: LanguageModel, hook: str, edit: PositionedEdit | None) -> AbstractContextManager[None]:
    # A prompt that was steered is in the keys and values; its generated tokens are left alone.
    return nullcontext() if edit is None or edit.positions == "prompt" else edited(lm, hook, edit)
