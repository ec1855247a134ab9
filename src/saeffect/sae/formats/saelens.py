"""SAEs on disk as SAELens writes them: `cfg.json`, `sae_weights.safetensors` and perhaps `sparsity.safetensors`. Older
releases and the checkpoints of SAELens' trainer (`save_model`) are read too, with thresholds and scaling folded in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, IncompatibleSae, unknown_name
from saeffect.io import atomic_path, read_json, write_json
from saeffect.sae.base import ARCHITECTURES, SaeConfig, SparseAutoencoder
from saeffect.sae.formats.weights import by_side, fill, is_count, joined, read_weights, sides_of
from saeffect.sae.trainable import TrainableSae

__all__ = ["SPARSITY", "WEIGHTS", "config", "load", "matches", "read_sparsity", "save_sae", "weights"]

WEIGHTS = weights = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
# SAELens takes a file without a version for one from before 6.0 and drops its metadata, the hook's name too.
_LAYOUT_VERSION = "6.0.0"
_TOP_LEVEL_METADATA = (
    "hook_name",
    "hook_point",
    "hook_layer",
    "model_name",
    "model_from_pretrained_kwargs",
    "context_size",
    "dataset_path",
    "prepend_bos",
)
# Folded into the weights before saving, so nothing is left to do at inference. Older files say true or false.
_FOLDED = ("none", "expected_average_only_in", None, False, True)
_TOO_MANY = 2**60  # numbers of a matrix
_EACH_INPUT = ("layer_norm", "constant_norm_rescale")
# Features of both signs, read as two features each: those of the second half push the other way.
_SIGNED = "abstopk"
# Tensors of one number a feature that only some files have; see `_our_names`.
_OTHER_VECTORS = ("log_threshold", "scaling_factor")


def matches(folder: Path, raw: Any) -> bool:
    """Whatever no other format claims: errors then name SAELens' files."""
    del folder, raw
    return True


def config(folder: Path, raw: Any, where: str) -> SaeConfig:
    del folder
    sizes = {key: raw.get(key) for key in ("d_in", "d_sae")} if isinstance(raw, dict) else {}
    if not (sizes and all(is_count(size) for size in sizes.values())):
        said = "".join(f" Got {key}={_shown(size)}." for key, size in sizes.items() if not is_count(size))
        raise BadFile(
            f"cfg.json gives no positive whole numbers d_in and d_sae.{said}",
            at=where,
            fix="check that it is an SAE's.",
        )
    if raw["d_in"] * raw["d_sae"] >= _TOO_MANY:
        raise BadFile("cfg.json gives sizes that no file of weights can have.", at=where, fix="restore cfg.json.")
    reshaping = raw.get("reshape_activations", "none")
    # Heads lie side by side in what is read here, as in its weights: there is nothing to reshape.
    if reshaping not in ("none", "hook_z"):
        raise IncompatibleSae(
            f"this SAE has reshape_activations={str(reshaping)!r}; supported: none and hook_z.",
            at=where,
            fix="use an SAE of the residual stream.",
        )
    normalisation = raw.get("normalize_activations", "none")
    if normalisation not in (*_FOLDED, *_EACH_INPUT):
        raise IncompatibleSae(
            f"this SAE needs normalize_activations={normalisation!r}; supported: none, {', '.join(_EACH_INPUT)}.",
            at=where,
            fix="fold the normalisation into the weights before saving.",
        )
    kind = _architecture(raw, where)
    if kind.sides and raw["d_in"] % len(kind.sides):
        raise BadFile(f"a crosscoder has the width of two models; d_in={raw['d_in']} is odd.", at=where)
    architecture = kind.saved_as or kind.architecture
    has_k = "k" in ARCHITECTURES[architecture].keys
    signed = raw.get("architecture") == _SIGNED
    metadata = _metadata(raw, where) | ({"signed_features": raw["d_sae"]} if signed else {})
    metadata |= {key: raw[key] for key in kind.settings if key in raw}
    loaded_with = metadata.get("model_from_pretrained_kwargs")
    return SaeConfig(
        architecture=architecture,
        d_in=raw["d_in"],
        d_sae=raw["d_sae"] * (2 if signed else 1),
        k=_k(raw, architecture, where) if has_k else None,
        apply_b_dec_to_input=_flag(raw, "apply_b_dec_to_input", True, where),
        normalize_activations=normalisation if normalisation in _EACH_INPUT else "none",
        rescale_acts_by_decoder_norm=_flag(raw, "rescale_acts_by_decoder_norm", False, where) and has_k,
        centre_input=isinstance(loaded_with, dict) and bool(loaded_with.get("center_writing_weights")),
        metadata=metadata,
    )


