"""Batched generation: many continuations of one prompt, each row with its own intervention, or of different prompts.

A shared prompt is read once: rows are expanded only from the hook on, at the first changed position and after it.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.hooks import edited, parse_hook
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.steering.operators import Intervention, PositionedEdit
from saeffect.steering.sampling import NoiseCell, Sampling, next_tokens, penalise

__all__ = ["Progress", "continue_prompts", "generate", "last_logits", "read_prompt", "stream"]

_SHAPE_WORDS = re.compile(r"\b(sizes?|shapes?|dimensions?|batches)\b", re.IGNORECASE)

Progress = Callable[[int, int], None]
"""Called with (done, total), in rows unless stated otherwise."""


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
    """Continue one prompt once per row: new token ids, one list a row, without the prompt.

    A row's output depends on its own vector and noise cell only. Other batch sizes may round differently, which rarely
    changes a token in float32 and float64, sometimes in bfloat16. With `sampling.allow_end` a row stops before
    its end-of-text token and may be shorter, even empty. `cells` and the rows of the intervention are one a row, else
    ShapeMismatch; None leaves the model as it is. 64 rows of a 135M model take about 0.2 GB beside the weights.
    `progress` is called after every token with (done, total) in tokens; a row that ends early counts in full.
    ConfigError: an empty prompt, no such hook, or `batch_size` below 1.
    """
    _check_prompts([prompt_ids])
    _check_rows(intervention, cells)
    n_steps = sampling.max_new_tokens
    outputs: list[list[int]] = []
    with fused(lm):
        for first in range(0, len(cells), batch_size):
            batch = cells[first : first + batch_size]
            edit = None
            if intervention is not None:
                n_bos = 0 if sampling.as_published else lm.n_bos(prompt_ids)
                edit = intervention.take(first, first + len(batch)).edit(len(prompt_ids), n_bos)

            def report(tokens: int, rows_before: int = first, rows: int = len(batch)) -> None:
                if progress is not None:
                    progress(rows_before * n_steps + rows * tokens, len(cells) * n_steps)

            start = read_prompt(lm, hook, prompt_ids, len(batch), edit, room=n_steps - 1)
            with _editing(lm, hook, edit):
                outputs += _continue(lm, [prompt_ids] * len(batch), batch, sampling, start, edit=edit, report=report)
    return outputs


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
    """Continue each of many prompts once, unsteered and without padding: new token ids, one list a row.

    While longer prompts are still read, shorter ones already generate. A row's output is that of `generate` for its
    prompt alone, up to rounding, as are errors. `progress` is called after each batch with (done, total) in rows.
    """
    _check_prompts(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outputs: dict[int, list[int]] = {}
    with fused(lm):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            batch_prompts = [prompts[i] for i in batch]
            n_read = len(batch_prompts[0])
            heads = torch.tensor([list(ids[:n_read]) for ids in batch_prompts], device=lm.device)
            logits, cache = last_logits(lm, heads)
            if _is_plain_cache(cache):
                room = len(batch_prompts[-1]) + sampling.max_new_tokens - 1 - n_read
                cache = _reserve(cache, len(batch), room)
            texts = _continue(lm, batch_prompts, [cells[i] for i in batch], sampling, (logits, cache))
            outputs |= dict(zip(batch, texts, strict=True))
            if progress is not None:
                progress(len(outputs), len(prompts))
    return [outputs[i] for i in range(len(prompts))]


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
    _check_prompts([prompt_ids])
    _check_rows(intervention, cells)
    n_bos = 0 if sampling.as_published else lm.n_bos(prompt_ids)
    edit = None if intervention is None else intervention.edit(len(prompt_ids), n_bos)
    with fused(lm):
        start = read_prompt(lm, hook, prompt_ids, len(cells), edit, room=sampling.max_new_tokens - 1)
    rows, lengths = _allocate_rows(lm, [prompt_ids] * len(cells), sampling)
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
    *,
    edit: PositionedEdit | None = None,
    report: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """The texts of one batch, sorted by prompt length and read up to the shortest."""
    n_steps = sampling.max_new_tokens
    rows, lengths = _allocate_rows(lm, prompts, sampling)
    last = rows.shape[1] - 1
    for position in _fill_rows(lm, rows, lengths, cells, sampling, start, edit):
        if position < last:
            report(position - lengths[-1] + 1)
    report(n_steps)
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


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    if not all(len(ids) for ids in prompts):
        raise ConfigError("a prompt has no tokens; expected at least one.", at="prompts")


def _check_rows(intervention: Intervention | None, cells: Sequence[NoiseCell]) -> None:
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


def read_prompt(
    lm: LanguageModel, hook: str, prompt_ids: Sequence[int], n_rows: int, edit: PositionedEdit | None, *, room: int
) -> tuple[Tensor, Any]:
    """Logits after a prompt, float32 `[n_rows, d_vocab]`, and the cache with memory for `room` further tokens;
    `edit`, None or with `n_rows` rows, acts at `hook`.
    """
    ids = torch.tensor([list(prompt_ids)], device=lm.device)
    try:
        logits, cache = _read_once(lm, hook, ids, n_rows, edit)
    except (_UnknownCacheError, RuntimeError) as error:
        # Other caches, and models whose inputs must have equal rows (Bloom's position bias), read the prompt in every
        # row.
        if not isinstance(error, _UnknownCacheError) and not _is_shape_error(error):
            raise
        logits, cache = _read_in_every_row(lm, hook, ids, n_rows, edit)
    return logits, _reserve(cache, n_rows, room) if _is_plain_cache(cache) else cache


def last_logits(lm: LanguageModel, input_ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits after each row's last token, float32 `[rows, d_vocab]`, and the cache of keys and values."""
    model: Any = lm.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(base.forward).parameters
    cache_name = "cache" if "cache" in parameters else "past_key_values"  # so called before transformers 5.24
    keep_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    # On a CPU the bfloat16 product of a strided slice is hundreds of times slower than that of a dense copy.
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        result = model(input_ids=input_ids, use_cache=True, **{cache_name: cache}, **keep_last)
    finally:
        handle.remove()
    return result.logits[:, -1].float(), getattr(result, cache_name)


