"""Published SAEs by name, from small files in exactly their layouts, against SAELens' own loaders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from hub_cache import HubCache
from published_peers import D, N, X, agree, drawn, first, npz
from saeffect.errors import BadFile, IncompatibleSae, NotFound
from saeffect.sae.formats import load_sae, read_sae_config, sae_identity, saved_dtype

# Gemma Scope.

_GEMMA = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}


@pytest.mark.parametrize(
    ("release", "hook"),
    [
        ("gemma-scope-2b-pt-res-canonical", "blocks.0.hook_resid_post"),
        ("gemma-scope-2b-pt-mlp-canonical", "blocks.0.hook_mlp_out"),
        ("gemma-scope-2b-pt-att-canonical", "blocks.0.attn.hook_z"),
    ],
)
def test_gemma_scope(hub: HubCache, monkeypatch: pytest.MonkeyPatch, release: str, hook: str) -> None:
    sae = first(release)
    hub.add(sae.repo, f"{sae.path}/params.npz", npz(drawn(_GEMMA)))
    ours = load_sae(sae.name)
    assert (ours.cfg.hook_name, ours.cfg.metadata["model_name"]) == (hook, "google/gemma-2-2b")
    assert (ours.cfg.architecture, ours.cfg.d_in, ours.cfg.d_sae) == ("jumprelu", D, N)
    # SAELens knows the sizes by heart; here they are those of the file.
    from sae_lens.loading import pretrained_sae_loaders as loaders

    original = loaders.get_gemma_2_config_from_hf
    monkeypatch.setattr(
        loaders, "get_gemma_2_config_from_hf", lambda *args, **kw: original(*args, **kw) | {"d_in": D, "d_sae": N}
    )
    agree(sae, monkeypatch)


def test_gemma_scope_of_the_embedding(hub: HubCache) -> None:
    """Trained on the embedding e, given what enters block 0, √d·e; the output is on that scale too."""
    sae = first("gemma-scope-2b-pt-res", "embedding")
    tensors = drawn(_GEMMA)
    hub.add(sae.repo, f"{sae.path}/params.npz", npz(tensors))
    ours = load_sae(sae.name)
    assert ours.cfg.hook_name == "blocks.0.hook_resid_pre"
    pre = X @ tensors["W_enc"] + tensors["b_enc"]
    acts = pre.relu() * (pre > tensors["threshold"])
    torch.testing.assert_close(ours.encode(X * D**0.5), acts)
    torch.testing.assert_close(ours(X * D**0.5), (acts @ tensors["W_dec"] + tensors["b_dec"]) * D**0.5)


@pytest.mark.parametrize("settings", [True, False])
def test_gemma_scope_2(hub: HubCache, monkeypatch: pytest.MonkeyPatch, settings: bool) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    sae = first("gemma-scope-2-270m-pt-res")
    lower = {name.lower(): tensor for name, tensor in drawn(_GEMMA).items()}
    hub.add(sae.repo, f"{sae.path}/params.safetensors", save(lower))
    if settings:
        cfg = {
            "architecture": "jump_relu",
            "model_name": "gemma-v3-270m-pt",
            "hf_hook_point_in": "model.layers.12.output",
        }
        hub.add(sae.repo, f"{sae.path}/config.json", json.dumps(cfg).encode())
    monkeypatch.setattr(
        loaders, "get_safetensors_tensor_shapes", lambda *_: {k: list(t.shape) for k, t in lower.items()}
    )
    assert agree(sae, monkeypatch).cfg.metadata["model_name"] == "google/gemma-3-270m"


def test_a_gemma_scope_folder_on_disk(tmp_path: Path, complains: Callable[..., Any]) -> None:
    folder = tmp_path / "gemma-scope-9b-it-res" / "layer_20" / "width_16k" / "average_l0_47"
    folder.mkdir(parents=True)
    (folder / "params.npz").write_bytes(npz(drawn(_GEMMA)))
    cfg = read_sae_config(folder)
    assert (cfg.hook_name, cfg.metadata["model_name"]) == ("blocks.20.hook_resid_post", "google/gemma-2-9b-it")
    assert saved_dtype(folder) == "float32"
    assert len(sae_identity(folder)) == 64
    with complains(BadFile, "'params.npz' is Gemma Scope's weights", f"give the folder itself: '{folder}'"):
        load_sae(folder / "params.npz")
    with complains(NotFound, "but folders with one, such as 'average_l0_47'"):
        load_sae(folder.parent)
    elsewhere = folder.rename(tmp_path / "mine")
    assert read_sae_config(elsewhere).hook_name is None


@pytest.mark.parametrize(
    ("change", "kind", "part"),
    [
        ({"W_dec": (N, D + 1)}, IncompatibleSae, "transcoder"),
        ({"b_enc": (N + 1,)}, IncompatibleSae, "b_enc has shape (21,), but W_enc asks for (20,)"),
        ({"extra": (2,)}, IncompatibleSae, "holds extra, whose meaning is not known"),
        ({"threshold": None}, BadFile, "has no threshold; it has: b_dec"),
        ({"W_dec": (N,)}, BadFile, "W_enc and W_dec of params.npz are no matrices"),
    ],
)
def test_wrong_arrays(
    tmp_path: Path, complains: Callable[..., Any], change: dict[str, Any], kind: Any, part: str
) -> None:
    shapes = {name: shape for name, shape in (_GEMMA | change).items() if shape}
    (tmp_path / "params.npz").write_bytes(npz(drawn(shapes)))
    with complains(kind, part, at="arms.a.sae"):
        load_sae(tmp_path, at="arms.a.sae")


@pytest.mark.parametrize("keep", [0, 30, 400, -8])
def test_damaged_archives(tmp_path: Path, complains: Callable[..., Any], keep: int) -> None:
    (tmp_path / "params.npz").write_bytes(npz(drawn(_GEMMA))[:keep])
    with complains(BadFile, "params.npz cannot be read"):
        load_sae(tmp_path)


def test_arrays_of_objects_are_not_read(tmp_path: Path, complains: Callable[..., Any]) -> None:
    out = io.BytesIO()
    np.savez(out, **{k: t.numpy() for k, t in drawn(_GEMMA).items()} | {"more": np.array([print], dtype=object)})
    (tmp_path / "params.npz").write_bytes(out.getvalue())
    with complains(BadFile, "params.npz cannot be read: more is an array of objects"):
        load_sae(tmp_path)


def test_a_small_archive_cannot_fill_the_memory(tmp_path: Path, complains: Callable[..., Any]) -> None:
    with (tmp_path / "params.npz").open("wb") as file:
        np.savez_compressed(file, **{k: t.numpy() for k, t in drawn(_GEMMA).items()}, more=np.zeros(1 << 29, np.int8))
    assert (tmp_path / "params.npz").stat().st_size < 1 << 20
    with complains(BadFile, "more would take 536,870,912 bytes of memory"):
        load_sae(tmp_path)


def test_an_encrypted_archive_is_refused(tmp_path: Path, complains: Callable[..., Any]) -> None:
    data = npz(drawn(_GEMMA)).replace(b"PK\x01\x02\x2d\x03\x2d\x00\x00", b"PK\x01\x02\x2d\x03\x2d\x00\x01")
    (tmp_path / "params.npz").write_bytes(data)
    with complains(BadFile, "params.npz cannot be read", "encrypted"):
        load_sae(tmp_path)


# Llama Scope.

_LINEAR = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "decoder.bias": (D,)}


@pytest.mark.parametrize(
    ("release", "hook"),
    [("llama_scope_lxr_8x", "blocks.0.hook_resid_post"), ("llama_scope_lxa_8x", "blocks.0.hook_attn_out")],
)
def test_llama_scope(hub: HubCache, monkeypatch: pytest.MonkeyPatch, release: str, hook: str) -> None:
    sae = first(release)
    settings = {
        "d_model": D,
        "d_sae": N,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.75,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": D**0.5 / sae.scale, "out": D**0.5 / sae.scale},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "hook_point_in": hook,
        "hook_point_out": hook,
    }
    hub.add(sae.repo, f"{sae.path}/hyperparams.json", json.dumps(settings).encode())
    hub.add(sae.repo, f"{sae.path}/checkpoints/final.safetensors", save(drawn(_LINEAR)))
    ours = agree(sae, monkeypatch)
    assert ours.cfg.metadata["model_name"] == "meta-llama/Llama-3.1-8B"
    # What it means: inputs are scaled to √d on average, thresholds are those of unscaled activations.
    t = drawn(_LINEAR)
    pre = X * sae.scale @ t["encoder.weight"].T + t["encoder.bias"]
    acts = pre * (pre > 0.75 * sae.scale)
    torch.testing.assert_close(ours.encode(X), acts, rtol=1e-4, atol=1e-4)
    out = (acts @ t["decoder.weight"].T + t["decoder.bias"]) / sae.scale
    torch.testing.assert_close(ours(X), out, rtol=1e-4, atol=1e-4)


def test_llama_scope_r1(hub: HubCache, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]) -> None:
    sae = first("llama_scope_r1_distill")
    settings = {"d_model": D, "expansion_factor": 4, "act_fn": "jumprelu", "hook_point_in": sae.hook}
    wide = drawn({"encoder.weight": (24, D), "encoder.bias": (24,), "decoder.weight": (D, 24), "decoder.bias": (D,)})
    wide["log_jumprelu_threshold"] = torch.linspace(-1, 1, 24)
    hub.add(sae.repo, f"{sae.path}/config.json", json.dumps(settings).encode())
    hub.add(sae.repo, f"{sae.path}/sae_weights.safetensors", save(wide))
    agree(sae, monkeypatch)
    # The files alone do not say the scale.
    folder = hub.add(sae.repo, f"{sae.path}/config.json", json.dumps(settings).encode()).parent
    with complains(IncompatibleSae, "reads activations scaled dataset-wise", "saelens:<release>/<id>"):
        load_sae(folder)
    named = {**wide, f"dataset_average_activation_norm.{sae.hook}": torch.tensor(D**0.5 / sae.scale)}
    hub.add(sae.repo, f"{sae.path}/sae_weights.safetensors", save(named))
    torch.testing.assert_close(load_sae(folder)(X), load_sae(sae.name)(X))