def load(folder: Path, raw: Any, where: str) -> SparseAutoencoder:
    cfg, kind = config(folder, raw, where), _architecture(raw, where)
    n = raw["d_sae"]
    shapes = dict.fromkeys(_OTHER_VECTORS, (n,)) | {
        name: tuple(part.shape)
        for whole, shape in kind.shapes(replace(cfg, d_sae=n)).items()
        for name, part in by_side(kind, {whole: torch.empty(shape, device="meta")}).items()
    }
    needed = [name for name in ("W_enc", "W_dec", "b_dec") if name in kind.shapes(cfg)]
    required = [part for name in needed for part in sides_of(kind, name)]
    tensors = read_weights(folder / WEIGHTS, where, shapes=shapes, required=tuple(required))
    tensors = _our_names(joined(kind, tensors), raw, where)
    if n != cfg.d_sae:
        tensors = {name: _both_signs(name, tensor) for name, tensor in tensors.items()}
    if kind.saved_as is None:
        return _unscaled(fill(kind(cfg), tensors, WEIGHTS, where), folder, where)
    rescaled = bool(raw.get("rescale_acts_by_decoder_norm", True))
    trained = kind(replace(cfg, architecture=kind.architecture, rescale_acts_by_decoder_norm=rescaled))
    assert isinstance(trained, TrainableSae)
    sae = fill(trained, tensors, WEIGHTS, where).for_inference()
    sae.cfg = cfg
    return _unscaled(sae, folder, where)


def save_sae(
    sae: SparseAutoencoder, folder: Path | str, *, dtype: str = "float32", sparsity: Tensor | None = None
) -> Path:
    """Write an SAE, any scaling of its inputs folded in, in SAELens' layout and its inference form; `folder` is made
    if missing.

    `dtype`: "float32", "float16" or "bfloat16", of the weights; thresholds stay float32, exactly (SAELens rounds them
    when it loads, unless given `dtype="float32"`). `sparsity`: log10 of each feature's firing rate, float `[d_sae]`;
    SAELens adds 1e-10 to the rate. ConfigError: another dtype, or one whose range the weights exceed.
    """
    from safetensors.torch import save_file

    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r} is not float32, float16 or bfloat16.")
    if isinstance(sae, TrainableSae):
        sae = sae.for_inference()
    tensors = {}
    for name, parameter in sae.named_parameters():
        target = torch.float32 if name == "threshold" else getattr(torch, dtype)
        tensors[name] = parameter.detach().to("cpu", target).contiguous()
        if parameter.isfinite().all() and not tensors[name].isfinite().all():
            raise ConfigError(
                f"{name} reaches {float(parameter.detach().abs().max()):.3g}, more than {dtype} can hold.",
                at=str(folder),
                fix="save it as bfloat16 or float32.",
            )
    folder = Path(folder)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(by_side(type(sae), tensors), temporary)
    write_json(folder / "cfg.json", _cfg_json(sae, dtype))
    if sparsity is not None:
        with atomic_path(folder / SPARSITY) as temporary:
            save_file({"sparsity": sparsity.detach().float().cpu().contiguous()}, temporary)
    return folder


def read_sparsity(folder: Path | str, *, at: str | None = None) -> Tensor | None:
    """log10 of each feature's saved firing rate, float32 `[d_sae]`; None without the file; BadFile if damaged."""
    path = Path(folder) / SPARSITY
    where = at or str(folder)
    if not path.is_file():
        return None
    tensors = read_weights(path, where, shapes={})
    if "sparsity" not in tensors or tensors["sparsity"].ndim != 1:
        raise BadFile(f"{SPARSITY} holds no one-dimensional tensor named sparsity.", at=where)
    return tensors["sparsity"].float()


def _cfg_json(sae: SparseAutoencoder, dtype: str) -> dict[str, Any]:
    cfg = sae.cfg
    raw: dict[str, Any] = {
        "sae_lens_version": _LAYOUT_VERSION,
        "architecture": sae.saelens_name,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": "hook_z" if (cfg.hook_name or "").endswith("hook_z") else "none",
        "metadata": dict(cfg.metadata),
    }
    raw |= {key: cfg.metadata[key] for key in sae.settings if key in cfg.metadata}
    if cfg.k is not None:
        raw |= {"k": cfg.k, "rescale_acts_by_decoder_norm": cfg.rescale_acts_by_decoder_norm}
    return raw


