"""SAEs on disk as SAELens writes them: `cfg.json`, `sae_weights.safetensors` and, optionally, `sparsity.safetensors`.
Older releases and the checkpoints of SAELens' trainer (`save_model`) are read too, with thresholds and scaling folded
in.
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

__all__ = ["SPARSITY", "WEIGHTS", "WHITENING", "config", "load", "matches", "read_sparsity", "save_sae", "weights"]

WEIGHTS = weights = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
WHITENING = "activation_whitening.safetensors"  # beside a checkpoint that was trained on whitened inputs
# SAELens treats a file without a version as from before 6.0 and drops its metadata, also the hook's name.
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
# Normalisations that are folded into the weights before saving. Older files have true or false.
_FOLDED = ("none", "expected_average_only_in", None, False, True)
_MAX_NUMBERS = 2**60  # numbers of a matrix
_EACH_INPUT = ("layer_norm", "constant_norm_rescale")
# Features of both signs, read as two features each; the second half has the negative directions.
_SIGNED = "abstopk"
# Tensors of one number a feature that only some files have; see `_our_names`.
_OPTIONAL_VECTORS = ("log_threshold", "scaling_factor")


def matches(folder: Path, raw: Any) -> bool:
    """Always, as the last format: errors about an unknown folder then name SAELens' files."""
    del folder, raw
    return True


def config(folder: Path, raw: Any, where: str) -> SaeConfig:
    del folder
    sizes = {key: raw.get(key) for key in ("d_in", "d_sae")} if isinstance(raw, dict) else {}
    if not (sizes and all(is_count(size) for size in sizes.values())):
        got = "".join(f" Got {key}={_short_repr(size)}." for key, size in sizes.items() if not is_count(size))
        raise BadFile(
            f"cfg.json gives no positive whole numbers d_in and d_sae.{got}",
            at=where,
            fix="check that it is an SAE's.",
        )
    if raw["d_in"] * raw["d_sae"] >= _MAX_NUMBERS:
        raise BadFile("cfg.json gives sizes that no file of weights can have.", at=where, fix="restore cfg.json.")
    reshaping = raw.get("reshape_activations", "none")
    # Heads are concatenated in the activations captured here, as in the weights: there is nothing to reshape.
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
    kind = _find_architecture(raw, where)
    if kind.sides and raw["d_in"] % len(kind.sides):
        raise BadFile(f"a crosscoder has the width of two models; d_in={raw['d_in']} is odd.", at=where)
    architecture = kind.saved_as or kind.architecture
    has_k = "k" in ARCHITECTURES[architecture].keys
    signed = raw.get("architecture") == _SIGNED
    metadata = _read_metadata(raw, where) | ({"signed_features": raw["d_sae"]} if signed else {})
    metadata |= {key: raw[key] for key in kind.settings if key in raw}
    load_options = metadata.get("model_from_pretrained_kwargs")
    return SaeConfig(
        architecture=architecture,
        d_in=raw["d_in"],
        d_sae=raw["d_sae"] * (2 if signed else 1),
        k=_read_k(raw, architecture, where) if has_k else None,
        apply_b_dec_to_input=_read_flag(raw, "apply_b_dec_to_input", True, where),
        normalize_activations=normalisation if normalisation in _EACH_INPUT else "none",
        rescale_acts_by_decoder_norm=_read_flag(raw, "rescale_acts_by_decoder_norm", False, where) and has_k,
        centre_input=isinstance(load_options, dict) and bool(load_options.get("center_writing_weights")),
        metadata=metadata,
    )


def load(folder: Path, raw: Any, where: str) -> SparseAutoencoder:
    cfg, kind = config(folder, raw, where), _find_architecture(raw, where)
    n_stored = raw["d_sae"]
    shapes = dict.fromkeys(_OPTIONAL_VECTORS, (n_stored,)) | {
        name: tuple(part.shape)
        for whole, shape in kind.shapes(replace(cfg, d_sae=n_stored)).items()
        for name, part in by_side(kind, {whole: torch.empty(shape, device="meta")}).items()
    }
    matrices = [name for name in ("W_enc", "W_dec", "b_dec") if name in kind.shapes(cfg)]
    required = [part for name in matrices for part in sides_of(kind, name)]
    tensors = read_weights(folder / WEIGHTS, where, shapes=shapes, required=tuple(required))
    tensors = _normalise_tensors(joined(kind, tensors), raw, where)
    if n_stored != cfg.d_sae:
        tensors = {name: _with_negatives(name, tensor) for name, tensor in tensors.items()}
    if kind.saved_as is None:
        return _fold_scaling(fill(kind(cfg), tensors, WEIGHTS, where), folder, where)
    rescaled = bool(raw.get("rescale_acts_by_decoder_norm", True))
    training_sae = kind(replace(cfg, architecture=kind.architecture, rescale_acts_by_decoder_norm=rescaled))
    assert isinstance(training_sae, TrainableSae)
    sae = fill(training_sae, tensors, WEIGHTS, where).for_inference()
    sae.cfg = cfg
    return _fold_scaling(sae, folder, where)


