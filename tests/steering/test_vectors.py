"""Steering vectors read back by the programs that they are for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saeffect.errors import ConfigError
from saeffect.steering.vectors import (
    SteeringVector,
    control_layer,
    joint_vector,
    write_gguf_vector,
    write_safetensors_vector,
)


def vector(hook: str = "blocks.8.hook_resid_pre", dose: float = 0.5) -> SteeringVector:
    rows = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    return SteeringVector(joint_vector(rows, dose * 10), rows, (7, 2), hook, dose, 10.0, {"arm": "control"})


def test_the_joint_vector_has_its_length_along_the_sum() -> None:
    found = joint_vector(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 2.0)
    assert torch.allclose(found, torch.tensor([1.2, 1.6]))
    assert torch.allclose(joint_vector(torch.tensor([[3.0, 4.0]]), -5.0), torch.tensor([-3.0, -4.0]))
    with pytest.raises(ConfigError, match="no direction"):
        joint_vector(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1.0)


def test_safetensors_hold_the_vector_and_how_to_use_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_safetensors_vector(vector(), tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert torch.allclose(file.get_tensor("vector"), torch.tensor([3.0, 4.0, 0.0]))
        assert file.get_tensor("decoder_rows").shape == (2, 3)
        said = file.metadata()
    assert (said["hook"], said["norm"], said["dose"], said["mean_norm"]) == (
        "blocks.8.hook_resid_pre",
        "5",
        "0.5",
        "10",
    )
    assert json.loads(said["features"]) == [7, 2] and said["arm"] == "control"


def test_gguf_is_read_back_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader

    write_gguf_vector(vector(), tmp_path / "v.gguf", architecture="llama")
    read = GGUFReader(tmp_path / "v.gguf")
    text = {
        key: bytes(part.parts[part.data[0]]).decode()
        for key, part in read.fields.items()
        if "GGUF" not in key and part.types[-1].name == "STRING"
    }
    assert text["general.architecture"] == "controlvector" and text["controlvector.model_hint"] == "llama"
    assert text["saeffect.hook"] == "blocks.8.hook_resid_pre"
    (tensor,) = read.tensors
    # One-dimensional float32 named direction.N with N above 0: anything else llama.cpp refuses.
    assert tensor.name == "direction.7" and tensor.tensor_type == GGMLQuantizationType.F32
    assert tensor.shape.tolist() == [3]
    assert np.allclose(tensor.data, [3.0, 4.0, 0.0])


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.2.hook_resid_pre", 1),
        ("blocks.2.hook_resid_post", 2),
        ("blocks.5.hook_mlp_out", 5),
        ("model.layers.3", 3),
    ],
)
def test_the_layer_after_which_llama_cpp_adds(hook: str, layer: int) -> None:
    assert control_layer(hook) == layer


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.4.hook_attn_out"])
def test_unsupported_hooks_write_no_gguf(hook: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llama\.cpp"):
        write_gguf_vector(vector(hook), tmp_path / "v.gguf", architecture="llama")
    assert not list(tmp_path.iterdir())