def _architecture(raw: Mapping[str, Any], where: str) -> type[SparseAutoencoder]:
    named = raw.get("architecture", "standard")
    activation = raw.get("activation_fn", raw.get("activation_fn_str"))
    if named == "standard" and activation == "topk":
        named = "topk"
    if named == _SIGNED:
        named = activation = "topk"
    found = next((kind for kind in ARCHITECTURES.values() if kind.saelens_name == named), None)
    if found is None:
        valid = [kind.saelens_name for kind in ARCHITECTURES.values() if kind.saved_as is None] + [_SIGNED]
        raise unknown_name("SAE architecture", named, valid, at=where)
    architecture = found.saved_as or found.architecture
    if activation not in (None, "relu", architecture):
        raise IncompatibleSae(
            f"this {architecture} SAE has activation_fn={_shown(activation)}; supported: relu, topk.",
            at=where,
            fix="use an SAE with one of these.",
        )
    return found


def _k(raw: Mapping[str, Any], architecture: str, where: str) -> int:
    options = raw.get("activation_fn_kwargs")
    k = raw.get("k", options.get("k") if isinstance(options, dict) else None)
    if is_count(k) and k <= raw["d_sae"]:
        return k
    raise BadFile(
        f"a {architecture} SAE needs a whole number k with 0 < k <= d_sae={raw['d_sae']}. Got {_shown(k)}.", at=where
    )


def _flag(raw: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise BadFile(f"{key} in cfg.json is {_shown(value)}; expected true or false.", at=where)
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _metadata(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(raw.get("metadata") or {}, dict):
        raise BadFile("metadata in cfg.json is no mapping.", at=where)
    metadata = {key: raw[key] for key in _TOP_LEVEL_METADATA if raw.get(key) is not None} | (raw.get("metadata") or {})
    if not isinstance(metadata.get("prepend_bos"), bool | None):
        said = _shown(metadata["prepend_bos"])
        raise BadFile(f"prepend_bos in cfg.json is {said}; expected true or false.", at=where)
    if "hook_point" in metadata:
        metadata.setdefault("hook_name", metadata.pop("hook_point"))
    return metadata


def _our_names(tensors: Mapping[str, Tensor], raw: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Undo what only some files have: thresholds as logarithms, and a factor on what each feature adds."""
    found = dict(tensors)
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").float().exp()
    factor = found.pop("scaling_factor", torch.ones(1)).float()
    if torch.all(factor == 1):
        return found
    if not raw.get("finetuning_scaling_factor"):
        raise IncompatibleSae(
            "this SAE has a scaling_factor, but finetuning_scaling_factor is not set, so it may be of no use.",
            at=where,
            fix="set finetuning_scaling_factor to true in cfg.json if the SAE was fine-tuned with it.",
        )
    # Activations stay as they are; what they add is multiplied, as in SAELens before 6.0.
    return found | {"W_dec": found["W_dec"].float() * factor[:, None]}


def _both_signs(name: str, tensor: Tensor) -> Tensor:
    """The k largest of pre-activations and their negatives are the k largest by size, so TopK is AbsTopK then."""
    if name == "b_dec":
        return tensor
    return torch.cat([tensor, -tensor], dim=1 if name == "W_enc" else 0)


@torch.no_grad()
def _unscaled(sae: SparseAutoencoder, folder: Path, where: str) -> SparseAutoencoder:
    """Fold in the scaling of inputs that a checkpoint of an unfinished run has in a separate file."""
    if (folder / "activation_whitening.safetensors").is_file():
        raise IncompatibleSae(
            "this checkpoint was trained on whitened inputs, which is not supported.",
            at=where,
            fix="use what the finished run saved.",
        )
    if not (folder / "activation_scaler.json").is_file():
        return sae
    kept = read_json(folder / "activation_scaler.json")
    if not isinstance(kept, dict) or "scaling_factor" not in kept:
        raise BadFile("activation_scaler.json names no scaling_factor.", at=where, fix="copy or download it again.")
    scale = kept["scaling_factor"]
    if scale is None:  # no scaling, or folded already
        return sae
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e30:
        raise BadFile(f"activation_scaler.json gives scaling_factor={scale!r}; expected a positive number.", at=where)
    # As SAELens folds it: activations keep the scaled size.
    sae.W_enc.mul_(scale)
    sae.W_dec.mul_(scale**-1)
    sae.b_dec.mul_(scale**-1)
    return sae
