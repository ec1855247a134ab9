"""Attention heads as a place to read and edit, `blocks.{i}.attn.hook_z`: what attention's output projection reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saeffect.errors import ConfigError
from saeffect.lm.architectures import HookMapping, blocks, mapping_of, norm_scale
from saeffect.lm.language_model import LanguageModel

__all__ = ["HOOK_Z", "heads_to_residual", "hook_width", "output_projection"]

HOOK_Z = "attn.hook_z"
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")


def output_projection(model: nn.Module, layer: int) -> nn.Module:
    """The module that turns a block's attention heads, side by side, into what attention gives; else ConfigError."""
    block = blocks(model)[layer]
    for name, attention in block.named_children():
        if name in HookMapping().attn_out:
            for own, module in attention.named_children():
                if own in _PROJECTIONS and isinstance(getattr(module, "weight", None), Tensor):
                    return module
    raise ConfigError(
        f"{type(block).__name__} has no attention whose output projection is known ({', '.join(_PROJECTIONS)}).",
        at=f"blocks.{layer}.{HOOK_Z}",
        fix="use hook_resid_pre or hook_resid_post, which every architecture has.",
    )


def hook_width(lm: LanguageModel, hook: str) -> int:
    """How many numbers a token has at a hook: `d_model`, or at attention heads all heads' numbers."""
    layer = _layer_of_heads(hook)
    return lm.d_model if layer is None else _width(output_projection(lm.model, layer))


@torch.no_grad()
def heads_to_residual(lm: LanguageModel, hook: str, rows: Tensor) -> Tensor:
    """What directions at a hook, `[n, width]`, add to the residual stream, float32 `[n, d_model]`: the rows
    themselves, but at attention heads their product with the output projection and, where the block normalises what
    attention adds (Gemma), that norm's weight. Its division by each token's own norm is left out: it changes
    lengths, not which tokens come first.
    """
    layer = _layer_of_heads(hook)
    if layer is None:
        return rows
    found = rows.float() @ _matrix(output_projection(lm.model, layer)).float().to(rows.device)
    after = mapping_of(lm.model).attn_out
    norms = [module for name, module in blocks(lm.model)[layer].named_children() if name in after and "norm" in name]
    scale = norm_scale(norms[0], lm.d_model) if norms else None
    return found if scale is None else found * scale.to(found.device)


def _layer_of_heads(hook: str) -> int | None:
    return int(hook.split(".")[1]) if hook.endswith(f".{HOOK_Z}") else None


def _width(projection: Any) -> int:
    base = getattr(projection, "base_layer", projection)  # of an adapter that is kept apart
    return int(base.in_features if hasattr(base, "in_features") else base.weight.shape[0])


def _matrix(projection: Any) -> Tensor:
    """`[width, d_model]`; GPT-2's Conv1D keeps its weight so, Linear the other way round; of others it is measured."""
    weight: Tensor = projection.weight
    if type(projection) is nn.Linear:
        return weight.detach().T
    if type(projection).__name__ == "Conv1D":
        return weight.detach()
    each = torch.eye(_width(projection), device=weight.device)
    each = each.to(weight.dtype if weight.is_floating_point() else torch.bfloat16)
    found: Tensor = projection(each) - projection(torch.zeros_like(each))
    return found.detach()
