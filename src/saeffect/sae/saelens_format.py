"""SAEs on disk as SAELens writes them: `cfg.json` and `sae_weights.safetensors`.

A `sparsity.safetensors` may lie beside them. Older releases put the hook at the top level of cfg.json, named
the architecture only when it was not the standard one, and called TopK an activation function; all are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, IncompatibleSae, NotFound, unknown_name
from saeffect.provenance import atomic_path, read_json, write_json
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae

__all__ = ["ARCHITECTURES", "WEIGHTS", "load_sae", "read_sae_config", "save_sae", "saved_dtype"]

ARCHITECTURES: Mapping[str, Callable[[SaeConfig], SparseAutoencoder]] = {
    "standard": StandardSae,
    "topk": TopKSae,
    "jumprelu": JumpReluSae,
}
WEIGHTS = "sae_weights.safetensors"
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


def read_sae_config(folder: Path | str, *, at: str | None = None) -> SaeConfig:
    """Read `cfg.json`.

    Raises:
        NotFound: No such folder, or no cfg.json in it.
        BadFile: Not JSON, or without d_in and d_sae.
        UnknownName: An architecture that this package does not have.
        IncompatibleSae: A normalisation or reshaping that this package does not do.
    """
    folder = Path(folder)
    where = at or str(folder)
    if not (folder / "cfg.json").is_file():
        raise NotFound(
            f"the folder {folder.name!r} holds no cfg.json."
            if folder.is_dir()
            else f"there is no folder {str(folder)!r}.",
            at=where,
            fix="point to a folder with cfg.json and sae_weights.safetensors.",
        )
    raw = read_json(folder / "cfg.json")
    sizes = [raw.get(key) for key in ("d_in", "d_sae")] if isinstance(raw, dict) else [None]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise BadFile(
            "cfg.json gives no positive whole numbers d_in and d_sae.",
            at=where,
            fix="check that it is an SAE's.",
        )
    architecture = raw.get("architecture", "standard")
    if architecture == "standard" and raw.get("activation_fn", raw.get("activation_fn_str")) == "topk":
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        raise unknown_name("SAE architecture", architecture, ARCHITECTURES, at=where)
    normalisation = raw.get("normalize_activations", "none")
    if normalisation not in (*_FOLDED, "layer_norm") or raw.get("reshape_activations", "none") != "none":
        raise IncompatibleSae(
            f"this SAE needs normalize_activations={normalisation!r},"
            f" reshape_activations={raw.get('reshape_activations', 'none')!r};"
            " supported: none and layer_norm, no reshaping.",
            at=where,
            fix="fold the normalisation into the weights before saving.",
        )
    k = raw.get("k", (raw.get("activation_fn_kwargs") or {}).get("k"))
    if architecture == "topk" and not (isinstance(k, int) and 0 < k <= raw["d_sae"]):
        raise BadFile(f"a topk SAE needs 0 < k <= d_sae={raw['d_sae']}. Got {k!r}.", at=where)
    if not isinstance(raw.get("metadata") or {}, dict):
        raise BadFile("metadata in cfg.json is no mapping.", at=where)
    metadata = {key: raw[key] for key in _TOP_LEVEL_METADATA if raw.get(key) is not None} | (raw.get("metadata") or {})
    if "hook_point" in metadata:
        metadata.setdefault("hook_name", metadata.pop("hook_point"))
    loaded_with = metadata.get("model_from_pretrained_kwargs")
    return SaeConfig(
        architecture=architecture,
        d_in=raw["d_in"],
        d_sae=raw["d_sae"],
        k=k if architecture == "topk" else None,
        apply_b_dec_to_input=bool(raw.get("apply_b_dec_to_input", True)),
        normalize_activations="layer_norm" if normalisation == "layer_norm" else "none",
        rescale_acts_by_decoder_norm=bool(raw.get("rescale_acts_by_decoder_norm", False)),
        centre_input=isinstance(loaded_with, dict) and bool(loaded_with.get("center_writing_weights")),
        metadata=metadata,
    )


def load_sae(folder: Path | str, *, at: str | None = None) -> SparseAutoencoder:
    """Load an SAE from a folder in SAELens' layout, in float32, on the CPU.

    Raises:
        NotFound: A missing file.
        BadFile: Truncated or malformed weights, missing tensors, NaN.
        IncompatibleSae: Tensors whose shapes contradict cfg.json.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    where = at or str(folder)
    cfg = read_sae_config(folder, at=at)
    if not (folder / WEIGHTS).is_file():
        raise NotFound(f"there is no {WEIGHTS} beside cfg.json.", at=where, fix="pickled SAEs (.pt) are never loaded.")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise BadFile(f"{WEIGHTS} cannot be read: {error}.", at=where, fix="copy or download it again.") from error
    sae = ARCHITECTURES[cfg.architecture](cfg)
    _fill(sae, tensors, where)
    return sae.eval().requires_grad_(False)


def save_sae(
    sae: SparseAutoencoder, folder: Path | str, *, dtype: str = "float32", sparsity: Tensor | None = None
) -> Path:
    """Write an SAE in SAELens' layout.

    Args:
        sae: With any scaling of the inputs already folded into its weights.
        folder: Made if need be.
        dtype: Of the saved weights: "float32", "float16" or "bfloat16".
        sparsity: log10 of each feature's firing rate, float `[d_sae]`.

    Raises:
        ConfigError: Another dtype.
    """
    from safetensors.torch import save_file

    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r} is not float32, float16 or bfloat16.")
    folder = Path(folder)
    target = getattr(torch, dtype)
    tensors = {name: p.detach().to(target).contiguous() for name, p in sae.named_parameters()}
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    cfg = sae.cfg
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
    write_json(folder / "cfg.json", raw)
    if sparsity is not None:
        with atomic_path(folder / "sparsity.safetensors") as temporary:
            save_file({"sparsity": sparsity.float().contiguous()}, temporary)
    return folder


def saved_dtype(folder: Path | str) -> str:
    """The dtype that cfg.json names; "float32" if it names none."""
    return str(read_json(Path(folder) / "cfg.json").get("dtype", "float32")).removeprefix("torch.")


def _fill(sae: SparseAutoencoder, tensors: Mapping[str, Tensor], where: str) -> None:
    for name, parameter in sae.named_parameters():
        if name not in tensors:
            raise BadFile(f"{WEIGHTS} has no {name}; it has: {', '.join(sorted(tensors))}.", at=where)
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise IncompatibleSae(
                f"{name} has shape {tuple(tensor.shape)}, but cfg.json asks for {tuple(parameter.shape)}.",
                at=where,
                fix="cfg.json and the weights belong to different SAEs; find the pair.",
            )
        if not torch.isfinite(tensor).all():
            raise BadFile(
                f"{name} holds NaN or infinite values.",
                at=where,
                fix="the training run diverged; use another.",
            )
        with torch.no_grad():
            parameter.copy_(tensor.float())
