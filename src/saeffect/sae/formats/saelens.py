"""SAEs on disk as SAELens writes them: `cfg.json` and `sae_weights.safetensors`.

A `sparsity.safetensors` may lie beside them. Older releases put the hook at the top level of cfg.json, named
the architecture only when it was not the standard one, and called TopK an activation function; all are read.
So are checkpoints of SAELens' trainer (`saelens_checkpoint`) and sparsify's folders (`sparsify_format`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, IncompatibleSae, NotFound, ShapeMismatch, unknown_name
from saeffect.io import atomic_path, read_json, write_json
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats.saelens_checkpoint import TRAINING_FORMS, for_inference
from saeffect.sae.formats.sparsify import SPARSIFY_WEIGHTS, is_count, is_sparsify, sparsify_config, sparsify_tensors
from saeffect.sae.formats.weights_file import read_weights
from saeffect.sae.gated import GatedSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae
from saeffect.sae.trainable import TrainableSae

__all__ = [
    "ARCHITECTURES",
    "SPARSITY",
    "WEIGHTS",
    "load_sae",
    "read_sae_config",
    "read_sparsity",
    "save_sae",
    "saved_dtype",
    "weights_file",
]

# What can lie on disk. BatchTopK and Matryoshka SAEs are saved in their inference form, JumpReLU.

ARCHITECTURES: Mapping[str, Callable[[SaeConfig], SparseAutoencoder]] = {
    "standard": StandardSae,
    "topk": TopKSae,
    "jumprelu": JumpReluSae,
    "gated": GatedSae,
}
WEIGHTS = "sae_weights.safetensors"
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
_MATRICES = ("W_enc", "W_dec", "b_dec")
# What people give for an SAE, by the end of its name.
_PICKLED = "a pickled file, which can run anybody's code and is never loaded"
_FILES: Mapping[str, str] = {
    ".safetensors": "a file of tensors alone, without the cfg.json that says what they are",
    ".npz": "an archive of NumPy arrays, which is not read",
    ".json": "a file of settings alone",
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), _PICKLED),
}
# Folded into the weights before saving, so nothing is left to do at inference. Older files say true or false.
_FOLDED = ("none", "expected_average_only_in", None, False, True)


def read_sae_config(folder: Path | str, *, at: str | None = None) -> SaeConfig:
    """Read `cfg.json`.

    Raises:
        NotFound: No such folder, or no cfg.json in it.
        BadFile: Not JSON, or without sizes that make sense.
        UnknownName: An architecture that this package does not have.
        IncompatibleSae: A normalisation or reshaping that this package does not do.
    """
    folder = Path(folder)
    where = at or str(folder)
    raw = _read_cfg(folder, where)
    return sparsify_config(folder, raw, where) if is_sparsify(folder, raw) else _saelens_config(raw, where)


def load_sae(folder: Path | str, *, at: str | None = None) -> SparseAutoencoder:
    """Load an SAE from a folder in SAELens' or sparsify's layout, in float32, on the CPU.

    Raises:
        NotFound: A missing file.
        BadFile: Truncated or malformed weights, missing tensors, NaN.
        UnknownName: An architecture that this package does not have.
        IncompatibleSae: Tensors whose shapes contradict cfg.json, or something that this package does not do.
    """
    folder = Path(folder)
    where = at or str(folder)
    raw = _read_cfg(folder, where)
    cfg, path = read_sae_config(folder, at=at), weights_file(folder)
    if not path.is_file():
        fix = "give the folder that holds both."
        if cfg.metadata.get("decoder_only"):
            fix = "this is a compact SAE, its decoder alone: list it under more_saes, beside a whole one."
        raise NotFound(f"there is no {path.name} beside cfg.json{_what_lies_in(folder)}.", at=where, fix=fix)
    if path.name == SPARSIFY_WEIGHTS:
        tensors = sparsify_tensors(path, cfg, where)
    else:
        tensors = for_inference(folder, raw, read_weights(path, where, shapes=_shapes(cfg), required=_MATRICES), where)
    sae = ARCHITECTURES[cfg.architecture](cfg)
    _fill(sae, tensors, path.name, where)
    return sae.eval().requires_grad_(False)


def save_sae(
    sae: SparseAutoencoder, folder: Path | str, *, dtype: str = "float32", sparsity: Tensor | None = None
) -> Path:
    """Write an SAE in SAELens' layout, in the form that it has at inference.

    Args:
        sae: With any scaling of the inputs already folded into its weights.
        folder: Made if need be.
        dtype: Of the saved weights: "float32", "float16" or "bfloat16". Thresholds stay float32, so that they are
            exactly those of the SAE (SAELens rounds them when it loads, unless it is told `dtype="float32"`).
        sparsity: log10 of each feature's firing rate, float `[d_sae]`; SAELens adds 1e-10 to the rate.

    Raises:
        ConfigError: Another dtype, or one whose range the weights exceed.
        ShapeMismatch: `sparsity` is not one number a feature.
    """
    from safetensors.torch import save_file

    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r} is not float32, float16 or bfloat16.")
    if sparsity is not None and sparsity.shape != (sae.cfg.d_sae,):
        raise ShapeMismatch(f"sparsity has shape {tuple(sparsity.shape)}; expected ({sae.cfg.d_sae},).")
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
        save_file(tensors, temporary)
    write_json(folder / "cfg.json", _cfg_json(sae.cfg, dtype))
    if sparsity is not None:
        with atomic_path(folder / SPARSITY) as temporary:
            save_file({"sparsity": sparsity.detach().float().cpu().contiguous()}, temporary)
    return folder


def read_sparsity(folder: Path | str, *, at: str | None = None) -> Tensor | None:
    """log10 of each feature's firing rate as saved beside the weights, float32 `[d_sae]`; None without the file.

    Raises:
        BadFile: It cannot be read, or holds something else.
    """
    path = Path(folder) / SPARSITY
    where = at or str(folder)
    if not path.is_file():
        return None
    tensors = read_weights(path, where, shapes={})
    if "sparsity" not in tensors or tensors["sparsity"].ndim != 1:
        raise BadFile(f"{SPARSITY} holds no one-dimensional tensor named sparsity.", at=where)
    return tensors["sparsity"].float()


def weights_file(folder: Path | str) -> Path:
    """Where a folder keeps, or should keep, its weights: SAELens' file, or sparsify's.

    Raises:
        NotFound: No such folder, or no cfg.json in it.
        BadFile: cfg.json is not JSON.
    """
    folder = Path(folder)
    return folder / (SPARSIFY_WEIGHTS if is_sparsify(folder, _read_cfg(folder, str(folder))) else WEIGHTS)


def saved_dtype(folder: Path | str) -> str:
    """The dtype that cfg.json names; else that of the weights."""
    raw = _read_cfg(Path(folder), str(folder))
    named = raw.get("dtype") if isinstance(raw, dict) else None
    if named is None:
        named = read_weights(weights_file(folder), str(folder), shapes={}, required=("W_dec",))["W_dec"].dtype
    return str(named).removeprefix("torch.")


def _read_cfg(folder: Path, where: str) -> Any:
    fix = "give a folder with cfg.json and sae_weights.safetensors."
    if folder.is_file():
        kind = next((words for ending, words in _FILES.items() if folder.name.lower().endswith(ending)), "a file")
        beside = (folder.parent / "cfg.json").is_file()
        raise BadFile(
            f"{folder.name!r} is {kind}; an SAE is a folder.",
            at=where,
            fix=f"give the folder itself: {str(folder.parent)!r}." if beside else fix,
        )
    if not (folder / "cfg.json").is_file():
        raise NotFound(
            f"the folder {folder.name!r} holds no cfg.json{_what_lies_in(folder)}."
            if folder.is_dir()
            else f"there is no folder {str(folder)!r}.",
            at=where,
            fix=fix,
        )
    return read_json(folder / "cfg.json")


def _what_lies_in(folder: Path) -> str:
    """Words about what a folder that is no SAE's holds instead, if that is known."""
    there = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)) if folder.is_dir() else ()
    for path in there:
        if path.is_dir() and (path / "cfg.json").is_file():
            return f", but folders with one, such as {path.name!r}"
        kind = next((words for ending, words in _FILES.items() if path.name.lower().endswith(ending)), None)
        if kind and path.name not in ("cfg.json", SPARSITY):
            return f"; {path.name!r} there is {kind}"
    return ""


