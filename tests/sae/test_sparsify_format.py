"""SAEs as sparsify saves them. The folders are written as sparsify 1.3 does, the forward pass is written out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae, NotFound
from saeffect.sae.formats import load_sae, read_sae_config, save_sae, saved_dtype
from saeffect.sae.topk import TopKSae

D_IN, D_SAE, K = 6, 24, 4
X = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
CFG: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 4,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}


def _tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _folder(folder: Path, tensors: dict[str, Tensor] | None = None, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors() if tensors is None else tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in (CFG | changed).items() if v != "delete"}))
    return folder


def _forward(x: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(largest k activations of each token, spread out; reconstruction), token by token."""
    acts, outs = [], []
    for row in x:
        positive = (tensors["encoder.weight"] @ (row - tensors["b_dec"]) + tensors["encoder.bias"]).clamp(min=0)
        kept = positive.argsort(descending=True)[:K]
        out = tensors["b_dec"].clone()
        for f in kept:
            out += positive[f] * tensors["W_dec"][f]
        acts.append(torch.stack([positive[f] if f in kept else positive.new_zeros(()) for f in range(D_SAE)]))
        outs.append(out)
    return torch.stack(acts), torch.stack(outs)


def test_it_computes_what_sparsify_computes(tmp_path: Path) -> None:
    sae = load_sae(_folder(tmp_path / "layers.8"))
    acts, sae_out = _forward(X, _tensors())
    assert isinstance(sae, TopKSae)
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (D_IN, D_SAE, K)
    torch.testing.assert_close(sae.encode(X), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(X), sae_out, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in sae.parameters())


# Computed by sparsify 1.3's SparseCoder.load_from_disk(folder).forward(X) on the folder that `_folder` writes.
REFERENCE_ACTS = [[5.969486, 3.729825, 3.580168, 2.237671], [3.974617, 3.507562, 3.447236, 3.356268]]
REFERENCE_OUT = [
    [1.631695, -5.064242, 0.608703, 14.605290, 13.781527, -11.193016],
    [5.469761, -1.312577, 1.981354, 16.461021, 13.283385, -8.067233],
]


def test_it_computes_what_sparsify_computed(tmp_path: Path) -> None:
    sae = load_sae(_folder(tmp_path / "layers.8"))
    found = sae.encode(X[:2]).sort(dim=1, descending=True).values[:, :K]
    torch.testing.assert_close(found, torch.tensor(REFERENCE_ACTS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(X[:2]), torch.tensor(REFERENCE_OUT), rtol=1e-5, atol=1e-5)


def test_the_number_of_features(tmp_path: Path) -> None:
    assert read_sae_config(_folder(tmp_path / "a", num_latents=17, expansion_factor=32)).d_sae == 17
    assert read_sae_config(_folder(tmp_path / "b", num_latents=0, expansion_factor=5)).d_sae == 30
    assert read_sae_config(_folder(tmp_path / "c", num_latents="delete", expansion_factor=5)).d_sae == 30
    assert read_sae_config(_folder(tmp_path / "d", expansion_factor="delete")).d_sae == 32 * D_IN


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("layers.8", "blocks.8.hook_resid_post"),
        ("h.11", "blocks.11.hook_resid_post"),
        ("model.layers.3", "blocks.3.hook_resid_post"),
        ("layers.0.mlp", "blocks.0.hook_mlp_out"),
        ("layers.0.self_attn", "blocks.0.hook_attn_out"),
        ("embed_tokens", None),
        ("sae", None),
    ],
)
def test_the_folder_names_the_hook(tmp_path: Path, name: str, hook: str | None) -> None:
    cfg = read_sae_config(_folder(tmp_path / name))
    assert cfg.hook_name == hook
    assert cfg.metadata["hookpoint"] == name


def test_older_files_say_less(tmp_path: Path) -> None:
    old = {key: "delete" for key in ("activation", "multi_topk", "skip_connection", "transcode", "num_latents")}
    sae = load_sae(_folder(tmp_path / "layers.1", **old, signed=False))
    torch.testing.assert_close(sae(X), _forward(X, _tensors())[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = _folder(tmp_path / "layers.1", _tensors(dtype))
    assert saved_dtype(folder) == str(dtype).removeprefix("torch.")
    sae = load_sae(folder)
    assert sae.W_dec.dtype == torch.float32
    assert torch.equal(sae.W_dec, _tensors(dtype)["W_dec"].float())


def test_it_is_saved_in_saelens_layout(tmp_path: Path) -> None:
    from sae_lens import SAE

    ours = load_sae(_folder(tmp_path / "layers.8"))
    theirs = SAE.load_from_disk(save_sae(ours, tmp_path / "again"))
    assert theirs.cfg.metadata.hook_name == "blocks.8.hook_resid_post"
    with torch.no_grad():
        torch.testing.assert_close(theirs(X), ours(X))


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"transcode": True}, "transcode: it is a transcoder"),
        ({"skip_connection": True}, "skip_connection: it has a skip connection"),
        ({"signed": True}, "signed: its features may be negative"),
        ({"activation": "groupmax"}, "activation='groupmax'; supported: topk"),
    ],
)
def test_other_variants_are_refused(
    tmp_path: Path, complains: Callable[..., Any], changed: dict[str, Any], part: str
) -> None:
    folder = _folder(tmp_path / "layers.8", **changed)
    for read in (read_sae_config, load_sae):
        with complains(IncompatibleSae, part, at="arms.a.sae"):
            read(folder, at="arms.a.sae")


def test_a_skip_connection_in_the_weights_alone(tmp_path: Path, complains: Callable[..., Any]) -> None:
    folder = _folder(tmp_path / "layers.8", _tensors() | {"W_skip": torch.zeros(D_IN, D_IN)})
    with complains(IncompatibleSae, "W_skip", at=str(folder)):
        load_sae(folder)


@pytest.mark.parametrize("changed", [{"d_in": "delete"}, {"d_in": 0}, {"k": 25}, {"k": 0}, {"k": "4"}, {"k": True}])
def test_impossible_sizes(tmp_path: Path, complains: Callable[..., Any], changed: dict[str, Any]) -> None:
    with complains(BadFile, "sparsify's cfg.json gives d_in=", at="arms.a.sae"):
        load_sae(_folder(tmp_path / "layers.8", **changed), at="arms.a.sae")


def test_broken_files(tmp_path: Path, complains: Callable[..., Any]) -> None:
    folder = _folder(tmp_path / "layers.8", {k: t for k, t in _tensors().items() if k != "W_dec"})
    with complains(BadFile, "sae.safetensors has no W_dec; it has: b_dec, encoder.bias, encoder.weight"):
        load_sae(folder)
    _folder(folder, _tensors() | {"b_dec": torch.full((D_IN,), torch.nan)})
    with complains(BadFile, "b_dec holds NaN"):
        load_sae(folder)
    _folder(folder, num_latents=23)
    with complains(IncompatibleSae, "encoder.weight has shape (24, 6), but cfg.json asks for (23, 6)"):
        load_sae(folder)
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    with complains(BadFile, "sae.safetensors cannot be read"):
        load_sae(folder)
    path.unlink()
    with complains(NotFound, "there is no sae.safetensors beside cfg.json"):
        load_sae(folder)
