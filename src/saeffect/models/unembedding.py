"""The unembedding as TransformerLens' `from_pretrained` gives it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saeffect.errors import ConfigError
from saeffect.models.language_model import LanguageModel

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

    For LayerNorm models the columns are also centred over `d_model`, since LayerNorm feeds the unembedding
    centred vectors only; RMSNorm does not, so there nothing is centred.

    Returns:
        float32 `[d_model, d_vocab]`, on the CPU.

    Source:
        TransformerLens `fold_layer_norm` and `center_unembed`.
    """
    norm = final_norm(lm.model)
    W_U = lm.model.get_output_embeddings().weight.detach().float().cpu().T.clone()
    scale = _norm_scale(norm)
    if scale is not None:
        W_U *= scale[:, None]
    if isinstance(norm, nn.LayerNorm):
        W_U -= W_U.mean(dim=0, keepdim=True)
    W_U -= W_U.mean(dim=1, keepdim=True)
    return W_U


def _norm_scale(norm: nn.Module) -> Tensor | None:
    """What the norm multiplies by, float32 `[d_model]`; None if it has no weight."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    scale = weight.detach().float().cpu()
    if isinstance(norm, nn.LayerNorm):
        return scale
    # Gemma and its kin store the scale less one. A vector of ones is normalised already, so it comes out as
    # the scale itself, which tells the two ways apart without a list of families.
    out = norm(torch.ones_like(weight)[None, None]).flatten().float().cpu()
    offset = (out - scale - 1.0).abs().mean() < (out - scale).abs().mean()
    return scale + 1.0 if offset else scale