class _UnknownCacheError(Exception):
    """The model's cache has unknown parts."""


def _read_once(
    lm: LanguageModel, hook: str, ids: Tensor, n_rows: int, edit: PositionedEdit | None
) -> tuple[Tensor, Any]:
    if edit is None:
        logits, cache = last_logits(lm, ids)
        return logits.repeat(n_rows, 1), _require_plain_cache(cache)
    point = parse_hook(hook, lm.n_layers)
    edit.start = 0
    n_shared = edit.first(ids.shape[1])
    cache = None
    if n_shared:
        _, cache = last_logits(lm, ids[:, :n_shared])
        # The attention of these layers comes after the hook.
        _expand_rows(_require_plain_cache(cache), point.layer + (point.kind != "hook_resid_pre"), n_rows)
    edit.start = n_shared
    with edited(lm, hook, lambda x: edit(x.expand(n_rows, -1, -1).contiguous())):
        logits, cache = last_logits(lm, ids[:, n_shared:], cache)
    if len(logits) != n_rows:
        raise _UnknownCacheError  # the model cut its output to the rows of its input
    return logits, _require_plain_cache(cache)


def _read_in_every_row(
    lm: LanguageModel, hook: str, ids: Tensor, n_rows: int, edit: PositionedEdit | None
) -> tuple[Tensor, Any]:
    rows = ids.expand(n_rows, -1).contiguous()
    if edit is None:
        return last_logits(lm, rows)
    edit.start = 0
    with edited(lm, hook, edit):
        return last_logits(lm, rows)


def _is_shape_error(error: RuntimeError) -> bool:
    """Whether torch refused tensors of unequal shape (it has no error class for that)."""
    return not isinstance(error, torch.OutOfMemoryError) and bool(_SHAPE_WORDS.search(str(error)))


def _require_plain_cache(cache: Any) -> Any:
    if not _is_plain_cache(cache):
        raise _UnknownCacheError
    return cache


def _is_plain_cache(cache: Any) -> bool:
    """Whether a transformers cache is keys and values alone."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain_layers = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and len(cache.layers) > 0 and all(type(x) in plain_layers for x in cache.layers)


def _expand_rows(cache: Any, first_layer: int, n_rows: int) -> None:
    """Expand the layers from `first_layer` on to `n_rows` rows, without copying."""
    for layer in cache.layers[first_layer:]:
        if layer.keys is not None:  # some models reuse the keys of another layer
            layer.keys, layer.values = (x.expand(n_rows, -1, -1, -1) for x in (layer.keys, layer.values))


def _reserve(cache: Any, n_rows: int, room: int) -> Any:
    """The cache with `n_rows` rows, and memory for `room` further positions in layers without a sliding window."""
    from transformers.cache_utils import DynamicLayer

    _expand_rows(cache, 0, n_rows)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None:
            cache.layers[i] = _preallocated_layer()(layer.keys, layer.values, room)
    return cache


@functools.cache
def _preallocated_layer() -> Any:
    """The class, made on first use: importing transformers takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        """Writes keys and values in place; `keys` and `values` are views of the filled part."""

        def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self._memory = tuple(_copy_with_room(x, room) for x in (keys, values))
            self._fill(keys.shape[2])

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            start = self.get_seq_length()
            stop = start + key_states.shape[2]
            for memory, new in zip(self._memory, (key_states, value_states), strict=True):
                memory[:, :, start:stop] = new
            return self._fill(stop)

        def _fill(self, length: int) -> tuple[Tensor, Tensor]:
            keys, values = (memory[:, :, :length] for memory in self._memory)
            self.keys, self.values = keys, values
            return keys, values

    return PreallocatedLayer


def _copy_with_room(x: Tensor, room: int) -> Tensor:
    n_rows, heads, length, width = x.shape
    memory = x.new_empty(n_rows, heads, length + room, width)
    memory[:, :, :length] = x
    return memory
