"""From what SAELens' trainer keeps on the way (`save_model`, checkpoints) to what it saves at the end.

Files made for inference pass through as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae
from saeffect.io import read_json

__all__ = ["TRAINING_FORMS", "for_inference"]

# Architectures that SAELens only trains, and what it saves them as.
TRAINING_FORMS: Mapping[str, str] = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}


def for_inference(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of an SAE's inference form, in unscaled units.

    A running threshold becomes every feature's, with the decoder norms by which features were ranked folded in;
    the scaling of inputs that a checkpoint of an unfinished run keeps in `activation_scaler.json` is folded too.

    Args:
        folder: Where the SAE lies.
        raw: Its cfg.json.
        tensors: Its weights, as saved.
        where: For errors.

    Raises:
        BadFile: A tensor is missing.
        IncompatibleSae: Whitened inputs, or activations that are multiplied by something at inference.
    """
    found = dict(tensors)
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").float().exp()
    if not torch.all(found.pop("scaling_factor", torch.ones(1)) == 1):
        raise IncompatibleSae(
            "this SAE multiplies its activations by scaling_factor, which is not supported.", at=where
        )
    if raw.get("architecture") in TRAINING_FORMS:
        missing = {"topk_threshold", "W_enc", "b_enc", "W_dec"} - set(found)
        if missing:
            raise BadFile(f"the weights have no {min(missing)}; they have: {', '.join(sorted(found))}.", at=where)
        threshold = float(found.pop("topk_threshold"))
        if raw.get("rescale_acts_by_decoder_norm", True):
            norm = found["W_dec"].float().norm(dim=1).clamp_min(1e-8)
            found["W_enc"] = found["W_enc"].float() * norm
            found["b_enc"] = found["b_enc"].float() * norm
            found["W_dec"] = found["W_dec"].float() / norm[:, None]
        found["threshold"] = torch.full(found["b_enc"].shape, threshold)
    return _unscaled(folder, found, where)


def _unscaled(folder: Path, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    if (folder / "activation_whitening.safetensors").is_file():
        raise IncompatibleSae(
            "this checkpoint was trained on whitened inputs, which is not supported.",
            at=where,
            fix="use what the finished run saved.",
        )
    if not (folder / "activation_scaler.json").is_file():
        return tensors
    kept = read_json(folder / "activation_scaler.json")
    scale = kept.get("scaling_factor") if isinstance(kept, dict) else None
    if scale is None:  # no scaling, or folded already
        return tensors
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e30:
        raise BadFile(f"activation_scaler.json gives scaling_factor={scale!r}; expected a positive number.", at=where)
    # As SAELens folds it: activations keep the scaled size.
    powers = {"W_enc": 1, "W_dec": -1, "b_dec": -1}
    return {name: t.float() * scale ** powers[name] if name in powers else t for name, t in tensors.items()}
