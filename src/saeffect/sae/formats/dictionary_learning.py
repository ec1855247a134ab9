"""Crosscoders on disk as dictionary_learning's `save_pretrained` writes them: `config.json` and `model.safetensors`.

Its trainers write a pickled file instead, which is never loaded: dictionary_learning's
`CrossCoder.from_pretrained(file).save_pretrained(folder)` makes a folder that is read here. Normalisation of
activations is folded into the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae
from saeffect.io import atomic_path, write_json
from saeffect.sae.base import ARCHITECTURES, SaeConfig, SparseAutoencoder
from saeffect.sae.formats.weights import fill, is_count, read_weights

__all__ = ["config", "load", "matches", "save_dictionary_learning", "settings", "weights"]

settings = "config.json"
weights = "model.safetensors"
_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_NORMALISED = ("activation_mean", "activation_std", "activation_global_scale")
# The norm by which activations are ranked: its name in config.json, and its number in the file of weights.
_BY_SUM, _BY_WHOLE, _BY_NOTHING = ("CROSSCODER", 1), ("SAE", 2), ("NONE", 4)
_EPSILON = 1e-8  # added to the scale of outputs
_TOLERANCE = 2e-3  # relative; thresholds times norms that differ by less are one threshold, rounded to half precision


def matches(folder: Path, raw: Any) -> bool:
    return isinstance(raw, dict) and "dict_size" in raw and (folder / weights).is_file()


def config(folder: Path, raw: Any, where: str) -> SaeConfig:
    """BadFile without valid sizes; IncompatibleSae if there are not two models, or for an unknown ranking."""
    d_model, d_sae, n_models = (raw.get(key) for key in ("activation_dim", "dict_size", "num_layers"))
    if not (is_count(d_model) and is_count(d_sae)):
        raise BadFile(
            f"config.json gives activation_dim={d_model!r}, dict_size={d_sae!r}; expected positive whole numbers.",
            at=where,
            fix="check that it is a crosscoder's.",
        )
    if n_models != 2:
        raise IncompatibleSae(
            f"this crosscoder reads num_layers={n_models!r} activations; supported: 2, a base and a tuned model.",
            at=where,
            fix="use a crosscoder of two models.",
        )
    rankings = [name for name, _ in (_BY_SUM, _BY_WHOLE, _BY_NOTHING)]
    if raw.get("code_normalization", _BY_SUM[0]) not in rankings:
        raise IncompatibleSae(
            f"this crosscoder has code_normalization={raw['code_normalization']!r}; supported: {', '.join(rankings)}.",
            at=where,
            fix="use one with CROSSCODER, the default.",
        )
    by_threshold = "k" in raw or "threshold" in _read_tensors(folder, where, {})
    return SaeConfig(
        "crosscoder_jumprelu" if by_threshold else "crosscoder_l1",
        2 * d_model,
        d_sae,
        apply_b_dec_to_input=False,
        metadata={"trained_by": "dictionary_learning", **({"k": raw["k"]} if is_count(raw.get("k")) else {})},
    )


def load(folder: Path, raw: Any, where: str) -> SparseAutoencoder:
    """The crosscoder; BatchTopK's single threshold becomes one a feature, divided by the norm that ranks it."""
    cfg = config(folder, raw, where)
    n, d = cfg.d_sae, cfg.d_in // 2
    shapes = {"encoder.weight": (2, d, n), "encoder.bias": (n,), "decoder.weight": (2, n, d), "decoder.bias": (2, d)}
    shapes |= {"activation_mean": (2, d), "activation_std": (2, d), "activation_global_scale": (2,)}
    tensors = _read_tensors(folder, where, shapes)
    encoder, bias, decoder, b_dec = (tensors[name].double() for name in _NAMES)
    sae = ARCHITECTURES[cfg.architecture](cfg)
    parameters: dict[str, Tensor] = {}
    if cfg.architecture == "crosscoder_jumprelu":
        threshold = tensors.get("threshold", torch.tensor(0.0)).double()
        if threshold.numel() != 1:
            raise IncompatibleSae(f"{weights} has a threshold for each model, which is not supported.", at=where)
        parameters["threshold"] = threshold.clamp_min(0.0) / _ranking_lengths(tensors, raw, decoder).clamp_min(_EPSILON)
    if all(name in tensors for name in _NORMALISED) and not bool(tensors["activation_mean"].isnan().any()):
        mean, scale = tensors["activation_mean"].double(), tensors["activation_global_scale"].double()[:, None]
        encoder = encoder * scale[:, :, None]
        bias = bias - torch.einsum("ld,ldf->f", mean, encoder)
        decoder, b_dec = decoder / (scale[:, :, None] + _EPSILON), b_dec / (scale + _EPSILON) + mean
    parameters |= {"W_enc": encoder.flatten(0, 1), "b_enc": bias, "W_dec": torch.cat([decoder[0], decoder[1]], dim=1)}
    return fill(sae, parameters | {"b_dec": b_dec.flatten()}, weights, where)


