"""Where transformers' architectures keep blocks and their parts (`HOOK_MAPPINGS`); unembedding and attention heads."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeffect.errors import ConfigError
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.placement import aligned, plain_copy

__all__ = [
    "HOOK_MAPPINGS",
    "HOOK_Z",
    "HookMapping",
    "blocks",
    "final_norm",
    "heads_to_residual",
    "hook_width",
    "mapping_of",
    "output_projection",
    "register_hook_mapping",
    "unembedding",
]

HOOK_Z = "attn.hook_z"
"""The input of attention's output projection: the heads' outputs, concatenated."""
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")


@dataclass(frozen=True)
class HookMapping:
    """Where an architecture keeps what the hooks read. Of several names, the first that the model has is used.

    Attributes:
        blocks: Paths in the model of its list of blocks.
        final_norm: Paths in the model of the normalisation before the unembedding.
        attn_out: Modules of a block whose output attention adds to the residual stream; none: no `hook_attn_out`.
        mlp_out: The same for the MLP.
        resid_mid: Modules of a block whose input is the residual stream between attention and MLP.
        signs: Parts of a block by which a model of an unknown type is recognised.
    """

    blocks: tuple[str, ...] = (
        "model.layers",  # Llama, Mistral, Qwen, Gemma, SmolLM, Phi, OLMo
        "transformer.h",  # GPT-2, GPT-J, Bloom, Falcon
        "gpt_neox.layers",  # Pythia
        "model.decoder.layers",  # OPT
        "model.language_model.layers",  # multimodal wrappers
    )
    final_norm: tuple[str, ...] = (
        "model.norm",
        "transformer.ln_f",
        "gpt_neox.final_layer_norm",
        "model.decoder.final_layer_norm",
        "model.language_model.norm",
        "model.final_layernorm",
    )
    attn_out: tuple[str, ...] = ("self_attn", "attn", "attention", "self_attention")
    mlp_out: tuple[str, ...] = ("mlp", "feed_forward", "ffn")
    resid_mid: tuple[str, ...] = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm")
    signs: tuple[str, ...] = ()


_STANDARD = HookMapping()
HOOK_MAPPINGS: dict[str, HookMapping] = {
    # Gemma and OLMo normalise the outputs of attention and MLP before adding them; TransformerLens hooks the
    # normalised value.
    "gemma2": HookMapping(
        attn_out=("post_attention_layernorm",),
        mlp_out=("post_feedforward_layernorm",),
        resid_mid=("pre_feedforward_layernorm",),
        signs=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    # No norm before the MLP, which reads the stream itself.
    "olmo2": HookMapping(
        attn_out=("post_attention_layernorm",),
        mlp_out=("post_feedforward_layernorm",),
        resid_mid=("mlp",),
        signs=("post_feedforward_layernorm",),
    ),
    "glm4": HookMapping(
        attn_out=("post_self_attn_layernorm",),
        mlp_out=("post_mlp_layernorm",),
        resid_mid=("post_attention_layernorm",),
        signs=("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    # Attention and MLP add the stream themselves, so their own outputs cannot be separated.
    "bloom": HookMapping(attn_out=(), mlp_out=(), resid_mid=()),
}
"""By transformers' `model_type`; other models follow the first whose signs their blocks have, or else the defaults."""


def register_hook_mapping(model_type: str, mapping: HookMapping) -> None:
    """Use the mapping for models whose configuration has this `model_type`; ConfigError if the type has one already."""
    if model_type in HOOK_MAPPINGS:
        raise ConfigError(f"there is a hook mapping for {model_type!r} already.", at="HOOK_MAPPINGS")
    HOOK_MAPPINGS[model_type] = mapping


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of transformer blocks; ConfigError if it is in none of the known places."""
    base = _unwrap(model)
    mapping = HOOK_MAPPINGS.get(_model_type(base), _STANDARD)
    for path in mapping.blocks:
        with contextlib.suppress(AttributeError):
            module = base.get_submodule(path)
            if isinstance(module, nn.ModuleList):
                return module
    raise ConfigError(
        f"{type(base).__name__} keeps its blocks in none of the known places: {', '.join(mapping.blocks)}.",
        fix="use a decoder-only model of a supported family (Llama, Mistral, Qwen, Gemma, GPT-2, Pythia), or describe"
        " this one with saeffect.lm.architectures.register_hook_mapping.",
    )


def final_norm(model: nn.Module) -> nn.Module:
    """The normalisation between last block and unembedding; ConfigError if it is in none of the known places."""
    base = _unwrap(model)
    paths = HOOK_MAPPINGS.get(_model_type(base), _STANDARD).final_norm
    for path in paths:
        with contextlib.suppress(AttributeError):
            return base.get_submodule(path)
    raise ConfigError(f"{type(base).__name__} keeps its final norm in none of: {', '.join(paths)}.")


def mapping_of(model: nn.Module) -> HookMapping:
    """The mapping that applies to a model."""
    mapping = HOOK_MAPPINGS.get(_model_type(_unwrap(model)))
    if mapping is not None:
        return mapping
    parts = {name for name, _ in blocks(model)[0].named_children()}
    return next((m for m in HOOK_MAPPINGS.values() if m.signs and parts.issuperset(m.signs)), _STANDARD)


def _unwrap(model: Any) -> nn.Module:
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _model_type(base: Any) -> str:
    return str(getattr(getattr(base, "config", None), "model_type", ""))


@torch.no_grad()
def unembedding(lm: LanguageModel) -> Tensor:
    """The unembedding, float32 `[d_model, d_vocab]` on the CPU: the final norm folded in, centred over the
    vocabulary; where the norm centres its input, columns are also centred over `d_model`. Norm and head are
    measured; ConfigError if no matrix expresses them. Source: TransformerLens `fold_layer_norm`, `center_unembed`.
    """
    head = lm.model.get_output_embeddings()
    scale, centres = _norm_scale(final_norm(lm.model), head.weight.shape[1])
    _require_linear_head(head, lm.device)
    with aligned(head):
        W_U = head.weight.detach().float().cpu().T.clone()
    if scale is not None:
        W_U *= scale[:, None]
    if centres:
        W_U -= W_U.mean(dim=0, keepdim=True)
    W_U -= W_U.mean(dim=1, keepdim=True)
    return W_U


def _norm_scale(norm: nn.Module, d_model: int) -> tuple[Tensor | None, bool]:
    """A norm's factor for each dimension, float32 `[d_model]` (None for 1), and whether it centres its input."""
    norm = plain_copy(norm)
    x = 100.0 * torch.randn(4, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32) + 50.0

    def odd(vectors: Tensor) -> Tensor:
        return (norm(vectors[None]) - norm(-vectors[None]))[0] / 2

    weight = getattr(norm, "weight", None)
    ones = torch.ones(d_model)
    # Gemma stores the scale minus one.
    scales = [ones] if weight is None else [weight.detach(), weight.detach() + 1.0, ones]
    for centres in (False, True):
        plain = x - x.mean(1, keepdim=True) if centres else x
        plain = plain / plain.square().mean(1, keepdim=True).sqrt()
        for scale in scales:
            if torch.allclose(odd(x), plain * scale, rtol=1e-3, atol=1e-3 * float(scale.abs().max())):
                return (None if scale is ones else scale), centres
    raise ConfigError(
        f"the final norm, {type(norm).__name__}, neither scales nor centres and scales its input, so no matrix"
        " expresses the map from the residual stream to the logits.",
        fix="use a model whose final norm is a LayerNorm or RMSNorm.",
    )


