"""What SAELens' trainer keeps on the way, and what it saves at the end, gives the same SAE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saeffect.errors import BadFile, IncompatibleSae
from saeffect.sae.formats import load_sae, read_sae_config, save_sae

D_IN, D_SAE, K = 6, 20, 3
X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(9))
# name in SAELens -> (its class, options, what it is at inference)
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "standard": ("Standard", {}, "standard"),
    "topk": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": False}, "topk"),
    "topk rescaled": ("TopK", {"k": K}, "topk"),
    "batchtopk": ("BatchTopK", {"k": K, "rescale_acts_by_decoder_norm": False}, "jumprelu"),
    "batchtopk rescaled": ("BatchTopK", {"k": K}, "jumprelu"),
    "jumprelu": ("JumpReLU", {"jumprelu_init_threshold": 0.3}, "jumprelu"),
    "gated": ("Gated", {}, "gated"),
    "matryoshka": ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [5, D_SAE]}, "jumprelu"),
}


def _training_sae(kind: str, **more: Any) -> Any:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    name, options, _ = KINDS[kind]
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_pre")
    cfg = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **options, **more)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(cfg)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter_name, p in sorted(sae.named_parameters()):
            if parameter_name != "threshold":
                p.copy_(torch.randn(p.shape, generator=generator))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.8)
    return sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_the_training_form_and_the_saved_one(tmp_path: Path, kind: str, apply_b_dec_to_input: bool) -> None:
    from sae_lens import SAE

    theirs = _training_sae(kind, apply_b_dec_to_input=apply_b_dec_to_input)
    theirs.save_inference_model(tmp_path / "saved")
    theirs.save_model(tmp_path / "checkpoint")
    reference = SAE.load_from_disk(tmp_path / "saved")
    with torch.no_grad():
        acts, sae_out = reference.encode(X), reference(X)
        assert 0 < (acts > 0).sum() < acts.numel()
        for folder in ("saved", "checkpoint"):
            ours = load_sae(tmp_path / folder)
            assert ours.cfg.architecture == read_sae_config(tmp_path / folder).architecture == KINDS[kind][2]
            assert ours.cfg.hook_name == "blocks.1.hook_resid_pre"
            found = ours.encode(X)
            # A checkpoint of TopK keeps activations times decoder norm, with decoder rows as they are.
            torch.testing.assert_close(found, acts)
            torch.testing.assert_close(ours(X), sae_out)


def test_old_thresholds_are_logarithms(tmp_path: Path) -> None:
    _training_sae("jumprelu").save_model(tmp_path)
    expected = load_sae(tmp_path).encode(X)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, path)
    torch.testing.assert_close(load_sae(tmp_path).encode(X), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scaling_of_an_unfinished_run_is_folded(tmp_path: Path, kind: str) -> None:
    from sae_lens import SAE

    theirs = _training_sae(kind, normalize_activations="expected_average_only_in")
    theirs.save_inference_model(tmp_path / "saved")
    theirs.save_model(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text('{"scaling_factor": 2.5}')
    ours, scaled = load_sae(tmp_path / "checkpoint"), SAE.load_from_disk(tmp_path / "saved")
    with torch.no_grad():
        sae_out = scaled(X * 2.5) / 2.5
        torch.testing.assert_close(ours(X), sae_out)
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text('{"scaling_factor": null}')
    with torch.no_grad():
        assert not torch.allclose(load_sae(tmp_path / "checkpoint")(X), sae_out)


@pytest.mark.parametrize("scaler", ['{"scaling_factor": "2"}', '{"scaling_factor": -1}', '{"scaling_factor": true}'])
def test_a_scaling_that_is_none(tmp_path: Path, scaler: str, complains: Callable[..., Any]) -> None:
    _training_sae("standard").save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(scaler)
    with complains(BadFile, "activation_scaler.json gives scaling_factor=", at="here"):
        load_sae(tmp_path, at="here")
    (tmp_path / "activation_scaler.json").write_text("[2.5]")
    with complains(BadFile, "activation_scaler.json names no scaling_factor", at="here"):
        load_sae(tmp_path, at="here")


def test_whitened_inputs_are_refused(tmp_path: Path, complains: Callable[..., Any]) -> None:
    _training_sae("standard").save_model(tmp_path)
    save_file({"mean": torch.zeros(D_IN)}, tmp_path / "activation_whitening.safetensors")
    with complains(IncompatibleSae, "whitened inputs", at="here"):
        load_sae(tmp_path, at="here")


def test_a_factor_on_what_features_add(tmp_path: Path, complains: Callable[..., Any]) -> None:
    """SAELens before 6.0: `decode` multiplies the activations by it, `encode` does not; 6.0 drops it unless all 1."""
    _training_sae("standard").save_model(tmp_path)
    before = load_sae(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors, factor = load_file(path), torch.linspace(0.5, 2.0, D_SAE)
    save_file(tensors | {"scaling_factor": torch.ones(D_SAE)}, path)
    assert torch.equal(load_sae(tmp_path)(X), before(X))
    save_file(tensors | {"scaling_factor": factor}, path)
    with complains(IncompatibleSae, "finetuning_scaling_factor is not set", at="here"):
        load_sae(tmp_path, at="here")
    raw = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(raw | {"finetuning_scaling_factor": True}))
    ours, acts = load_sae(tmp_path), before.encode(X)
    assert torch.equal(ours.encode(X), acts)
    torch.testing.assert_close(ours(X), (acts * factor) @ before.W_dec + before.b_dec)


@pytest.mark.parametrize("options", [{}, {"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}])
def test_features_of_both_signs_are_two_each(tmp_path: Path, options: dict[str, Any]) -> None:
    import sae_lens
    from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig

    theirs = AbsTopKSAE(AbsTopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(theirs.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator))
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    acts = ours.encode(X)
    assert ours.cfg.d_sae == 2 * D_SAE and ours.cfg.metadata["signed_features"] == D_SAE
    assert (acts >= 0).all() and ((acts > 0).sum(1) == K).all() and (acts[:, D_SAE:] > 0).any()
    with torch.no_grad():
        torch.testing.assert_close(acts[:, :D_SAE] - acts[:, D_SAE:], theirs.encode(X))
        torch.testing.assert_close(ours(X), theirs(X))
        again = sae_lens.SAE.load_from_disk(save_sae(ours, tmp_path / "again"))
        torch.testing.assert_close(again(X), theirs(X))


def test_a_checkpoint_without_its_threshold(tmp_path: Path, complains: Callable[..., Any]) -> None:
    _training_sae("batchtopk").save_model(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    del tensors["topk_threshold"]
    save_file(tensors, path)
    with complains(BadFile, "has no topk_threshold; it has: W_dec, W_enc, b_dec, b_enc", at="here"):
        load_sae(tmp_path, at="here")


def test_the_files_of_a_run_are_read(tmp_path: Path) -> None:
    """A finished run leaves the runner's own configuration and sparsity beside the SAE."""
    _training_sae("batchtopk rescaled").save_inference_model(tmp_path)
    (tmp_path / "runner_cfg.json").write_text(json.dumps({"sae": {"architecture": "batchtopk"}}))
    assert load_sae(tmp_path).cfg.metadata["training_architecture"] == "batchtopk"
