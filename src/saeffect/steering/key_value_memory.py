"""Keys and values of past positions in memory set aside once, and rows that share a past."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

__all__ = ["can_spread", "spread", "with_room"]


def can_spread(cache: Any) -> bool:
    """Whether a cache of transformers is keys and values alone, so that `spread` and `with_room` know it whole."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and len(cache.layers) > 0 and all(type(x) in known for x in cache.layers)


def spread(cache: Any, first_layer: int, n_rows: int) -> None:
    """Give the layers from `first_layer` on `n_rows` rows where they have one, without copying."""
    for layer in cache.layers[first_layer:]:
        if layer.keys is not None:  # some models reuse the keys of another layer
            layer.keys, layer.values = (x.expand(n_rows, -1, -1, -1) for x in (layer.keys, layer.values))


def with_room(cache: Any, n_rows: int, room: int) -> Any:
    """The cache with `n_rows` rows in every layer, and memory for `room` further positions where nothing slides.

    Growing by concatenation copies all that is there for each token.
    """
    from transformers.cache_utils import DynamicLayer

    spread(cache, 0, n_rows)
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
            self._memory = tuple(_with_room(x, room) for x in (keys, values))
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


def _with_room(x: Tensor, room: int) -> Tensor:
    n_rows, heads, length, width = x.shape
    memory = x.new_empty(n_rows, heads, length + room, width)
    memory[:, :, :length] = x
    return memory
