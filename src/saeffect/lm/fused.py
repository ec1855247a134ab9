"""The same forward pass in fewer trips through memory, for passes that run over much text on a CPU.

Two things besides the big products take time there. `gelu_new` is written as seven element-wise operations in
transformers; PyTorch has the same function as one. PyTorch's attention on CPUs neither skips what the causal mask
hides nor uses bfloat16 products at their full speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saeffect.lm.language_model import LanguageModel

__all__ = ["causal_attention", "fused"]

# tanh(sqrt(2/pi) (x + 0.044715 x^3)), by the names that transformers has for it.
_TANH_GELUS = ("NewGELUActivation", "FastGELUActivation")
_SILUS = ("SiLU", "SiLUActivation")
# Queries a product: enough rows for the product to run at full speed, few enough that little is hidden.
_BLOCK = 128
# What attention functions are given that changes nothing for one packed pass without a cache.
_HARMLESS = ("dropout", "scaling", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions")

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@contextlib.contextmanager
def fused(lm: LanguageModel) -> Iterator[None]:
    """While inside, the model runs with faster equivalents where it has such parts, and as it is elsewhere.

    What it computes stays the same but for rounding: in float32 one part in 10^6; in bfloat16 attention scores are
    rounded to bfloat16, as transformers' own `eager` attention rounds them. Activation functions overwrite their
    input, so this is for inference alone.
    """
    replaced: list[nn.Module] = []
    try:
        for module in lm.model.modules():
            function = _in_place(module)
            if function is not None and "forward" not in vars(module):
                module.forward = function
                replaced.append(module)
        with _attention(lm):
            yield
    finally:
        for module in replaced:
            del module.forward


def _in_place(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if type(module).__name__ in _TANH_GELUS:
        return _gelu_
    if type(module).__name__ in _SILUS:
        return _silu_
    return None


def _gelu_(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x, approximate="tanh")


def _silu_(x: Tensor) -> Tensor:
    return nn.functional.silu(x, inplace=True)


@contextlib.contextmanager
def _attention(lm: LanguageModel) -> Iterator[None]:
    """Put `causal_attention` in the place of transformers' `sdpa`, where it is faster: bfloat16 on a CPU."""
    name = "sdpa"
    chosen = getattr(lm.model.config, "_attn_implementation", None)
    if chosen != name or lm.dtype != torch.bfloat16 or lm.device.type != "cpu":
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = _where_it_applies(before)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = before


def _where_it_applies(usual: Attention) -> Attention:
    """Ours for plain causal attention over whole sequences, the usual one for everything else."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        # A mask, a soft cap, sinks, a position bias: transformers hands each of them over by name.
        special = [n for n, v in options.items() if n not in _HARMLESS and n != "sliding_window" and v is not None]
        causal = options.get("is_causal")
        plain = (
            attention_mask is None
            and not special
            and (getattr(module, "is_causal", True) if causal is None else causal)
            and not options.get("dropout")
            and query.dtype == torch.bfloat16
            and 1 < query.shape[2] == key.shape[2]
            and key.shape[1:] == value.shape[1:]
        )
        if not plain:
            return usual(module, query, key, value, attention_mask, **options)
        return causal_attention(query, key, value, scaling=options.get("scaling")), None

    return attend


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None = None) -> Tensor:
    """Causal attention in blocks of queries: nothing beyond a block's last position is computed.

    Args:
        query: `[batch, heads, sequence, d_head]`.
        key: `[batch, key heads, sequence, d_head]`; each key head serves `heads / key heads` queries in a row.
        value: The same shape as `key`.
        scaling: Factor of the scores; 1/sqrt(d_head) if None.

    Returns:
        `[batch, sequence, heads, d_head]` in the dtype of `query`; scores are rounded to that dtype too.
    """
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    group = heads // shared
    query = (query * (width**-0.5 if scaling is None else scaling)).reshape(batch * shared, group, length, width)
    key = key.reshape(batch * shared, length, width).transpose(1, 2)
    value = value.reshape(batch * shared, length, width)
    hidden = query.new_full((_BLOCK, _BLOCK), float("-inf")).triu_(1)
    out = query.new_empty(batch, length, shared, group, width)
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        rows = stop - start
        block = query[:, :, start:stop].reshape(batch * shared, group * rows, width)
        scores = torch.bmm(block, key[:, :, :stop])
        scores.view(-1, group, rows, stop)[..., start:].add_(hidden[:rows, :rows])
        mixed = torch.bmm(scores.softmax(-1), value[:, :stop])
        out[:, start:stop] = mixed.view(batch, shared, group, rows, width).permute(0, 3, 1, 2, 4)
    return out.view(batch, length, heads, width)
