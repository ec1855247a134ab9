"""Convert pickled SAEs, such as dictionary_learning's `ae.pt`, to SAELens' layout, without running pickled code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
        source: A pickled state dict, a folder with `ae.pt`, a folder in any readable layout, or a name.
        folder: The target; ConfigError if it holds an SAE.
        facts: See `sae_of_state_dict`; they override those beside the file (config.json, <name>_cfg.json).
        source_name: The source's name in the metadata.

    NotFound: no such file or folder. BadFile: the file would run code, is damaged, or holds no SAE. IncompatibleSae:
    tensors of no known layout.
    """
    from saeffect.sae.hub import locate_sae

    path, folder = locate_sae(source, at=at), Path(folder)
    where = at or str(source)
    if (folder / "cfg.json").exists():
        raise ConfigError("there is an SAE in this folder already.", at=str(folder), fix="choose another folder.")
    if path.is_dir() and (path / "ae.pt").is_file():
        path = path / "ae.pt"
    if path.is_dir():
        sae = load_sae(path, at=where)
        dtype = "float32"
    elif not path.exists():
        raise NotFound(f"there is no file or folder {str(source)!r}.", at=where, fix="check the path.")
    elif not path.name.lower().endswith(PICKLED):
        raise BadFile(
            f"{path.name!r} is no pickled state dict ({', '.join(PICKLED)}).", at=where, fix="give the SAE's folder."
        )
    else:
        sae, dtype = _from_pickle(path, facts or {}, where)
    if source_name:
        sae.cfg = dataclasses.replace(sae.cfg, metadata={**sae.cfg.metadata, "source": source_name})
    return save_sae(sae, folder, dtype=dtype)


def _from_pickle(file: Path, facts: Mapping[str, Any], where: str) -> tuple[SparseAutoencoder, str]:
    tensors, values = read_pickled(file, where)
    file_facts = _read_settings_facts(file)
    metadata = {**file_facts.pop("metadata", {}), **facts.get("metadata", {})}
    all_facts = {**values, **file_facts, **{key: value for key, value in facts.items() if value is not None}}
    sae = sae_of_state_dict(tensors, all_facts | {"metadata": metadata}, file=file.name, where=where)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    half = len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}
    return sae, str(dtypes.pop()).removeprefix("torch.") if half else "float32"


def _read_settings_facts(file: Path) -> dict[str, Any]:
    """Facts from dictionary_learning's config.json beside `ae.pt`, or from `<name>_cfg.json` beside `<name>.pt`."""
    settings = file.with_name(f"{file.stem}_cfg.json")
    if settings.is_file():
        raw = read_json(settings)
        raw = raw if isinstance(raw, dict) else {}
        fields = {"hook_name": raw.get("act_name"), "model_name": raw.get("model_name")}
        return {"metadata": {key: value for key, value in fields.items() if value}}
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
