"""The unembedding as TransformerLens' `from_pretrained` gives it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from saeffect.errors import ConfigError
from saeffect.lm.language_model import LanguageModel

__all__ = ["final_norm", "unembedding"]

_NORM_PATHS = (
    "model.norm",
    "transformer.ln_f",
    "gpt_neox.final_layer_norm",
    "model.decoder.final_layer_norm",
    "model.language_model.norm",
    "model.final_layernorm",
)


def final_norm(model: nn.Module) -> nn.Module:
    """The normalisation between the last block and the unembedding.

    Raises:
        ConfigError: It is in none of the known places.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    for path in _NORM_PATHS:
        try:
            return base.get_submodule(path)
        except AttributeError:
            continue
    raise ConfigError(f"{type(base).__name__} keeps its final norm in none of: {', '.join(_NORM_PATHS)}.")


@torch.no_grad()
def unembedding(lm: LanguageModel) -> Tensor:
    """`W_U` with the final norm's weight folded in, centred over the vocabulary.

    Where the final norm centres its input, the columns are also centred over `d_model`, since it feeds the
    unembedding centred vectors only. What norm and head do is measured, not read off their classes.

    Returns:
        float32 `[d_model, d_vocab]`, on the CPU.

    Raises:
        ConfigError: The final norm or the head does something that no such matrix stands for.

    Source:
        TransformerLens `fold_layer_norm` and `center_unembed`.
    """
    head = lm.model.get_output_embeddings()
    scale, centres = _what_it_does(final_norm(lm.model), head.weight.shape[1])
    _require_plain(head)
    W_U = head.weight.detach().float().cpu().T.clone()
    if scale is not None:
        W_U *= scale[:, None]
    if centres:
        W_U -= W_U.mean(dim=0, keepdim=True)
    W_U -= W_U.mean(dim=1, keepdim=True)
    return W_U


def _what_it_does(norm: nn.Module, d_model: int) -> tuple[Tensor | None, bool]:
    """What a norm multiplies each dimension by, float32 `[d_model]` (None for 1), and whether it centres first."""
    norm = copy.deepcopy(norm).float().cpu()
    x = 100.0 * torch.randn(4, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32) + 50.0

    def odd(vectors: Tensor) -> Tensor:
        """Without the norm's bias."""
        return (norm(vectors[None]) - norm(-vectors[None]))[0] / 2

    weight = getattr(norm, "weight", None)
    ones = torch.ones(d_model)
    # Gemma and its kin store the scale less one.
    scales = [ones] if weight is None else [weight.detach(), weight.detach() + 1.0, ones]
    for centres in (False, True):
        plain = x - x.mean(1, keepdim=True) if centres else x
        plain = plain / plain.square().mean(1, keepdim=True).sqrt()
        for scale in scales:
            if torch.allclose(odd(x), plain * scale, rtol=1e-3, atol=1e-3 * float(scale.abs().max())):
                return (None if scale is ones else scale), centres
    raise ConfigError(
        f"the final norm, {type(norm).__name__}, neither scales nor centres and scales its input, so no matrix stands"
        " for the way from the residual stream to the logits.",
        fix="use a model whose final norm is a LayerNorm or RMSNorm.",
    )


def _require_plain(head: nn.Module) -> None:
    """The head multiplies by its weight and adds a constant; an adapter that is not merged adds more."""
    weight: Any = head.weight
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    found = (head(x) - head(torch.zeros_like(x))).float()
    expected = x.float() @ weight.float().T
    rounding = 16 * torch.finfo(weight.dtype).eps
    if not torch.allclose(found, expected, rtol=rounding, atol=rounding * float(expected.abs().max())):
        raise ConfigError(
            f"the unembedding, {type(head).__name__}, does more than multiply by its weight.",
            fix="merge the adapter into the model (merge_and_unload).",
        )
