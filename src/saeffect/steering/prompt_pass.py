"""A prompt that all rows share, read once: what is the same in every row is computed in one row.

Rows differ from the hook on, at the positions that the intervention changes and after them. So the positions before
the first of those go through the whole model in one row, and the others in one row up to the hook, where the row
becomes as many as there are vectors. What follows works on all rows, by broadcasting where it meets a tensor of
before the hook (a mask, or the residual stream that half a block adds to). Keys and values of past positions lie in
memory that is set aside once.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saeffect.lm.hooks import edited, parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.steering.operators import PositionedEdit

__all__ = ["can_spread", "last_logits", "read_prompt", "with_room"]

_SHAPES = re.compile(r"\b(sizes?|shapes?|dimensions?|batches)\b", re.IGNORECASE)


def read_prompt(
    lm: LanguageModel, hook: str, prompt_ids: Sequence[int], n_rows: int, edit: PositionedEdit | None, *, room: int
) -> tuple[Tensor, Any]:
    """Logits after a prompt, for each row with its own intervention, and the cache to go on from.

    Args:
        lm: The model.
        hook: Where `edit` acts, a TransformerLens name.
        prompt_ids: At least one token.
        n_rows: How many rows are wanted.
        edit: Of so many rows; None for no intervention: all rows are the same then.
        room: How many tokens are to follow.

    Returns:
        Float32 `[n_rows, d_vocab]`, and the cache of keys and values of `n_rows` rows.
    """
    ids = torch.tensor([list(prompt_ids)], device=lm.device)
    try:
        logits, cache = _read_once(lm, hook, ids, n_rows, edit)
    except (_NotKeysAndValues, RuntimeError) as error:
        # What keeps more than keys and values, or wants the same number of rows in all its parts (Bloom's position
        # bias), reads the prompt once a row.
        if not isinstance(error, _NotKeysAndValues) and not _is_about_shapes(error):
            raise
        logits, cache = _read_in_every_row(lm, hook, ids, n_rows, edit)
    return logits, with_room(cache, n_rows, room) if can_spread(cache) else cache


def last_logits(lm: LanguageModel, input_ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits after the last token of each row, float32 `[rows, d_vocab]`, and the cache of keys and values.

    Only the last position meets the unembedding, where the architecture knows how: over a long prompt the
    logits of all positions would be the largest tensor by far.
    """
    extra = {"logits_to_keep": 1} if _keeps_logits(lm.model) else {}
    # The last position of many is a slice with gaps, for which the processor's bfloat16 product is hundreds
    # of times slower than for a dense copy of it.
    dense = lm.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        result = lm.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **extra)
    finally:
        dense.remove()
    return result.logits[:, -1].float(), result.past_key_values


class _NotKeysAndValues(Exception):  # noqa: N818 - it says what the cache is
    """The model's cache has parts that are not known here."""


def _read_once(
    lm: LanguageModel, hook: str, ids: Tensor, n_rows: int, edit: PositionedEdit | None
) -> tuple[Tensor, Any]:
    if edit is None:
        logits, cache = last_logits(lm, ids)
        _check(cache)
        return logits.repeat(n_rows, 1), cache
    point = parse_hook(hook, lm.n_layers)
    edit.start = 0
    n_alike = edit.where(ids.shape[1]).start
    cache = None
    if n_alike:
        _, cache = last_logits(lm, ids[:, :n_alike])
        _check(cache)
        # The attention of these layers comes after the hook.
        _spread(cache, point.layer + (point.kind != "hook_resid_pre"), n_rows)
    edit.start = n_alike
    with edited(lm, hook, lambda x: edit(x.expand(n_rows, -1, -1).contiguous())):
        logits, cache = last_logits(lm, ids[:, n_alike:], cache)
    _check(cache)
    if len(logits) != n_rows:
        raise _NotKeysAndValues  # a model that cuts its output to the rows that it was given
    return logits, cache


def _read_in_every_row(
    lm: LanguageModel, hook: str, ids: Tensor, n_rows: int, edit: PositionedEdit | None
) -> tuple[Tensor, Any]:
    rows = ids.expand(n_rows, -1).contiguous()
    if edit is None:
        return last_logits(lm, rows)
    edit.start = 0
    with edited(lm, hook, edit):
        return last_logits(lm, rows)


def _is_about_shapes(error: RuntimeError) -> bool:
    """Whether torch refused tensors that do not fit each other. It has no class of error for that, only words."""
    return not isinstance(error, torch.OutOfMemoryError) and bool(_SHAPES.search(str(error)))


def _check(cache: Any) -> None:
    if not can_spread(cache):
        raise _NotKeysAndValues


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def can_spread(cache: Any) -> bool:
    """Whether a cache of transformers is keys and values alone, so that all of it is known here."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and len(cache.layers) > 0 and all(type(x) in known for x in cache.layers)


def _spread(cache: Any, first_layer: int, n_rows: int) -> None:
    """Give the layers from `first_layer` on `n_rows` rows where they have one, without copying."""
    for layer in cache.layers[first_layer:]:
        if layer.keys is not None:  # some models reuse the keys of another layer
            layer.keys, layer.values = (x.expand(n_rows, -1, -1, -1) for x in (layer.keys, layer.values))


def with_room(cache: Any, n_rows: int, room: int) -> Any:
    """The cache with `n_rows` rows in every layer, and memory for `room` further positions where nothing slides.

    Growing by concatenation copies all that is there for each token.
    """
    from transformers.cache_utils import DynamicLayer

    _spread(cache, 0, n_rows)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None:
            cache.layers[i] = _roomy_layer()(layer.keys, layer.values, room)
    return cache


@functools.cache
def _roomy_layer() -> Any:
    """The class, made on first use: importing transformers takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Writes new keys and values behind the old ones; `keys` and `values` are views of what is filled."""

        def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self._memory = tuple(_roomy(x, room) for x in (keys, values))
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

    return RoomyLayer


def _roomy(x: Tensor, room: int) -> Tensor:
    n_rows, heads, length, width = x.shape
    memory = x.new_empty(n_rows, heads, length + room, width)
    memory[:, :, :length] = x
    return memory
