"""Convert pickled SAEs, such as dictionary_learning's `ae.pt`, to SAELens' layout, without running what is pickled."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, NotFound
from saeffect.io import read_json
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import load_sae, save_sae
from saeffect.sae.formats.state_dicts import PICKLED, read_pickled, sae_of_state_dict

__all__ = ["convert_sae"]

_SITES = {"resid_post": "hook_resid_post", "attention_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}


def convert_sae(
    source: Path | str,
    folder: Path | str,
    *,
    facts: Mapping[str, Any] | None = None,
    source_name: str | None = None,
    at: str | None = None,
) -> Path:
    """Write an SAE in SAELens' layout.

    Args:
        source: A pickled state dict, a folder with `ae.pt`, a folder in any layout that is read, or a name.
        folder: Where to; ConfigError if it holds an SAE.
        facts: See `sae_of_state_dict`; those beside the file (config.json, <name>_cfg.json) count after these.
        source_name: What to call the source in the metadata.

    NotFound: no such file or folder. BadFile: the file would run code, is damaged, or holds no SAE. IncompatibleSae:
    tensors of no known layout.
    """
    from saeffect.sae.hub import locate_sae

    place, folder = locate_sae(source, at=at), Path(folder)
    where = at or str(source)
    if (folder / "cfg.json").exists():
        raise ConfigError("there is an SAE in this folder already.", at=str(folder), fix="choose another folder.")
    if place.is_dir() and (place / "ae.pt").is_file():
        place = place / "ae.pt"
    if place.is_dir():
        sae = load_sae(place, at=where)
        dtype = "float32"
    elif not place.exists():
        raise NotFound(f"there is no file or folder {str(source)!r}.", at=where, fix="check the path.")
    elif not place.name.lower().endswith(PICKLED):
        raise BadFile(
            f"{place.name!r} is no pickled state dict ({', '.join(PICKLED)}).", at=where, fix="give the SAE's folder."
        )
    else:
        sae, dtype = _from_pickle(place, facts or {}, where)
    if source_name:
        sae.cfg = dataclasses.replace(sae.cfg, metadata={**sae.cfg.metadata, "source": source_name})
    return save_sae(sae, folder, dtype=dtype)


def _from_pickle(file: Path, facts: Mapping[str, Any], where: str) -> tuple[SparseAutoencoder, str]:
    tensors, values = read_pickled(file, where)
    beside = _facts_beside(file)
    metadata = {**beside.pop("metadata", {}), **facts.get("metadata", {})}
    known = {**values, **beside, **{key: value for key, value in facts.items() if value is not None}}
    sae = sae_of_state_dict(tensors, known | {"metadata": metadata}, file=file.name, where=where)
    return sae, _dtype_of(tensors)


def _facts_beside(file: Path) -> dict[str, Any]:
    """What dictionary_learning's config.json says of an `ae.pt`, or `<name>_cfg.json` of `<name>.pt`."""
    settings = file.with_name(f"{file.stem}_cfg.json")
    if settings.is_file():
        raw = read_json(settings)
        raw = raw if isinstance(raw, dict) else {}
        named = {"hook_name": raw.get("act_name"), "model_name": raw.get("model_name")}
        return {"metadata": {key: value for key, value in named.items() if value}}
    settings = file.with_name("config.json")
    raw = read_json(settings) if settings.is_file() else {}
    trainer = raw.get("trainer") if isinstance(raw, dict) else None
    if not isinstance(trainer, dict):
        return {}
    metadata: dict[str, Any] = {"trained_by": "dictionary_learning"}
    if isinstance(trainer.get("lm_name"), str):
        metadata["model_name"] = trainer["lm_name"]
    buffer = raw.get("buffer")
    if isinstance(buffer, dict) and isinstance(buffer.get("ctx_len"), int):
        metadata["context_size"] = buffer["ctx_len"]
    if isinstance(trainer.get("layer"), int):
        site = re.match("|".join(_SITES), str(trainer.get("submodule_name") or "resid_post"))
        if site:
            metadata["hook_name"] = f"blocks.{trainer['layer']}.{_SITES[site[0]]}"
    return {"dict_class": trainer.get("dict_class"), "k": trainer.get("k"), "metadata": metadata}


def _dtype_of(tensors: Mapping[str, Tensor]) -> str:
    """The one half-precision dtype of all floats, else float32."""
    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return "float16" if found == {torch.float16} else "bfloat16" if found == {torch.bfloat16} else "float32"
