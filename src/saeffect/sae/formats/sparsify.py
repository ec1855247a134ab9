"""SAEs on disk as EleutherAI's sparsify writes them: `cfg.json` and `sae.safetensors`. They are read, not written.

Its SAEs are TopK SAEs. Transcoders (they rebuild another module's output), skip connections and other
activation functions are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae
from saeffect.lm.hooks import hook_of_module
from saeffect.sae.base import SaeConfig
from saeffect.sae.formats.weights_file import read_weights

__all__ = ["SPARSIFY_WEIGHTS", "is_count", "is_sparsify", "sparsify_config", "sparsify_tensors"]

SPARSIFY_WEIGHTS = "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_REFUSED = {
    "transcode": "it is a transcoder, which rebuilds another module's output",
    "skip_connection": "it has a skip connection",
    "signed": "its features may be negative",
}


def is_sparsify(folder: Path, raw: Any) -> bool:
    """Whether a folder, with what its cfg.json says, is in sparsify's layout."""
    if not isinstance(raw, dict) or "d_sae" in raw:
        return False
    return (folder / SPARSIFY_WEIGHTS).is_file() or "num_latents" in raw or "expansion_factor" in raw


def sparsify_config(folder: Path, raw: Mapping[str, Any], where: str) -> SaeConfig:
    """From sparsify's `cfg.json`. The folder's name, such as layers.8, says the hook.

    Raises:
        BadFile: No whole numbers that make sense for d_in, num_latents (or expansion_factor) and k.
        IncompatibleSae: A transcoder, a skip connection, or another activation function than TopK.
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
    d_in, k = raw.get("d_in"), raw.get("k", 32)
    d_sae = raw.get("num_latents") or _product(d_in, raw.get("expansion_factor", 32))
    if not (is_count(d_in) and is_count(d_sae) and is_count(k) and k <= d_sae):
        raise BadFile(
            f"sparsify's cfg.json gives d_in={d_in!r}, num_latents={raw.get('num_latents')!r},"
            f" expansion_factor={raw.get('expansion_factor')!r}, k={k!r};"
            " expected positive whole numbers, k at most num_latents.",
            at=where,
            fix="check that it is an SAE's.",
        )
    metadata: dict[str, Any] = {"trained_by": "sparsify", "hookpoint": folder.resolve().name}
    hook_name = hook_of_module(metadata["hookpoint"])
    return SaeConfig("topk", d_in, d_sae, k=k, metadata=metadata | ({"hook_name": hook_name} if hook_name else {}))


def sparsify_tensors(path: Path, cfg: SaeConfig, where: str) -> dict[str, Tensor]:
    """The tensors of `sae.safetensors` under our names, the encoder `[d_in, d_sae]`.

    Raises:
        BadFile: The file cannot be read, or one is missing.
        IncompatibleSae: There is a skip connection, or a shape contradicts cfg.json.
    """
    shapes = {"encoder.weight": (cfg.d_sae, cfg.d_in), "encoder.bias": (cfg.d_sae,)}
    shapes |= {"W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}
    tensors = read_weights(path, where, shapes=shapes, required=tuple(_NAMES))
    if "W_skip" in tensors:
        raise IncompatibleSae(f"{SPARSIFY_WEIGHTS} holds W_skip: {_REFUSED['skip_connection']}.", at=where)
    found = {ours: tensors[theirs] for theirs, ours in _NAMES.items()}
    return found | {"W_enc": found["W_enc"].T}


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number above 0; true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _product(d_in: Any, factor: Any) -> Any:
    return d_in * factor if is_count(d_in) and is_count(factor) else None
