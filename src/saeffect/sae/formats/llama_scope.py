"""SAEs of OpenMOSS's Llama Scope, read only: `hyperparams.json` and `checkpoints/final.safetensors`; later ones
(Llama-Scope-R1-Distill) `config.json` and `sae_weights.safetensors`. Both take activations scaled to a mean norm of
√d_model; the scaling is folded into the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saeffect.errors import BadFile, IncompatibleSae
from saeffect.io import read_json
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats.weights import fill, is_count, read_weights
from saeffect.sae.jumprelu import JumpReluSae

__all__ = ["SCALER", "LlamaScope"]

#: File beside the weights with the factor of the activations, if the weights do not contain it.
SCALER = "activation_scaler.json"
_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_LOG_THRESHOLD = "log_jumprelu_threshold"
_MODEL = "meta-llama/Llama-3.1-8B"
_CONTEXT = 1024


class LlamaScope:
    """One of the two layouts, given by its file names. See `SaeFormat`."""

    def __init__(self, settings: str, weights: str) -> None:
        self.settings, self.weights = settings, weights

    def matches(self, folder: Path, raw: Any) -> bool:
        return (
            isinstance(raw, dict) and "d_model" in raw and "hook_point_in" in raw and (folder / self.weights).is_file()
        )

    def config(self, folder: Path, raw: Any, where: str) -> SaeConfig:
        """BadFile without valid sizes; IncompatibleSae unless it is a JumpReLU SAE with one hook."""
        del folder
        d_in, d_sae = raw.get("d_model"), raw.get("d_sae")
        if not is_count(d_sae) and is_count(d_in) and is_count(raw.get("expansion_factor")):
            d_sae = d_in * raw["expansion_factor"]
        if not (is_count(d_in) and is_count(d_sae)):
            raise BadFile(
                f"{self.settings} gives d_model={d_in!r}, d_sae={d_sae!r}; expected positive whole numbers.",
                at=where,
                fix="check that it is an SAE's.",
            )
        if raw.get("act_fn", "jumprelu") != "jumprelu" or raw.get("use_glu_encoder"):
            raise IncompatibleSae(
                f"this SAE has act_fn={raw.get('act_fn')!r}, use_glu_encoder={raw.get('use_glu_encoder')!r};"
                " supported: jumprelu.",
                at=where,
                fix="use a JumpReLU SAE.",
            )
        hook = raw["hook_point_in"]
        if raw.get("hook_point_out", hook) != hook:
            raise IncompatibleSae(
                f"this is a transcoder, from {hook} to {raw['hook_point_out']}.", at=where, fix="choose an SAE."
            )
        metadata = {"trained_by": "Llama Scope", "model_name": _MODEL, "hook_name": hook}
        metadata |= {"prepend_bos": True, "context_size": _CONTEXT}
        subtracts_b_dec = bool(raw.get("apply_decoder_bias_to_pre_encoder", False))
        return SaeConfig("jumprelu", d_in, d_sae, apply_b_dec_to_input=subtracts_b_dec, metadata=metadata)

    def load(self, folder: Path, raw: Any, where: str) -> SparseAutoencoder:
        """The SAE of unscaled activations; feature activations keep Llama Scope's scale. `jump_relu_threshold` is in
        units of unscaled activations, thresholds in the weights are in units of scaled ones.
        """
        cfg = self.config(folder, raw, where)
        n, d = cfg.d_sae, cfg.d_in
        shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)}
        stored = read_weights(folder / self.weights, where, shapes=shapes | {_LOG_THRESHOLD: (n,)}, required=_NAMES)
        scale = self._scale(folder, raw, stored, where)
        if _LOG_THRESHOLD in stored:
            threshold = stored[_LOG_THRESHOLD].float().exp()
        else:
            threshold = torch.full((n,), float(raw.get("jump_relu_threshold", 0.0)) * scale)
        W_dec = stored["decoder.weight"].float().T
        if raw.get("sparsity_include_decoder_norm") and _LOG_THRESHOLD in stored:
            threshold = threshold / W_dec.norm(dim=1).clamp_min(1e-8)
        parameters = {
            "W_enc": stored["encoder.weight"].float().T * scale,
            "b_enc": stored["encoder.bias"],
            "W_dec": W_dec / scale,
            "b_dec": stored["decoder.bias"].float() / scale,
            "threshold": threshold,
        }
        return fill(JumpReluSae(cfg), parameters, self.weights, where)

    def _scale(self, folder: Path, raw: Any, tensors: dict[str, torch.Tensor], where: str) -> float:
        normalisation = raw.get("norm_activation", "dataset-wise")
        if normalisation == "inference":  # folded into the weights already
            return 1.0
        hook = str(raw["hook_point_in"])
        norms = raw.get("dataset_average_activation_norm") or {}
        norm = norms.get("in", norms.get(hook)) if isinstance(norms, dict) else None
        if norm is None and f"dataset_average_activation_norm.{hook}" in tensors:
            norm = float(tensors[f"dataset_average_activation_norm.{hook}"])
        scale = None
        if isinstance(norm, int | float) and norm > 0:
            scale = raw["d_model"] ** 0.5 / norm
        elif (folder / SCALER).is_file():
            scaler = read_json(folder / SCALER)
            scale = scaler.get("scaling_factor") if isinstance(scaler, dict) else None
        if normalisation != "dataset-wise" or not isinstance(scale, int | float) or not 0 < scale < 1e30:
            raise IncompatibleSae(
                f"this SAE reads activations scaled {normalisation}, and {self.settings} does not say by how much.",
                at=where,
                fix="name it as SAELens does, saelens:<release>/<id>: its list has the factor; see saeffect saes.",
            )
        return float(scale)
