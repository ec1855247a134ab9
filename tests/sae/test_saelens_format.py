from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saeffect.errors import BadFile, ConfigError, IncompatibleSae, NotFound, UnknownName
from saeffect.sae import ARCHITECTURES
from saeffect.sae.base import SaeConfig
from saeffect.sae.batchtopk import BatchTopKSae
from saeffect.sae.formats import load_sae, read_sae_config, read_sparsity, save_sae, saved_dtype
from saeffect.sae.matryoshka import MatryoshkaSae

D_IN, D_SAE = 6, 20
X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(9))


def _filled(module: Any) -> Any:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator).abs_() if name == "threshold" else p)
            if name != "threshold":
                p.copy_(torch.randn(p.shape, generator=generator))
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A TopK SAE that a test may break."""
    sae = _filled(ARCHITECTURES["topk"](SaeConfig("topk", D_IN, D_SAE, k=3)))
    return save_sae(sae, tmp_path / "sae")


def _change(folder: Path, **values: Any) -> None:
    raw = json.loads((folder / "cfg.json").read_text()) | values
    raw = {key: value for key, value in raw.items() if value != "delete"}
    (folder / "cfg.json").write_text(json.dumps(raw))


def _write_legacy(folder: Path, **cfg: Any) -> None:
    sae = _filled(ARCHITECTURES["standard"](SaeConfig("standard", D_IN, D_SAE)))
    save_sae(sae, folder)
    (folder / "cfg.json").write_text(json.dumps({"d_in": D_IN, "d_sae": D_SAE, **cfg}))


OPTIONS = [
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("jumprelu", {"normalize_activations": "layer_norm"}),
    ("gated", {}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("gated", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False}),
    ("matching_pursuit", {}),
    ("matching_pursuit", {"apply_b_dec_to_input": False, "normalize_activations": "constant_norm_rescale"}),
]


@pytest.mark.parametrize(("architecture", "options"), OPTIONS)
def test_saelens_opens_ours(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    from sae_lens import SAE

    cfg = SaeConfig(
        architecture,
        D_IN,
        D_SAE,
        k=3 if architecture == "topk" else None,
        metadata={
            "model_name": "gpt2",
            "hook_name": "blocks.1.hook_resid_pre",
            "prepend_bos": False,
            "held_out": {"l0": 3.0},
        },
        **options,
    )
    ours = _filled(ARCHITECTURES[architecture](cfg))
    save_sae(ours, tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(X), ours.encode(X))
        torch.testing.assert_close(theirs(X), ours(X))
    found = theirs.cfg.metadata
    assert (found.hook_name, found.prepend_bos) == ("blocks.1.hook_resid_pre", False)
    assert found.held_out == {"l0": 3.0}


@pytest.mark.parametrize(("architecture", "options"), OPTIONS)
def test_we_open_saelens(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    import sae_lens

    names = {"topk": "TopKSAE", "standard": "StandardSAE", "jumprelu": "JumpReLUSAE", "gated": "GatedSAE"}
    names["matching_pursuit"] = "MatchingPursuitSAE"
    k = {"k": 3} if architecture == "topk" else {}
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_pre")
    cfg_class = getattr(sae_lens, names[architecture] + "Config")
    theirs = _filled(
        getattr(sae_lens, names[architecture])(cfg_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **k, **options))
    )
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(X), theirs.encode(X))
        torch.testing.assert_close(ours(X), theirs(X))
    assert ours.cfg.hook_name == "blocks.1.hook_resid_pre"
    assert ours.cfg.architecture == architecture
    assert 0 < (ours.encode(X) > 0).sum() < X.shape[0] * D_SAE


@pytest.mark.parametrize("kind", [BatchTopKSae, MatryoshkaSae])
@pytest.mark.parametrize(
    "options", [{}, {"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}], ids=str
)
def test_saelens_opens_what_was_trained_over_batches(tmp_path: Path, kind: type[Any], options: dict[str, Any]) -> None:
    from sae_lens import SAE

    trained = _filled(kind(SaeConfig(kind.architecture, D_IN, D_SAE, k=3, metadata={"hook_name": "h"}, **options)))
    acts = trained.encode(X)
    trained.topk_threshold.copy_(acts[acts > 0].min() * (1 - 1e-6))
    save_sae(trained, tmp_path)
    theirs, ours = SAE.load_from_disk(tmp_path), load_sae(tmp_path)
    assert theirs.cfg.architecture() == ours.cfg.architecture == "jumprelu"
    assert theirs.cfg.metadata.training_architecture == kind.architecture
    assert ours.cfg.hook_name == "h"
    with torch.no_grad():
        for loaded in (theirs, ours):
            torch.testing.assert_close(loaded.encode(X), acts)
            torch.testing.assert_close(loaded(X), trained(X))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_half_precision_both_ways(tmp_path: Path, architecture: str, dtype: str) -> None:
    from sae_lens import SAE

    cfg = SaeConfig(architecture, D_IN, D_SAE, k=3 if architecture == "topk" else None)
    save_sae(_filled(ARCHITECTURES[architecture](cfg)), tmp_path / "a", dtype=dtype)
    ours = load_sae(tmp_path / "a")
    theirs = SAE.load_from_disk(tmp_path / "a", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(X), ours.encode(X))
        torch.testing.assert_close(theirs(X), ours(X))
    SAE.load_from_disk(tmp_path / "a").save_model(tmp_path / "b")
    assert saved_dtype(tmp_path / "a") == saved_dtype(tmp_path / "b") == dtype
    again = dict(load_sae(tmp_path / "b").named_parameters())
    for name, parameter in ours.named_parameters():
        if name == "threshold":
            torch.testing.assert_close(again[name], parameter, rtol=2**-8, atol=0)
        else:
            assert torch.equal(again[name], parameter)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_thresholds_are_kept_exactly(tmp_path: Path, dtype: str) -> None:
    sae: Any = _filled(ARCHITECTURES["jumprelu"](SaeConfig("jumprelu", D_IN, D_SAE)))
    save_sae(sae, tmp_path, dtype=dtype)
    again: Any = load_sae(tmp_path)
    assert torch.equal(again.threshold, sae.threshold)
    assert torch.equal(again.W_dec, sae.W_dec.to(getattr(torch, dtype)).float())


def test_what_half_precision_cannot_hold(tmp_path: Path, complains: Callable[..., Any]) -> None:
    sae: Any = _filled(ARCHITECTURES["standard"](SaeConfig("standard", D_IN, D_SAE)))
    with torch.no_grad():
        sae.b_dec[2] = 70_000.0
    with complains(ConfigError, "b_dec reaches 7e+04, more than float16 can hold"):
        save_sae(sae, tmp_path / "a", dtype="float16")
    assert not (tmp_path / "a").exists()
    save_sae(sae, tmp_path / "a", dtype="bfloat16")


def test_the_encoder_lies_on_disk_as_saelens_wants_it(tmp_path: Path) -> None:
    """While it is trained the encoder has one row a feature."""
    sae: Any = _filled(ARCHITECTURES["standard"](SaeConfig("standard", D_IN, D_SAE)))
    leaf = sae.leaves()["W_enc"]
    save_sae(sae, tmp_path)
    assert torch.equal(load_file(tmp_path / "sae_weights.safetensors")["W_enc"], leaf.detach().T)
    again: Any = load_sae(tmp_path)
    assert again.W_rows.is_contiguous()
    assert again.leaves()["W_enc"].data_ptr() == again.W_enc.data_ptr()
    assert torch.equal(again.leaves()["W_enc"], leaf)


def test_sparsity_both_ways(tmp_path: Path, complains: Callable[..., Any]) -> None:
    from sae_lens.constants import SPARSITY_FILENAME

    sae = _filled(ARCHITECTURES["standard"](SaeConfig("standard", D_IN, D_SAE)))
    rates = torch.linspace(0, 0.4, D_SAE, dtype=torch.float64)
    save_sae(sae, tmp_path / "a")
    assert read_sparsity(tmp_path / "a") is None
    save_sae(sae, tmp_path / "a", sparsity=(rates + 1e-10).log10())
    # As SAELens reads the file beside a release, and as its trainer writes it.
    on_disk = load_file(tmp_path / "a" / SPARSITY_FILENAME)
    assert list(on_disk) == ["sparsity"]
    found = read_sparsity(tmp_path / "a")
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, on_disk["sparsity"])
    torch.testing.assert_close(10**found, rates.float(), rtol=1e-4, atol=1e-9)
    save_file({"other": found}, tmp_path / "a" / SPARSITY_FILENAME)
    with complains(BadFile, "no one-dimensional tensor named sparsity", at=str(tmp_path / "a")):
        read_sparsity(tmp_path / "a")


@pytest.mark.parametrize("hook_key", ["hook_name", "hook_point"])
def test_old_files_without_architecture(tmp_path: Path, hook_key: str) -> None:
    _write_legacy(
        tmp_path,
        **{hook_key: "blocks.8.hook_resid_pre"},
        model_name="gpt2-small",
        activation_fn_str="relu",
        normalize_activations=False,
        dtype="torch.float32",
    )
    sae = load_sae(tmp_path)
    assert sae.cfg.architecture == "standard"
    assert sae.cfg.apply_b_dec_to_input
    assert sae.cfg.hook_name == "blocks.8.hook_resid_pre"
    assert sae.cfg.metadata["model_name"] == "gpt2-small"


def test_old_files_that_call_topk_an_activation_function(tmp_path: Path) -> None:
    from sae_lens import SAE

    old = {
        "hook_name": "blocks.1.hook_resid_pre",
        "hook_layer": 1,
        "model_name": "gpt2",
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 2},
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "sae_lens_training_version": "4.0.0",
        "dtype": "float32",
        "device": "cpu",
    }
    _write_legacy(tmp_path, **old)
    ours, theirs = load_sae(tmp_path), SAE.load_from_disk(tmp_path)
    assert (ours.encode(X) > 0).sum(1).max() == 2
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(X), theirs.encode(X))


@pytest.mark.parametrize(
    ("values", "kind", "part"),
    [
        ({"architecture": "temporal"}, UnknownName, "'temporal'; valid: abstopk, crosscoder_jumprelu, crosscoder_l1"),
        ({"architecture": "transcoder"}, UnknownName, "gated, jumprelu, matching_pursuit, standard, topk"),
        ({"architecture": ["topk"]}, UnknownName, "valid: abstopk"),
        ({"architecture": "gated"}, BadFile, "has no b_gate; it has: W_dec"),
        ({"normalize_activations": "covariance_whitening"}, IncompatibleSae, "covariance_whitening"),
        ({"architecture": None}, UnknownName, "there is no SAE architecture"),
        ({"k": 21}, BadFile, "0 < k <= d_sae=20. Got 21."),
        ({"k": 0}, BadFile, "Got 0."),
        ({"k": "delete"}, BadFile, "Got None."),
        ({"k": "3"}, BadFile, "Got '3'."),
        ({"d_in": "delete"}, BadFile, "whole numbers d_in and d_sae"),
        ({"d_sae": "20"}, BadFile, "whole numbers d_in and d_sae"),
        ({"d_in": -6}, BadFile, "whole numbers d_in and d_sae"),
        ({"d_in": 7}, IncompatibleSae, "cfg.json asks for"),
        ({"d_sae": 19}, IncompatibleSae, "cfg.json asks for"),
        ({"reshape_activations": "heads"}, IncompatibleSae, "reshape_activations='heads'; supported: none and hook_z"),
        ({"metadata": "hook"}, BadFile, "metadata"),
        ({"metadata": {"prepend_bos": "yes"}}, BadFile, "prepend_bos in cfg.json is 'yes'; expected true or false"),
        ({"prepend_bos": 1}, BadFile, "prepend_bos in cfg.json is 1"),
        ({"d_sae": 10**18}, BadFile, "sizes that no file of weights can have"),
        ({"k": True}, BadFile, "Got True."),
        ({"d_in": 1e30}, BadFile, "Got d_in=1e+30."),
        ({"d_sae": float("inf")}, BadFile, "Got d_sae=inf."),
        ({"apply_b_dec_to_input": "false"}, BadFile, "apply_b_dec_to_input in cfg.json is 'false'; expected true or"),
        ({"activation_fn": "tanh-relu"}, IncompatibleSae, "activation_fn='tanh-relu'; supported: relu, topk."),
        # Compared with the file before anything is allocated: this many would take terabytes.
        ({"d_sae": 40_000_000_000, "k": 2}, IncompatibleSae, "but cfg.json asks for (6, 40000000000)"),
    ],
)
def test_bad_configurations(
    folder: Path, complains: Callable[..., Any], values: dict[str, Any], kind: Any, part: str
) -> None:
    _change(folder, **values)
    with complains(kind, part, at="arms.a.sae"):
        load_sae(folder, at="arms.a.sae")


def test_missing_files(tmp_path: Path, folder: Path, complains: Callable[..., Any]) -> None:
    with complains(NotFound, "there is no folder", at=str(tmp_path / "none")):
        load_sae(tmp_path / "none")
    with complains(ConfigError, "can be no path"):
        load_sae("a" * 5000)
    with complains(NotFound, "holds no cfg.json"):
        load_sae(tmp_path)
    (folder / "sae_weights.safetensors").unlink()
    torch.save({}, folder / "sae_weights.pt")
    with complains(NotFound, "no sae_weights.safetensors", "'sae_weights.pt' there is a pickled file"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ae.pt", ("a pickled file, which can run anybody's code and is never loaded",)),
        ("weights.npz", ("an archive of NumPy arrays, of which only Gemma Scope's params.npz is read",)),
        ("weights.safetensors", ("a file of tensors alone, without the cfg.json",)),
        ("notes", ("'notes' is a file; an SAE is a folder",)),
    ],
)
def test_file_as_folder_is_explained(
    tmp_path: Path, folder: Path, complains: Callable[..., Any], name: str, parts: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(b"x")
    with complains(BadFile, *parts, at="arms.a.sae"):
        load_sae(tmp_path / name, at="arms.a.sae")
    if "." in name:
        with complains(NotFound, "holds no cfg.json", f"{name!r} there is {parts[0]}"):
            load_sae(tmp_path)
    (folder / name).write_bytes(b"x")
    with complains(BadFile, f"give the folder itself: {str(folder)!r}"):
        load_sae(folder / name)


def test_a_folder_of_saes_names_one(tmp_path: Path, folder: Path, complains: Callable[..., Any]) -> None:
    shutil.copytree(folder, tmp_path / "all" / "layer_3")
    with complains(NotFound, "holds no cfg.json, but folders with one, such as 'layer_3'"):
        load_sae(tmp_path / "all")


def test_tensors_of_other_kinds_of_numbers(folder: Path, complains: Callable[..., Any]) -> None:
    path = folder / "sae_weights.safetensors"
    save_file(load_file(path) | {"W_dec": load_file(path)["W_dec"].to(torch.float8_e4m3fn)}, path)
    with complains(BadFile, "W_dec holds F8_E4M3; expected F64 or F32 or F16 or BF16", at=str(folder)):
        load_sae(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"sae"', b"\xff\xfe"])
def test_a_cfg_that_is_none(folder: Path, complains: Callable[..., Any], content: bytes) -> None:
    (folder / "cfg.json").write_bytes(content)
    with complains(BadFile):
        read_sae_config(folder)


@pytest.mark.parametrize("keep", [0, 7, 200, -8])
def test_truncated_weights(folder: Path, complains: Callable[..., Any], keep: int) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with complains(BadFile, "sae_weights.safetensors cannot be read", at=str(folder)):
        load_sae(folder)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_missing_and_broken_tensors(folder: Path, complains: Callable[..., Any], name: str) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    for bad in (float("nan"), float("-inf")):
        broken = {key: t.clone() for key, t in tensors.items()}
        broken[name].view(-1)[1] = bad
        save_file(broken, path)
        with complains(BadFile, f"{name} holds NaN or infinite values", at=str(folder)):
            load_sae(folder)
    save_file({key: t for key, t in tensors.items() if key != name}, path)
    with complains(BadFile, f"has no {name}; it has:", at=str(folder)):
        load_sae(folder)
    save_file(tensors | {name: tensors[name][..., None].contiguous()}, path)
    with complains(IncompatibleSae, f"{name} has shape", at=str(folder)):
        load_sae(folder)


def test_centred_sae_restores_the_mean(tmp_path):
    from saeffect.sae.base import SaeConfig
    from saeffect.sae.standard import StandardSae

    plain = StandardSae(SaeConfig("standard", 4, 8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    save_sae(plain, tmp_path)
    raw = json.loads((tmp_path / "cfg.json").read_text())
    raw["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    (tmp_path / "cfg.json").write_text(json.dumps(raw))
    centred = load_sae(tmp_path)
    x = torch.randn(5, 4, generator=generator) + 3
    mean = x.mean(1, keepdim=True)
    torch.testing.assert_close(centred.encode(x), plain.encode(x - mean))
    torch.testing.assert_close(centred(x), plain(x - mean) + mean)
