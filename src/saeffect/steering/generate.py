"""Batched generation: many continuations of one prompt or of several, each row with its own intervention."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.hooks import edited
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.steering.operators import Intervention, PositionedEdit
from saeffect.steering.prompt_pass import last_logits, read_prompts
from saeffect.steering.sampling import NoiseCell, Sampling, next_tokens, penalise

__all__ = ["Progress", "continue_prompts", "generate", "stream"]


Progress = Callable[[int, int], None]
"""Called with (done, total), in tokens unless stated otherwise."""


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
    """Continue one prompt once per row: new token ids, one list a row, without the prompt; see `continue_prompts`."""
    return continue_prompts(
        lm,
        [prompt_ids] * len(cells),
        cells,
        sampling,
        hook=hook,
        intervention=intervention,
        batch_size=batch_size,
        progress=progress,
    )


@torch.inference_mode()
def continue_prompts(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    *,
    hook: str = "",
    intervention: Intervention | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continue each row's prompt without padding: new token ids, one list a row, without the prompt.

    A row's output depends on its own prompt, vector and noise cell only. Other batches may round differently, which
    rarely changes a token in float32 and float64, sometimes in bfloat16. Rows of one prompt share a batch if they fit
    into one; with an intervention at "all" positions, or none, a batch holds several prompts: while longer ones are
    still read, shorter ones already generate. With `sampling.allow_end` a row stops before its end-of-text token and
    may be shorter, even empty. `cells` and the rows of the intervention are one a row, else ShapeMismatch; None leaves
    the model as it is. 64 rows of a 135M model take about 0.2 GB beside the weights. `progress` is called after every
    pass with (done, total) in tokens; a row that ends early counts in full. ConfigError: an empty prompt, no such hook,
    or `batch_size` below 1.
    """
    _check(prompts, intervention, cells, batch_size)
    n_steps = sampling.max_new_tokens
    outputs: dict[int, list[int]] = {}
    with fused(lm):
        for batch in _batches(lm, prompts, sampling, intervention, batch_size):
            batch_prompts = [prompts[i] for i in batch]
            shortest, longest = len(batch_prompts[0]), len(batch_prompts[-1])
            edit = None
            if intervention is not None:
                edit = intervention.take(batch).edit(shortest, _n_bos(lm, batch_prompts[0], sampling))

            def report(passes: int, of: int, before: int = len(outputs), n_rows: int = len(batch)) -> None:
                if progress is not None:
                    progress(n_steps * before + n_steps * n_rows * passes // of, n_steps * len(prompts))

            heads = [ids[:shortest] for ids in batch_prompts]
            start = read_prompts(lm, hook, heads, edit, room=longest - shortest + n_steps - 1)
            with _editing(lm, hook, edit):
                texts = _continue(lm, batch_prompts, [cells[i] for i in batch], sampling, start, edit, report)
            outputs |= dict(zip(batch, texts, strict=True))
    return [outputs[i] for i in range(len(prompts))]


def _batches(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    intervention: Intervention | None,
    batch_size: int,
) -> Iterator[list[int]]:
    """The rows of each batch, ascending by length of prompt."""

    def kind(ids: Sequence[int]) -> tuple[int, ...]:  # what an edit depends on
        if intervention is None:
            return ()
        n_bos = _n_bos(lm, ids, sampling)
        return (n_bos,) if intervention.positions == "all" else (n_bos, *ids)

    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(prompts):
        rows_of.setdefault(tuple(ids), []).append(row)
    batch: list[int] = []
    for ids in sorted(rows_of, key=lambda ids: (kind(ids), len(ids))):
        rows = rows_of[ids]
        if batch and (len(batch) + len(rows) > batch_size or kind(prompts[batch[0]]) != kind(ids)):
            yield batch
            batch = []
        batch += rows
        while len(batch) > batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch


def _n_bos(lm: LanguageModel, ids: Sequence[int], sampling: Sampling) -> int:
    return 0 if sampling.as_published else lm.n_bos(ids)


@torch.inference_mode()
def stream(
    lm: LanguageModel,
    hook: str,
    prompt_ids: Sequence[int],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    *,
    intervention: Intervention | None = None,
) -> Generator[list[int | None], None, None]:
    """The texts of `generate`, all in one batch, token by token: each step yields an id a row, None after a row's
    end. Between steps the model is unedited, so several streams can alternate.
    """
    prompts = [prompt_ids] * len(cells)
    _check([prompt_ids], intervention, cells)
    n_bos = _n_bos(lm, prompt_ids, sampling)
    edit = None if intervention is None else intervention.edit(len(prompt_ids), n_bos)
    with fused(lm):
        start = read_prompts(lm, hook, prompts, edit, room=sampling.max_new_tokens - 1)
    rows, lengths = _allocate_rows(lm, prompts, sampling)
    steps = _fill_rows(lm, rows, lengths, cells, sampling, start, edit)
    stop_tokens, ended = set(_stop_tokens(lm, sampling)), [False] * len(cells)
    while True:
        with fused(lm), _editing(lm, hook, edit):
            position = next(steps, None)
        if position is None:
            return
        ids = rows[:, position].tolist()
        ended = [was or (sampling.allow_end and token in stop_tokens) for was, token in zip(ended, ids, strict=True)]
        yield [None if has_ended else token for has_ended, token in zip(ended, ids, strict=True)]


def _editing(lm: LanguageModel, hook: str, edit: PositionedEdit | None) -> AbstractContextManager[None]:
    """Context that edits generated tokens; empty for an edit of the prompt alone, which the cache holds."""
    return nullcontext() if edit is None or edit.of_prompt_alone else edited(lm, hook, edit)


def _allocate_rows(lm: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> tuple[Tensor, list[int]]:
    """Prompts with room for their texts, int64 `[rows, positions]`, and the prompts' lengths."""
    lengths = [len(ids) for ids in prompts]
    width = max(lengths) + sampling.max_new_tokens
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts], device=lm.device), lengths


