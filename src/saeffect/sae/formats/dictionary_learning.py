"""Crosscoders on disk as dictionary_learning's `save_pretrained` writes them: `config.json` and `model.safetensors`.

Its trainers leave a pickled file instead, which is never loaded: `CrossCoder.from_pretrained(file).save_pretrained(
folder)` there makes the folder that is read here. One that normalises activations is read with that folded in.
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
# By which length activations are ranked: its name there, and its number in the file.
_BY_SUM, _BY_WHOLE, _BY_NOTHING = ("CROSSCODER", 1), ("SAE", 2), ("NONE", 4)
_TINY = 1e-8  # added to the scale on the way out
_ALIKE = 2e-3  # thresholds times lengths that differ by no more are one threshold, rounded in half precision


def matches(folder: Path, raw: Any) -> bool:
    return isinstance(raw, dict) and "dict_size" in raw and (folder / weights).is_file()


def config(folder: Path, raw: Any, where: str) -> SaeConfig:
    """BadFile without valid sizes; IncompatibleSae for other numbers of models than two, or another ranking."""
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
    known = [name for name, _ in (_BY_SUM, _BY_WHOLE, _BY_NOTHING)]
    if raw.get("code_normalization", _BY_SUM[0]) not in known:
        raise IncompatibleSae(
            f"this crosscoder has code_normalization={raw['code_normalization']!r}; supported: {', '.join(known)}.",
            at=where,
            fix="use one with CROSSCODER, the default.",
        )
    by_threshold = "k" in raw or "threshold" in _tensors(folder, where, {})
    return SaeConfig(
        "crosscoder_jumprelu" if by_threshold else "crosscoder_l1",
        2 * d_model,
        d_sae,
        apply_b_dec_to_input=False,
        metadata={"trained_by": "dictionary_learning", **({"k": raw["k"]} if is_count(raw.get("k")) else {})},
    )


def load(folder: Path, raw: Any, where: str) -> SparseAutoencoder:
    """The crosscoder; the one threshold of BatchTopK becomes one a feature, divided by the length it is ranked by."""
    cfg = config(folder, raw, where)
    n, d = cfg.d_sae, cfg.d_in // 2
    shapes = {"encoder.weight": (2, d, n), "encoder.bias": (n,), "decoder.weight": (2, n, d), "decoder.bias": (2, d)}
    shapes |= {"activation_mean": (2, d), "activation_std": (2, d), "activation_global_scale": (2,)}
    found = _tensors(folder, where, shapes)
    encoder, bias, decoder, b_dec = (found[name].double() for name in _NAMES)
    sae = ARCHITECTURES[cfg.architecture](cfg)
    ours: dict[str, Tensor] = {}
    if cfg.architecture == "crosscoder_jumprelu":
        threshold = found.get("threshold", torch.tensor(0.0)).double()
        if threshold.numel() != 1:
            raise IncompatibleSae(f"{weights} has a threshold for each model, which is not supported.", at=where)
        ours["threshold"] = threshold.clamp_min(0.0) / _ranked_by(found, raw, decoder).clamp_min(_TINY)
    if all(name in found for name in _NORMALISED) and not bool(found["activation_mean"].isnan().any()):
        mean, scale = found["activation_mean"].double(), found["activation_global_scale"].double()[:, None]
        encoder = encoder * scale[:, :, None]
        bias = bias - torch.einsum("ld,ldf->f", mean, encoder)
        decoder, b_dec = decoder / (scale[:, :, None] + _TINY), b_dec / (scale + _TINY) + mean
    ours |= {"W_enc": encoder.flatten(0, 1), "b_enc": bias, "W_dec": torch.cat([decoder[0], decoder[1]], dim=1)}
    return fill(sae, ours | {"b_dec": b_dec.flatten()}, weights, where)


def save_dictionary_learning(sae: SparseAutoencoder, folder: Path | str) -> Path:
    """Write a crosscoder so that `BatchTopKCrossCoder` (or, for an L1 one, `CrossCoder`) there reads it:
    `.from_pretrained(folder, from_hub=True)`. IncompatibleSae for an SAE of one model, or thresholds that are no
    BatchTopK's.
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
    nothing = torch.full((2, d), torch.nan)
    tensors = {
        "encoder.weight": W_enc.unflatten(0, (2, d)),
        "encoder.bias": b_enc,
        "decoder.weight": torch.stack(W_dec.chunk(2, dim=1)),
        "decoder.bias": b_dec.unflatten(0, (2, d)),
        "activation_mean": nothing,
        "activation_std": nothing.clone(),
        "activation_global_scale": torch.ones(2),
        "target_rms": torch.tensor(1.0),
    }
    raw: dict[str, Any] = {"activation_dim": d, "dict_size": sae.cfg.d_sae, "num_layers": 2}
    raw["code_normalization"] = _BY_SUM[0]
    whole = {"code_normalization_id": torch.tensor(_BY_SUM[1])}
    if "threshold" in sae.vectors:
        ranked = sae.get_parameter("threshold").detach().double() * sae.row_norms(W_dec)
        middle = ranked.median()
        if float((ranked - middle).abs().max()) > _ALIKE * float(middle.abs()):
            raise IncompatibleSae(
                "the thresholds of this crosscoder, times decoder lengths, are not one number.",
                at=str(folder),
                fix="export a crosscoder that was trained with architecture: crosscoder.",
            )
        k = sae.cfg.metadata.get("k", 100)  # there the default; not used at inference
        raw["k"], whole["k"] = k, torch.tensor(k, dtype=torch.int32)
        tensors["threshold"] = middle
    with atomic_path(folder / weights) as temporary:
        save_file({name: t.float().contiguous() for name, t in tensors.items()} | whole, temporary)
    write_json(folder / settings, raw)
    return folder


def _tensors(folder: Path, where: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return read_weights(folder / weights, where, shapes=shapes, required=_NAMES)


def _ranked_by(found: dict[str, Tensor], raw: dict[str, Any], decoder: Tensor) -> Tensor:
    """Length of each feature's decoder rows `[2, d_sae, d]`, as the file says."""
    number = int(found["code_normalization_id"]) if "code_normalization_id" in found else None
    named = (raw.get("code_normalization", _BY_SUM[0]), number)
    if number == _BY_WHOLE[1] or named == (_BY_WHOLE[0], None):
        return decoder.norm(dim=(0, 2))
    if number == _BY_NOTHING[1] or named == (_BY_NOTHING[0], None):
        return torch.ones_like(decoder[0, :, 0])
    return decoder.norm(dim=2).sum(dim=0)