def _saelens_config(raw: Any, where: str) -> SaeConfig:
    sizes = {key: raw.get(key) for key in ("d_in", "d_sae")} if isinstance(raw, dict) else {}
    if not (sizes and all(is_count(size) for size in sizes.values())):
        said = "".join(f" Got {key}={_shown(size)}." for key, size in sizes.items() if not is_count(size))
        raise BadFile(
            f"cfg.json gives no positive whole numbers d_in and d_sae.{said}",
            at=where,
            fix="check that it is an SAE's.",
        )
    reshaping = raw.get("reshape_activations", "none")
    if reshaping != "none":
        raise IncompatibleSae(
            f"this SAE reads attention heads (reshape_activations={str(reshaping)!r}), which is not supported.",
            at=where,
            fix="use an SAE of the residual stream.",
        )
    normalisation = raw.get("normalize_activations", "none")
    if normalisation not in (*_FOLDED, "layer_norm"):
        raise IncompatibleSae(
            f"this SAE needs normalize_activations={normalisation!r}; supported: none and layer_norm.",
            at=where,
            fix="fold the normalisation into the weights before saving.",
        )
    architecture, k = _architecture(raw, where)
    rescaled = _flag(raw, "rescale_acts_by_decoder_norm", False, where) and architecture == "topk"
    metadata = _metadata(raw, where)
    loaded_with = metadata.get("model_from_pretrained_kwargs")
    return SaeConfig(
        architecture=architecture,
        d_in=raw["d_in"],
        d_sae=raw["d_sae"],
        k=k,
        apply_b_dec_to_input=_flag(raw, "apply_b_dec_to_input", True, where),
        normalize_activations="layer_norm" if normalisation == "layer_norm" else "none",
        rescale_acts_by_decoder_norm=rescaled,
        centre_input=isinstance(loaded_with, dict) and bool(loaded_with.get("center_writing_weights")),
        metadata=metadata,
    )