def _require_linear_head(head: nn.Module, device: torch.device) -> None:
    """ConfigError for a head that does more than multiply by its weight and add a constant (an unmerged adapter)."""
    weight: Any = head.weight
    target_device = device if weight.is_meta else weight.device
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(target_device, weight.dtype)
    logits = (head(x) - head(torch.zeros_like(x))).float()
    with aligned(head):
        weight = head.weight
        expected = x.to(weight.device).float() @ weight.float().T
    logits, rounding = logits.to(expected.device), 16 * torch.finfo(weight.dtype).eps
    if not torch.allclose(logits, expected, rtol=rounding, atol=rounding * float(expected.abs().max())):
        raise ConfigError(
            f"the unembedding, {type(head).__name__}, does more than multiply by its weight.",
            fix="merge the adapter into the model (merge_and_unload).",
        )


def output_projection(model: nn.Module, layer: int) -> nn.Module:
    """The module that maps a block's concatenated attention heads to attention's output; ConfigError if unknown."""
    block = blocks(model)[layer]
    for name, attention in block.named_children():
        if name in HookMapping().attn_out:
            for child, module in attention.named_children():
                if child in _PROJECTIONS and isinstance(getattr(module, "weight", None), Tensor):
                    return module
    raise ConfigError(
        f"{type(block).__name__} has no attention whose output projection is known ({', '.join(_PROJECTIONS)}).",
        at=f"blocks.{layer}.{HOOK_Z}",
        fix="use hook_resid_pre or hook_resid_post, which every architecture has.",
    )


def hook_width(lm: LanguageModel, hook: str) -> int:
    """Width of the activation at a hook: `d_model`, or at attention heads that of all heads together."""
    layer = _layer_of_heads(hook)
    return lm.d_model if layer is None else _width(output_projection(lm.model, layer))


@torch.no_grad()
def heads_to_residual(lm: LanguageModel, hook: str, rows: Tensor) -> Tensor:
    """What directions at a hook, `[n, width]`, add to the residual stream, float32 `[n, d_model]`: the rows
    themselves, but at attention heads their product with the output projection and, where the block normalises
    attention's output (Gemma), with that norm's weight. The norm's division by each token's own norm is left out: it
    changes lengths, not the order of tokens.
    """
    layer = _layer_of_heads(hook)
    if layer is None:
        return rows
    written = rows.float() @ _matrix(output_projection(lm.model, layer)).float().to(rows.device)
    attn_out = mapping_of(lm.model).attn_out
    norms = [module for name, module in blocks(lm.model)[layer].named_children() if name in attn_out and "norm" in name]
    scale = _norm_scale(norms[0], lm.d_model)[0] if norms else None
    return written if scale is None else written * scale.to(written.device)


def _layer_of_heads(hook: str) -> int | None:
    return int(hook.split(".")[1]) if hook.endswith(f".{HOOK_Z}") else None


def _width(projection: Any) -> int:
    base = getattr(projection, "base_layer", projection)  # of an adapter that is kept apart
    return int(base.in_features if hasattr(base, "in_features") else base.weight.shape[0])


def _matrix(projection: Any) -> Tensor:
    """`[width, d_model]`, as GPT-2's Conv1D stores its weight; Linear stores the transpose; others are measured."""
    weight: Tensor = projection.weight
    if type(projection) is nn.Linear:
        return weight.detach().T
    if type(projection).__name__ == "Conv1D":
        return weight.detach()
    identity = torch.eye(_width(projection), device=weight.device)
    identity = identity.to(weight.dtype if weight.is_floating_point() else torch.bfloat16)
    matrix: Tensor = projection(identity) - projection(torch.zeros_like(identity))
    return matrix.detach()