def _continue(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    start: tuple[Tensor, Any],
    edit: PositionedEdit | None,
    report: Callable[[int, int], None],
) -> list[list[int]]:
    """The texts of one batch, sorted by prompt length and read up to the shortest."""
    n_steps = sampling.max_new_tokens
    rows, lengths = _allocate_rows(lm, prompts, sampling)
    n_passes = rows.shape[1] - lengths[0]
    for position in _fill_rows(lm, rows, lengths, cells, sampling, start, edit):
        if position < rows.shape[1] - 1:
            report(position - lengths[0] + 1, n_passes)
    report(n_passes, n_passes)
    final = set(_stop_tokens(lm, sampling))
    texts = [row[n : n + n_steps] for row, n in zip(rows.tolist(), lengths, strict=True)]
    return [ids[: next((i for i, token in enumerate(ids) if token in final), len(ids))] for ids in texts]


def _fill_rows(
    lm: LanguageModel,
    rows: Tensor,
    lengths: Sequence[int],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    start: tuple[Tensor, Any],
    edit: PositionedEdit | None,
) -> Iterator[int]:
    """Fill `rows` position by position, each pass advancing every row by one token; yields the position just filled."""
    n_steps, shortest = sampling.max_new_tokens, lengths[0]
    stop_tokens = torch.tensor(_stop_tokens(lm, sampling), dtype=torch.int64, device=lm.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=lm.device)
    forbidden = _forbidden_tokens(lm, sampling)
    # Rows of one length are at the same step of their texts.
    length_groups = [(n, slice(lengths.index(n), lengths.index(n) + lengths.count(n))) for n in dict.fromkeys(lengths)]
    logits, cache = start
    for position in range(shortest, rows.shape[1]):
        if position > shortest:
            if edit is not None:
                edit.start = position - 1
            logits, cache = last_logits(lm, rows[:, position - 1 : position].contiguous(), cache)
        for length, group in length_groups:
            step = position - length
            if 0 <= step < n_steps:
                penalty_start = 0 if sampling.as_published else length
                penalise(logits[group], rows[group, penalty_start:position], sampling.frequency_penalty)
                logits[group].index_fill_(1, forbidden, -math.inf)
                rows[group, position] = next_tokens(logits[group], cells[group], step, sampling)
                if sampling.allow_end:
                    ended[group] |= torch.isin(rows[group, position], stop_tokens)
        yield position
        if sampling.allow_end and bool(ended.all()):
            return


def _check(
    prompts: Sequence[Sequence[int]],
    intervention: Intervention | None,
    cells: Sequence[NoiseCell],
    batch_size: int = 1,
) -> None:
    if not all(len(ids) for ids in prompts):
        raise ConfigError("a prompt has no tokens; expected at least one.", at="prompts")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1. Got {batch_size}.", at="batch_size")
    if intervention is not None and intervention.operator.n_rows != len(cells):
        raise ShapeMismatch(f"{intervention.operator.n_rows} rows to steer, but {len(cells)} noise cells.")


def _stop_tokens(lm: LanguageModel, sampling: Sampling) -> list[int]:
    """Tokens that end a text; none as published, where end-of-text is a token like others."""
    return [] if sampling.as_published else _end_tokens(lm)


def _end_tokens(lm: LanguageModel) -> list[int]:
    settings = getattr(lm.model, "generation_config", None)
    ids: set[int] = set()
    for value in (getattr(lm.tokenizer, "eos_token_id", None), getattr(settings, "eos_token_id", None)):
        ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return sorted(i for i in ids if 0 <= i < lm.d_vocab)


def _forbidden_tokens(lm: LanguageModel, sampling: Sampling) -> Tensor:
    """Ids never generated, int64: those unknown to the tokenizer, and special ones (none as published)."""
    if sampling.as_published:
        return torch.arange(len(lm.tokenizer), lm.d_vocab, device=lm.device)
    forbidden: Tensor = ~lm.plain_tokens()
    # Some tokenizers have an end-of-text token that is not marked as special.
    forbidden[_end_tokens(lm)] = not sampling.allow_end
    return forbidden.nonzero()[:, 0].to(lm.device)