def save_sae(
    sae: SparseAutoencoder, folder: Path | str, *, dtype: str = "float32", sparsity: Tensor | None = None
) -> Path:
    """Write an SAE in its inference form, in SAELens' layout; `folder` is made if missing.

    `dtype` of the weights: "float32", "float16" or "bfloat16"; thresholds stay float32, exactly (SAELens rounds them
    when it loads, unless given `dtype="float32"`). `sparsity`: log10 of each feature's firing rate, float `[d_sae]`;
    SAELens adds 1e-10 to the rate. ConfigError: another dtype, or weights outside its range.
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


def read_sparsity(folder: Path | str) -> Tensor | None:
    """log10 of each feature's saved firing rate, float32 `[d_sae]`; None without the file; BadFile if damaged."""
    path = Path(folder) / SPARSITY
    if not path.is_file():
        return None
    tensors = read_weights(path, str(folder), shapes={})
    if "sparsity" not in tensors or tensors["sparsity"].ndim != 1:
        raise BadFile(f"{SPARSITY} holds no one-dimensional tensor named sparsity.", at=str(folder))
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
    if cfg.centre_input:
        options = dict(cfg.metadata.get("model_from_pretrained_kwargs") or {})
        raw["metadata"]["model_from_pretrained_kwargs"] = options | {"center_writing_weights": True}
    raw |= {key: cfg.metadata[key] for key in sae.settings if key in cfg.metadata}
    if cfg.k is not None:
        raw |= {"k": cfg.k, "rescale_acts_by_decoder_norm": cfg.rescale_acts_by_decoder_norm}
    return raw


def _find_architecture(raw: Mapping[str, Any], where: str) -> type[SparseAutoencoder]:
    name = raw.get("architecture", "standard")
    activation = raw.get("activation_fn", raw.get("activation_fn_str"))
    if name == "standard" and activation == "topk":
        name = "topk"
    if name == _SIGNED:
        name = activation = "topk"
    kind = next((kind for kind in ARCHITECTURES.values() if kind.saelens_name == name), None)
    if kind is None:
        valid = [kind.saelens_name for kind in ARCHITECTURES.values() if kind.saved_as is None] + [_SIGNED]
        raise unknown_name("SAE architecture", name, valid, at=where)
    architecture = kind.saved_as or kind.architecture
    if activation not in (None, "relu", architecture):
        raise IncompatibleSae(
            f"this {architecture} SAE has activation_fn={_short_repr(activation)}; supported: relu, topk.",
            at=where,
            fix="use an SAE with one of these.",
        )
    return kind


def _read_k(raw: Mapping[str, Any], architecture: str, where: str) -> int:
    options = raw.get("activation_fn_kwargs")
    k = raw.get("k", options.get("k") if isinstance(options, dict) else None)
    if is_count(k) and k <= raw["d_sae"]:
        return k
    raise BadFile(
        f"a {architecture} SAE needs a whole number k with 0 < k <= d_sae={raw['d_sae']}. Got {_short_repr(k)}.",
        at=where,
    )


def _read_flag(raw: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise BadFile(f"{key} in cfg.json is {_short_repr(value)}; expected true or false.", at=where)
    return value


def _short_repr(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _read_metadata(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(raw.get("metadata") or {}, dict):
        raise BadFile("metadata in cfg.json is no mapping.", at=where)
    metadata = {key: raw[key] for key in _TOP_LEVEL_METADATA if raw.get(key) is not None} | (raw.get("metadata") or {})
    if not isinstance(metadata.get("prepend_bos"), bool | None):
        got = _short_repr(metadata["prepend_bos"])
        raise BadFile(f"prepend_bos in cfg.json is {got}; expected true or false.", at=where)
    if "hook_point" in metadata:
        metadata.setdefault("hook_name", metadata.pop("hook_point"))
    return metadata


def _normalise_tensors(tensors: Mapping[str, Tensor], raw: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Convert variants of some files: thresholds as logarithms, and a factor on each feature's output."""
    result = dict(tensors)
    if "log_threshold" in result:
        result["threshold"] = result.pop("log_threshold").float().exp()
    factor = result.pop("scaling_factor", torch.ones(1)).float()
    if torch.all(factor == 1):
        return result
    if not raw.get("finetuning_scaling_factor"):
        raise IncompatibleSae(
            "this SAE has a scaling_factor, but finetuning_scaling_factor is not set, so it may be of no use.",
            at=where,
            fix="set finetuning_scaling_factor to true in cfg.json if the SAE was fine-tuned with it.",
        )
    # Activations stay unchanged; their outputs are multiplied, as in SAELens before 6.0.
    return result | {"W_dec": result["W_dec"].float() * factor[:, None]}


def _with_negatives(name: str, tensor: Tensor) -> Tensor:
    """TopK over pre-activations and their negatives is AbsTopK: the k largest are the k largest by magnitude."""
    if name == "b_dec":
        return tensor
    return torch.cat([tensor, -tensor], dim=1 if name == "W_enc" else 0)


@torch.no_grad()
def _fold_scaling(sae: SparseAutoencoder, folder: Path, where: str) -> SparseAutoencoder:
    """Fold in the scaling of inputs, which a checkpoint of an unfinished run stores in a separate file."""
    if (folder / WHITENING).is_file():
        raise IncompatibleSae(
            "this checkpoint was trained on whitened inputs, which is not supported.",
            at=where,
            fix="use what the finished run saved.",
        )
    if not (folder / "activation_scaler.json").is_file():
        return sae
    scaler = read_json(folder / "activation_scaler.json")
    if not isinstance(scaler, dict) or "scaling_factor" not in scaler:
        raise BadFile("activation_scaler.json names no scaling_factor.", at=where, fix="copy or download it again.")
    scale = scaler["scaling_factor"]
    if scale is None:  # no scaling, or folded already
        return sae
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e30:
        raise BadFile(f"activation_scaler.json gives scaling_factor={scale!r}; expected a positive number.", at=where)
    # Folded as in SAELens: feature activations keep the scale of training.
    sae.W_enc.mul_(scale)
    sae.W_dec.mul_(scale**-1)
    sae.b_dec.mul_(scale**-1)
    return sae
