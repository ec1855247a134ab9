"""One contract for every architecture, and what sets each apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.sae import ARCHITECTURES
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats import load_sae, save_sae, saved_dtype

D_IN, D_SAE, K = 6, 20, 4
ON_DISK = [name for name, kind in ARCHITECTURES.items() if kind.saved_as is None]
ONE_STEP = [name for name in ON_DISK if name != "matching_pursuit"]  # which has tests of its own


def _sae(architecture: str, seed: int = 0, **more: Any) -> SparseAutoencoder:
    k = K if architecture == "topk" else None
    cfg = SaeConfig(architecture, D_IN, D_SAE, k=k, metadata={"hook_name": "blocks.1.hook_resid_pre"}, **more)
    sae = ARCHITECTURES[architecture](cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        if architecture.endswith("jumprelu"):
            sae.threshold.abs_()  # type: ignore[operator]
    return sae


X = torch.randn(7, D_IN, generator=torch.Generator().manual_seed(9))
OPTIONS = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
]


@pytest.mark.parametrize("architecture", ON_DISK)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "raw input", "layer norm"])
class TestContract:
    def test_shapes_and_signs(self, architecture: str, options: dict[str, Any]) -> None:
        sae = _sae(architecture, **options)
        assert sae.architecture == architecture
        acts = sae.encode(X)
        assert acts.shape == (7, D_SAE)
        assert acts.dtype == torch.float32
        assert (acts >= 0).all()
        assert 0 < (acts > 0).sum() < acts.numel()
        assert sae(X).shape == sae.decode(acts).shape == X.shape

    def test_leading_axes_do_not_matter(self, architecture: str, options: dict[str, Any]) -> None:
        sae = _sae(architecture, **options)
        torch.testing.assert_close(sae.encode(X[None, None])[0, 0], sae.encode(X))
        torch.testing.assert_close(sae(X.reshape(7, 1, D_IN))[:, 0], sae(X))

    def test_half_precision_is_taken_in(self, architecture: str, options: dict[str, Any]) -> None:
        sae = _sae(architecture, **options)
        acts = sae.encode(X.bfloat16())
        assert acts.dtype == torch.float32
        assert torch.equal(acts, sae.encode(X.bfloat16().float()))

    def test_round_trip(self, architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
        sae = _sae(architecture, **options)
        assert save_sae(sae, tmp_path / "deep" / "sae") == tmp_path / "deep" / "sae"
        again = load_sae(tmp_path / "deep" / "sae")
        assert again.cfg == dataclasses.replace(sae.cfg, metadata=again.cfg.metadata)
        assert again.cfg.hook_name == "blocks.1.hook_resid_pre"
        assert torch.equal(again.encode(X), sae.encode(X))
        assert torch.equal(again(X), sae(X))
        assert not again.training
        assert not any(p.requires_grad for p in again.parameters())

    @pytest.mark.parametrize("width", [D_IN - 1, D_IN + 1])
    def test_wrong_width(self, architecture: str, options: dict[str, Any], width: int) -> None:
        for call in (_sae(architecture, **options), _sae(architecture, **options).encode):
            with pytest.raises(ShapeMismatch, match=f"{width} wide, but this SAE has d_in={D_IN}"):
                call(torch.zeros(2, width))

    def test_encode_is_the_formula(self, architecture: str, options: dict[str, Any]) -> None:
        if architecture not in ONE_STEP:
            pytest.skip("it encodes in many steps")
        sae = _sae(architecture, **options)
        mean, scale = torch.zeros(7, 1), torch.ones(7, 1)
        if options.get("normalize_activations"):
            mean, scale = X.mean(1, keepdim=True), X.std(1, keepdim=True)
        sae_in = (X - mean) / (scale + (1e-5 if options.get("normalize_activations") else 0.0))
        shifted = sae_in - sae.b_dec if options.get("apply_b_dec_to_input", True) else sae_in
        hidden_pre = shifted @ sae.W_enc + getattr(sae, sae.vectors[0])
        if architecture == "gated":  # the magnitude has a reading of its own
            kept, hidden_pre = hidden_pre > 0, shifted @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag  # type: ignore
        elif architecture == "topk":
            kept = hidden_pre >= hidden_pre.sort(dim=1, descending=True).values[:, K - 1 : K]
        elif architecture.endswith("jumprelu"):
            kept = hidden_pre > sae.threshold  # type: ignore[operator]
        else:
            kept = torch.ones_like(hidden_pre, dtype=torch.bool)
        acts = torch.where(kept, hidden_pre.relu(), 0.0)
        torch.testing.assert_close(sae.encode(X), acts)
        torch.testing.assert_close(sae(X), (acts @ sae.W_dec + sae.b_dec) * scale + mean)


def test_by_hand() -> None:
    """Two features of one input: hidden_pre = (x - 1)·(1, 2) + (0, -1)."""
    expected = {"standard": [2.0, 3.0], "topk": [0.0, 3.0], "jumprelu": [0.0, 3.0], "gated": [8.0, 0.0]}
    assert set(expected) == {name for name in ONE_STEP if not ARCHITECTURES[name].sides}
    for architecture, acts in expected.items():
        cfg = SaeConfig(architecture, 1, 2, k=1 if architecture == "topk" else None)
        sae = ARCHITECTURES[architecture](cfg)
        with torch.no_grad():
            sae.W_enc.copy_(torch.tensor([[1.0, 2.0]]))
            getattr(sae, sae.vectors[0]).copy_(torch.tensor([0.0, -1.0]))
            sae.W_dec.copy_(torch.tensor([[10.0], [100.0]]))
            sae.b_dec.fill_(1.0)
            if architecture == "jumprelu":
                sae.threshold.fill_(2.0)  # type: ignore[operator]  # a value at its threshold is off
            if architecture == "gated":  # magnitudes: 4 times the product, and the product less 5
                sae.r_mag.copy_(torch.tensor([4.0, 1.0]).log())  # type: ignore[operator]
                sae.b_mag.copy_(torch.tensor([0.0, -5.0]))  # type: ignore[operator]
        assert sae.encode(torch.tensor([[3.0]])).tolist() == [pytest.approx(acts)]
        assert sae(torch.tensor([[3.0]])).item() == pytest.approx(10 * acts[0] + 100 * acts[1] + 1)
        assert sae.encode(torch.tensor([[-3.0]])).tolist() == [[0.0, 0.0]]


def test_topk_ranks_by_activation_times_decoder_norm_if_asked() -> None:
    plain, rescaled = _sae("topk"), _sae("topk", rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        for sae in (plain, rescaled):
            sae.W_dec[0] *= 1000  # feature 0 is small but writes a great deal
    on = rescaled.encode(X) > 0
    positive = ((X - plain.b_dec) @ plain.W_enc + plain.b_enc)[:, 0] > 0
    assert torch.equal(on[:, 0], positive)
    with torch.no_grad():
        plain.W_dec /= plain.W_dec.norm(dim=1, keepdim=True)
        rescaled.W_dec /= rescaled.W_dec.norm(dim=1, keepdim=True)
    torch.testing.assert_close(plain(X), rescaled(X))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_precision(dtype: str, tmp_path: Path) -> None:
    sae = _sae("topk")
    save_sae(sae, tmp_path, dtype=dtype)
    assert saved_dtype(tmp_path) == dtype
    again = load_sae(tmp_path)
    assert again.W_dec.dtype == torch.float32
    assert torch.equal(again.W_dec, sae.W_dec.to(getattr(torch, dtype)).float())


def test_sparsity_is_kept_beside_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_sae(_sae("standard"), tmp_path, sparsity=torch.linspace(-5, 0, D_SAE, dtype=torch.float64))
    found = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.linspace(-5, 0, D_SAE))


def test_no_other_precision(tmp_path: Path, complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "dtype 'int8' is not float32, float16 or bfloat16"):
        save_sae(_sae("topk"), tmp_path / "a", dtype="int8")
    assert not (tmp_path / "a").exists()


def test_weights_ignore_the_default_dtype(tmp_path: Path) -> None:
    """transformers changes torch's default for all threads meanwhile."""
    sae = ARCHITECTURES["topk"](SaeConfig("topk", 4, 6, k=2))
    sae.W_dec.data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    save_sae(sae, tmp_path / "sae")
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = load_sae(tmp_path / "sae")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loaded.W_dec, sae.W_dec) and loaded.W_enc.dtype == torch.float32