def _architecture(raw: Mapping[str, Any], where: str) -> tuple[str, int | None]:
    """(a key of `ARCHITECTURES`, k if it has one)"""
    architecture = raw.get("architecture", "standard")
    activation = raw.get("activation_fn", raw.get("activation_fn_str"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    architecture = TRAINING_FORMS.get(str(architecture), architecture)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise unknown_name("SAE architecture", architecture, ARCHITECTURES, at=where)
    if activation not in (None, "relu", architecture):
        raise IncompatibleSae(
            f"this {architecture} SAE has activation_fn={_shown(activation)}; supported: relu, topk.",
            at=where,
            fix="use an SAE with one of these.",
        )
    if architecture != "topk":
        return architecture, None
    options = raw.get("activation_fn_kwargs")
    k = raw.get("k", options.get("k") if isinstance(options, dict) else None)
    if not (is_count(k) and k <= raw["d_sae"]):
        raise BadFile(
            f"a topk SAE needs a whole number k with 0 < k <= d_sae={raw['d_sae']}. Got {_shown(k)}.", at=where
        )
    return architecture, k


def _flag(raw: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise BadFile(f"{key} in cfg.json is {_shown(value)}; expected true or false.", at=where)
    return value


def _shown(value: object) -> str:
    """A value of somebody's file, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _metadata(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(raw.get("metadata") or {}, dict):
        raise BadFile("metadata in cfg.json is no mapping.", at=where)
    metadata = {key: raw[key] for key in _TOP_LEVEL_METADATA if raw.get(key) is not None} | (raw.get("metadata") or {})
    if "hook_point" in metadata:
        metadata.setdefault("hook_name", metadata.pop("hook_point"))
    return metadata


def _cfg_json(cfg: SaeConfig, dtype: str) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "sae_lens_version": _LAYOUT_VERSION,
        "architecture": cfg.architecture,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": "none",
        "metadata": dict(cfg.metadata),
    }
    if cfg.k is not None:
        raw |= {"k": cfg.k, "rescale_acts_by_decoder_norm": cfg.rescale_acts_by_decoder_norm}
    return raw


def _shapes(cfg: SaeConfig) -> dict[str, tuple[int, ...]]:
    """What a file of this SAE may hold; a running threshold of training forms is one number."""
    vectors = ("b_enc", "b_mag", "b_gate", "r_mag", "threshold", "log_threshold", "scaling_factor")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(vectors, (cfg.d_sae,))
    matrices = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, cfg.d_in)}
    return shapes | matrices | {"b_dec": (cfg.d_in,), "topk_threshold": ()}


def _fill(sae: SparseAutoencoder, tensors: Mapping[str, Tensor], file: str, where: str) -> None:
    for name, parameter in sae.named_parameters():
        if name not in tensors:
            raise BadFile(f"{file} has no {name}; it has: {', '.join(sorted(tensors))}.", at=where)
        tensor = tensors[name]
        if not torch.isfinite(tensor).all():
            raise BadFile(
                f"{name} holds NaN or infinite values.",
                at=where,
                fix="the training run diverged; use another.",
            )
        with torch.no_grad():
            parameter.copy_(tensor.float())