def save_dictionary_learning(sae: SparseAutoencoder, folder: Path | str) -> Path:
    """Write a crosscoder that dictionary_learning's `BatchTopKCrossCoder` (for an L1 crosscoder, `CrossCoder`) reads
    with `.from_pretrained(folder, from_hub=True)`. IncompatibleSae for an SAE of one model, or thresholds that do not
    come from BatchTopK.
    """
    from safetensors.torch import save_file

    from saeffect.sae.trainable import TrainableSae

    folder = Path(folder)
    sae = sae.for_inference() if isinstance(sae, TrainableSae) else sae
    if not sae.sides:
        raise IncompatibleSae(f"this is a {sae.label} SAE; only crosscoders have this layout.", at=str(folder))
    W_dec, b_dec = sae.W_dec.detach().double(), sae.b_dec.detach().double()
    W_enc, b_enc = sae.W_enc.detach().double(), sae.b_enc.detach().double()
    if sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc - b_dec @ W_enc
    d = sae.cfg.d_in // 2
    unset = torch.full((2, d), torch.nan)
    tensors = {
        "encoder.weight": W_enc.unflatten(0, (2, d)),
        "encoder.bias": b_enc,
        "decoder.weight": torch.stack(W_dec.chunk(2, dim=1)),
        "decoder.bias": b_dec.unflatten(0, (2, d)),
        "activation_mean": unset,
        "activation_std": unset.clone(),
        "activation_global_scale": torch.ones(2),
        "target_rms": torch.tensor(1.0),
    }
    raw: dict[str, Any] = {"activation_dim": d, "dict_size": sae.cfg.d_sae, "num_layers": 2}
    raw["code_normalization"] = _BY_SUM[0]
    integers = {"code_normalization_id": torch.tensor(_BY_SUM[1])}
    if "threshold" in sae.vectors:
        ranked = sae.get_parameter("threshold").detach().double() * sae.row_norms(W_dec)
        threshold = ranked.median()
        if float((ranked - threshold).abs().max()) > _TOLERANCE * float(threshold.abs()):
            raise IncompatibleSae(
                "the thresholds of this crosscoder, times decoder lengths, are not one number.",
                at=str(folder),
                fix="export a crosscoder that was trained with architecture: crosscoder.",
            )
        k = sae.cfg.metadata.get("k", 100)  # dictionary_learning's default; not used at inference
        raw["k"], integers["k"] = k, torch.tensor(k, dtype=torch.int32)
        tensors["threshold"] = threshold
    with atomic_path(folder / weights) as temporary:
        save_file({name: t.float().contiguous() for name, t in tensors.items()} | integers, temporary)
    write_json(folder / settings, raw)
    return folder


def _read_tensors(folder: Path, where: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return read_weights(folder / weights, where, shapes=shapes, required=_NAMES)


def _ranking_lengths(tensors: dict[str, Tensor], raw: dict[str, Any], decoder: Tensor) -> Tensor:
    """The norm of each feature's decoder rows `[2, d_sae, d]` that ranks features, as stored in the file."""
    number = int(tensors["code_normalization_id"]) if "code_normalization_id" in tensors else None
    ranking = (raw.get("code_normalization", _BY_SUM[0]), number)
    if number == _BY_WHOLE[1] or ranking == (_BY_WHOLE[0], None):
        return decoder.norm(dim=(0, 2))
    if number == _BY_NOTHING[1] or ranking == (_BY_NOTHING[0], None):
        return torch.ones_like(decoder[0, :, 0])
    return decoder.norm(dim=2).sum(dim=0)
