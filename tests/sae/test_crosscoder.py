"""What sets crosscoders apart: two sides that start alike, what is stored of them, and dictionary_learning's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae, ShapeMismatch
from saeffect.sae import ARCHITECTURES, CrosscoderSae, JumpReluCrosscoderSae, L1CrosscoderSae, StandardSae
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.crosscoder import BASE, TUNED, side
from saeffect.sae.formats import load_sae, read_sae_config, save_dictionary_learning, save_sae, saved_dtype
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.step import TrainingStep, new_sae

D, N = 6, 11
X = torch.randn(40, 2 * D, generator=torch.Generator().manual_seed(9))


def _filled(kind: type[SparseAutoencoder], seed: int = 0, **more: Any) -> Any:
    sae = kind(SaeConfig(kind.architecture, 2 * D, N, **more))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def test_by_hand() -> None:
    """One number a model: decoder rows (3, -4) count as 7, wherever the length of (3, -4) alone would be 5."""
    sae = CrosscoderSae(SaeConfig("crosscoder", 2, 1, k=1))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[3.0, -4.0]]))
        sae.W_enc.copy_(torch.tensor([[1.0], [0.5]]))
        sae.topk_threshold.fill_(14.0)
    assert sae.row_norms(sae.W_dec).tolist() == [7.0]
    saved = sae.for_inference()
    assert isinstance(saved, JumpReluCrosscoderSae) and saved.threshold.tolist() == [2.0]
    assert saved.encode(torch.tensor([[1.0, 2.0], [1.0, 2.5]])).tolist() == [[0.0], [2.25]]
    assert saved(torch.tensor([[1.0, 2.5]])).tolist() == [[6.75, -9.0]]


@pytest.mark.parametrize("architecture", [name for name, kind in ARCHITECTURES.items() if kind.sides])
def test_identical_models_keep_sides_equal(architecture: str) -> None:
    config = SaeTrainingConfig(architecture=architecture, d_sae=N, **({"k": 2} if architecture == "crosscoder" else {}))
    sae = new_sae(config, 2 * D)
    x = X[:, :D].repeat(1, 2)
    sae.initialise(x, config)
    assert torch.equal(side(sae.W_dec, BASE), side(sae.W_dec, TUNED))
    step = TrainingStep(sae, config, 30)
    start = sae.W_dec.detach().clone()
    for number in range(30):
        step(number, x)
    assert (sae.W_dec - start).abs().max() > 1e-3
    torch.testing.assert_close(side(sae.W_dec, BASE), side(sae.W_dec, TUNED), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sae(x).chunk(2, dim=1)[0], sae(x).chunk(2, dim=1)[1], rtol=1e-3, atol=1e-4)


def test_the_file_has_two_decoders(tmp_path: Path) -> None:
    sae = _filled(L1CrosscoderSae)
    save_sae(sae, tmp_path)
    stored = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items()} == {
        **{f"W_enc_{model}": (D, N) for model in ("base", "tuned")},
        **{f"W_dec_{model}": (N, D) for model in ("base", "tuned")},
        **{f"b_dec_{model}": (D,) for model in ("base", "tuned")},
        "b_enc": (N,),
    }
    assert torch.equal(stored["W_dec_tuned"], sae.W_dec[:, D:])
    assert torch.equal(stored["W_enc_base"], sae.W_enc[:D])
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"]) == ("crosscoder_l1", 2 * D)


def test_an_odd_width_is_refused(tmp_path: Path, complains: Callable[..., Any]) -> None:
    with complains(ShapeMismatch, "d_in=5 cannot be odd"):
        L1CrosscoderSae(SaeConfig("crosscoder_l1", 5, N))
    save_sae(_filled(L1CrosscoderSae), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"d_in": 11}))
    with complains(BadFile, "d_in=11 is odd", at=str(tmp_path)):
        load_sae(tmp_path)


def _theirs(folder: Path, x: Tensor) -> Tensor:
    """The reconstruction `[n, 2, d]` that dictionary_learning's crosscoders make of a file."""
    t = load_file(folder / "model.safetensors")
    x = x.view(-1, 2, D)
    mean, scale = t["activation_mean"], t["activation_global_scale"][:, None]
    normalised = not bool(mean.isnan().any())
    x = (x - mean) * scale if normalised else x
    f = (torch.einsum("bld,ldf->bf", x, t["encoder.weight"]) + t["encoder.bias"]).relu()
    if "threshold" in t:
        f = f * (f * t["decoder.weight"].norm(dim=2).sum(dim=0) > t["threshold"])
    out = torch.einsum("bf,lfd->bld", f, t["decoder.weight"]) + t["decoder.bias"]
    return out / (scale + 1e-8) + mean if normalised else out


@pytest.mark.parametrize("kind", [CrosscoderSae, L1CrosscoderSae])
@pytest.mark.parametrize("apply", [True, False])
def test_dictionary_learnings_layout(kind: type[SparseAutoencoder], apply: bool, tmp_path: Path) -> None:
    sae = _filled(kind, k=3 if kind is CrosscoderSae else None, apply_b_dec_to_input=apply)
    if isinstance(sae, CrosscoderSae):
        sae.topk_threshold.fill_(9.0)
    save_dictionary_learning(sae, tmp_path)
    saved = sae.for_inference()
    torch.testing.assert_close(_theirs(tmp_path, X).flatten(1), saved(X), rtol=1e-4, atol=1e-4)
    again = load_sae(tmp_path)
    assert again.architecture == saved.architecture and again.cfg == read_sae_config(tmp_path)
    torch.testing.assert_close(again(X), saved(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.encode(X), saved.encode(X), rtol=1e-4, atol=1e-4)
    assert 0 < (again.encode(X) > 0).float().mean() < 0.7
    assert saved_dtype(tmp_path) == "float32"
    assert again.cfg.metadata.get("k") == (3 if kind is CrosscoderSae else None)
    again_in_half = save_sae(saved, tmp_path / "half", dtype="float16")
    save_dictionary_learning(load_sae(again_in_half), tmp_path / "theirs")


def test_their_normalisation_is_folded_in(tmp_path: Path) -> None:
    save_dictionary_learning(_filled(L1CrosscoderSae), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {
        "activation_mean": torch.randn(2, D, generator=torch.Generator().manual_seed(1)),
        "activation_std": torch.ones(2, D),
        "activation_global_scale": torch.tensor([0.5, 3.0]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_sae(tmp_path)(X), _theirs(tmp_path, X).flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"dict_size": "many"}, BadFile, "dict_size='many'"),
        ({"num_layers": 3}, IncompatibleSae, "num_layers=3"),
        ({"code_normalization": "DECOUPLED"}, IncompatibleSae, "'DECOUPLED'; supported: CROSSCODER, SAE, NONE"),
        ({"dict_size": N + 1}, IncompatibleSae, "encoder.weight has shape"),
    ],
)
def test_mistakes_in_their_files(
    changes: dict[str, Any], error: type[Exception], part: str, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    save_dictionary_learning(_filled(L1CrosscoderSae), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with complains(error, part, at=str(tmp_path)):
        load_sae(tmp_path)


def test_dictionary_learning_export_is_refused(tmp_path: Path, complains: Callable[..., Any]) -> None:
    with complains(IncompatibleSae, "only crosscoders"):
        save_dictionary_learning(StandardSae(SaeConfig("standard", 4, 3)), tmp_path)
    with complains(IncompatibleSae, "not one number"):
        save_dictionary_learning(_filled(JumpReluCrosscoderSae), tmp_path)
    assert not list(tmp_path.iterdir())
