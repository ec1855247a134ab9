"""SAEs on disk as EleutherAI's sparsify writes them: `cfg.json` and `sae.safetensors`, and beside the folders of a run
its `config.json`. TopK only; not written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saeffect.errors import BadFile, IncompatibleSae
from saeffect.io import read_json
from saeffect.lm.hooks import hook_of_module
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats.weights import fill, is_count, read_weights
from saeffect.sae.topk import TopKSae

__all__ = ["config", "load", "matches", "weights"]

weights = "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_REFUSED = {
    "transcode": "it is a transcoder, which rebuilds another module's output",
    "skip_connection": "it has a skip connection",
    "signed": "its features may be negative",
}


def matches(folder: Path, raw: Any) -> bool:
    if not isinstance(raw, dict) or "d_sae" in raw:
        return False
    return (folder / weights).is_file() or "num_latents" in raw or "expansion_factor" in raw


def config(folder: Path, raw: Any, where: str) -> SaeConfig:
    """The SAE's configuration; the hook is the folder's name, such as layers.8. BadFile if d_in, num_latents (or
    expansion_factor) or k is no positive whole number. IncompatibleSae for transcoders, skip connections, or an
    activation function other than TopK.
    """
    for key, why in _REFUSED.items():
        if raw.get(key):
            raise IncompatibleSae(f"sparsify's cfg.json says {key}: {why}.", at=where, fix="use a plain TopK SAE.")
    activation = raw.get("activation", "topk")
    if activation != "topk":
        raise IncompatibleSae(
            f"sparsify's cfg.json says activation={activation!r}; supported: topk.",
            at=where,
            fix="use a plain TopK SAE.",
        )
    d_in, k, factor = raw.get("d_in"), raw.get("k", 32), raw.get("expansion_factor", 32)
    d_sae = raw.get("num_latents") or (d_in * factor if is_count(d_in) and is_count(factor) else None)
    if not (is_count(d_in) and is_count(d_sae) and is_count(k) and k <= d_sae):
        raise BadFile(
            f"sparsify's cfg.json gives d_in={d_in!r}, num_latents={raw.get('num_latents')!r},"
            f" expansion_factor={raw.get('expansion_factor')!r}, k={k!r};"
            " expected positive whole numbers, k at most num_latents.",
            at=where,
            fix="check that it is an SAE's.",
        )
    metadata: dict[str, Any] = {"trained_by": "sparsify", "hookpoint": folder.resolve().name}
    recorded = _read_run(folder) | {"hook_name": hook_of_module(metadata["hookpoint"])}
    metadata |= {key: value for key, value in recorded.items() if value}
    return SaeConfig("topk", d_in, d_sae, k=k, metadata=metadata)


def _read_run(folder: Path) -> dict[str, Any]:
    """Model and context size, from the `config.json` of the run that wrote the folder, if it is there."""
    path = folder.resolve().parent / "config.json"
    raw = read_json(path) if path.is_file() else None
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), str):
        return {}
    context = raw.get("ctx_len")
    return {"model_name": raw["model"], "context_size": context if is_count(context) else None}


def load(folder: Path, raw: Any, where: str) -> SparseAutoencoder:
    """The SAE; BadFile if damaged or not finite, IncompatibleSae for a skip connection or shapes unlike cfg.json."""
    cfg = config(folder, raw, where)
    expected = TopKSae.shapes(cfg)
    shapes = {stored: expected[name] for stored, name in _NAMES.items()} | {"encoder.weight": expected["W_dec"]}
    tensors = read_weights(folder / weights, where, shapes=shapes, required=tuple(_NAMES))
    if "W_skip" in tensors:
        raise IncompatibleSae(f"{weights} holds W_skip: {_REFUSED['skip_connection']}.", at=where)
    parameters = {name: tensors[stored] for stored, name in _NAMES.items()}
    return fill(TopKSae(cfg), parameters | {"W_enc": parameters["W_enc"].T}, weights, where)
