"""One reading of each prompt for many rows: logits after it, and the cache of keys and values to go on from.

Rows are expanded only from the hook on, at the first changed position and after it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from saeffect.lm.hooks import edited, parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.steering.operators import PositionedEdit

__all__ = ["continuation_logits", "last_logits", "read_prompts", "is_plain_cache"]

_SHAPE_WORDS = re.compile(r"\b(sizes?|shapes?|dimensions?|batches)\b", re.IGNORECASE)


def read_prompts(
    lm: LanguageModel, hook: str, prompts: Sequence[Sequence[int]], edit: PositionedEdit | None, *, room: int
) -> tuple[Tensor, Any]:
    """Logits after prompts of equal length, one a row, float32 `[rows, d_vocab]`, and the cache with memory for `room`
    further tokens; `edit`, None or with as many rows, acts at `hook`. Each different prompt is read once.
    """
    numbers = {ids: number for number, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids = torch.tensor(list(numbers), device=lm.device)
    rows = torch.tensor([numbers[tuple(ids)] for ids in prompts])
    try:
        logits, cache = _read_once(lm, hook, ids, rows, edit)
    except (_UnknownCacheError, RuntimeError) as error:
        # Other caches, and models whose inputs must have equal rows (Bloom's position bias), read the prompts in every
        # row.
        if not isinstance(error, _UnknownCacheError) and not _is_shape_error(error):
            raise
        logits, cache = _read_in_every_row(lm, hook, ids[rows], edit)
    return logits, _reserve(cache, rows, room) if is_plain_cache(cache) else cache


def last_logits(lm: LanguageModel, input_ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits after each row's last token, float32 `[rows, d_vocab]`, and the cache of keys and values."""
    # On a CPU the bfloat16 product of a strided slice is hundreds of times slower than that of a dense copy.
    handle = lm.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        logits, cache = _forward(lm, input_ids, cache, logits_to_keep=1)
    finally:
        handle.remove()
    return logits[:, -1].float(), cache


@torch.inference_mode()
def continuation_logits(lm: LanguageModel, prompt_ids: Sequence[int], continuations: Tensor) -> Tensor:
    """Logits that predict each token of continuations of one prompt, int64 `[rows, n]`, under the unsteered model:
    float32 `[rows, n, d_vocab]`. The prompt is read once.
    """
    prompt = torch.tensor([list(prompt_ids)], device=lm.device)
    n_rows, n = continuations.shape
    first, cache = last_logits(lm, prompt)
    if not is_plain_cache(cache):
        ids = torch.cat([prompt.expand(n_rows, -1), continuations], dim=1)
        logits: Tensor = lm.model(input_ids=ids, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
        return logits.float()
    first = first.expand(n_rows, -1)[:, None]
    if n == 1:
        return first
    _expand_rows(cache.layers, torch.zeros(n_rows, dtype=torch.int64))
    return torch.cat([first, _forward(lm, continuations[:, :-1], cache)[0].float()], dim=1)


def _forward(lm: LanguageModel, input_ids: Tensor, cache: Any, **options: int) -> tuple[Tensor, Any]:
    """Logits, of the model's dtype, and the cache of keys and values. Options that the model does not take are left
    out.
    """
    base = lm.model.get_base_model() if hasattr(lm.model, "get_base_model") else lm.model
    parameters = inspect.signature(base.forward).parameters
    cache_name = "cache" if "cache" in parameters else "past_key_values"  # so called before transformers 5.24
    known = {name: value for name, value in options.items() if name in parameters}
    result = lm.model(input_ids=input_ids, use_cache=True, **{cache_name: cache}, **known)
    return result.logits, getattr(result, cache_name)


class _UnknownCacheError(Exception):
    """The model's cache has unknown parts."""


def _read_once(
    lm: LanguageModel, hook: str, ids: Tensor, rows: Tensor, edit: PositionedEdit | None
) -> tuple[Tensor, Any]:
    """`ids` are the different prompts, `[prompts, length]`, and `rows` the prompt of each row."""
    if edit is None:
        logits, cache = last_logits(lm, ids)
        return logits[rows], _require_plain_cache(cache)
    point = parse_hook(hook, lm.n_layers)
    edit.start = 0
    n_shared = edit.first(ids.shape[1])
    cache = None
    if n_shared:
        _, cache = last_logits(lm, ids[:, :n_shared])
        # The attention of these layers comes after the hook.
        _expand_rows(_require_plain_cache(cache).layers[point.layer + (point.kind != "hook_resid_pre") :], rows)
    edit.start = n_shared
    with edited(lm, hook, lambda x: edit(_expand(x, rows).contiguous())):
        logits, cache = last_logits(lm, ids[:, n_shared:], cache)
    if len(logits) != len(rows):
        raise _UnknownCacheError  # the model cut its output to the rows of its input
    return logits, _require_plain_cache(cache)


def _read_in_every_row(lm: LanguageModel, hook: str, ids: Tensor, edit: PositionedEdit | None) -> tuple[Tensor, Any]:
    if edit is None:
        return last_logits(lm, ids)
    edit.start = 0
    with edited(lm, hook, edit):
        return last_logits(lm, ids)


def _is_shape_error(error: RuntimeError) -> bool:
    """Whether torch refused tensors of unequal shape (it has no error class for that)."""
    return not isinstance(error, torch.OutOfMemoryError) and bool(_SHAPE_WORDS.search(str(error)))


def _require_plain_cache(cache: Any) -> Any:
    if not is_plain_cache(cache):
        raise _UnknownCacheError
    return cache


def is_plain_cache(cache: Any) -> bool:
    """Whether a transformers cache is keys and values alone."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain_layers = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and len(cache.layers) > 0 and all(type(x) in plain_layers for x in cache.layers)


def _expand(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, without copying where `x` has one row; `x` itself if it has as many rows already."""
    if len(x) == len(rows):
        return x
    return x.expand(len(rows), *x.shape[1:]) if len(x) == 1 else x[rows]


def _expand_rows(layers: Iterable[Any], rows: Tensor) -> None:
    for layer in layers:
        if layer.keys is not None:  # some models reuse the keys of another layer
            layer.keys, layer.values = _expand(layer.keys, rows), _expand(layer.values, rows)


def _reserve(cache: Any, rows: Tensor, room: int) -> Any:
    """The cache expanded to `rows`, with memory for `room` further positions in layers without a sliding window."""
    from transformers.cache_utils import DynamicLayer

    for i, layer in enumerate(cache.layers):
        _expand_rows([layer], rows)
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
