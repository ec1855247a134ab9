"""Steering vectors as files for other programs: safetensors, and GGUF control vectors for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from saeffect.errors import ConfigError
from saeffect.io import atomic_path
from saeffect.lm.hooks import parse_hook

__all__ = ["SteeringVector", "control_layer", "joint_vector", "write_gguf_vector", "write_safetensors_vector"]

# Hooks at which adding a vector adds it to the output of the block.
_SAME_AS_POST = ("hook_resid_post", "hook_mlp_out")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """The vector that one intervention with the operator "add" adds at a hook.

    Attributes:
        vector: float32 `[d_model]`, in the activation's units: along the sum of `rows`, of length dose x `mean_norm`.
        rows: The features' decoder rows, float32 `[n_features, d_model]`.
        features: Their numbers in the SAE.
        hook: TransformerLens name.
        dose: In units of `mean_norm`; negative pushes away.
        mean_norm: Mean norm of the activation at the hook on the study's text.
        about: Where it comes from, such as model, sae, arm and top_tokens; kept in the file.
    """

    vector: Tensor
    rows: Tensor
    features: tuple[int, ...]
    hook: str
    dose: float
    mean_norm: float
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Length of what is added, in the activation's units."""
        return float(self.vector.norm())

    def metadata(self) -> dict[str, str]:
        """All but the tensors, as text."""
        return {
            "format": "pt",
            "kind": "steering_vector",
            "hook": self.hook,
            "norm": f"{self.norm:.8g}",
            "dose": f"{self.dose:.8g}",
            "dose_unit": "mean norm of the activation at the hook",
            "mean_norm": f"{self.mean_norm:.8g}",
            "features": json.dumps(list(self.features)),
            "use": "add `vector` to the activation at the hook, at every position but BOS",
            **self.about,
        }


def write_safetensors_vector(vector: SteeringVector, path: Path) -> None:
    """Write tensors `vector` `[d_model]` and `decoder_rows` `[n_features, d_model]`, float32, with the metadata."""
    from safetensors.torch import save_file

    tensors = {"vector": vector.vector.float().contiguous(), "decoder_rows": vector.rows.float().contiguous()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, vector.metadata())


def control_layer(hook: str) -> int:
    """N of the tensor `direction.N`, which llama.cpp adds to the output of block N (from 0). ConfigError for hooks
    without an equivalent: within a block, and before or after block 0, which llama.cpp does not steer.

    Example:
        >>> control_layer("blocks.8.hook_resid_pre"), control_layer("blocks.8.hook_resid_post")
        (7, 8)
    """
    point = parse_hook(hook)
    layer = point.layer - 1 if point.kind == "hook_resid_pre" else point.layer
    if point.kind not in ("hook_resid_pre", *_SAME_AS_POST):
        raise ConfigError(
            f"llama.cpp adds control vectors to what leaves a block, which a vector at {hook} is not.",
            at="format",
            fix="export it as safetensors.",
        )
    if layer < 1:
        raise ConfigError(
            f"llama.cpp does not steer before block 1, and {hook} is there.",
            at="format",
            fix="export it as safetensors.",
        )
    return layer


def write_gguf_vector(vector: SteeringVector, path: Path, *, architecture: str) -> None:
    """Write a control vector for llama.cpp: `--control-vector FILE` adds what the dose says, at every position.
    `architecture` is the model's in GGUF, such as "llama"; llama.cpp does not compare it. ConfigError as
    `control_layer`.
    """
    from gguf import GGUFWriter

    layer = control_layer(vector.hook)
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", architecture)
        writer.add_uint32("controlvector.layer_count", 1)
        for key, value in vector.metadata().items():
            writer.add_string(f"saeffect.{key}", value)
        writer.add_tensor(f"direction.{layer}", vector.vector.float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def joint_vector(rows: Tensor, length: float) -> Tensor:
    """A vector of that length along the sum of decoder rows `[n, d_model]`, float32, as the operator "add" uses it."""
    total = rows.float().sum(dim=0)
    norm = float(total.norm())
    if not norm > 0 or not torch.isfinite(total).all():
        raise ConfigError("the decoder rows add up to no direction.", at="features", fix="choose other features.")
    return total * (length / norm)
