"""SAEs that are published as pickled state dicts: converted as weights alone, against SAELens' loaders or a formula."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_cache import HubCache
from published_peers import D, N, X, agree, drawn, first, pt
from saeffect.errors import BadFile, ConfigError, IncompatibleSae, NotFound
from saeffect.sae.convert import convert_sae
from saeffect.sae.formats import load_sae

K = 3
_LINEAR = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N)}
_PLAIN = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}


class RunsCode:
    def __reduce__(self) -> Any:
        return (os.system, ("true",))


def _trainer(name: str, **more: Any) -> bytes:
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "layer": 12, "lm_name": "google/gemma-2-2b"}
    trainer |= {"submodule_name": "resid_post_layer_12", **more}
    return json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}).encode()


# dictionary_learning: name of the class -> its tensors.
_GATED = {"encoder.weight": (N, D), "decoder.weight": (D, N), "decoder_bias": (D,)}
DICTIONARIES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": _LINEAR | {"bias": (D,)},
    "GatedAutoEncoder": _GATED | {"r_mag": (N,), "gate_bias": (N,), "mag_bias": (N,)},
    "AutoEncoderTopK": _LINEAR | {"b_dec": (D,)},
    "BatchTopKSAE": _LINEAR | {"b_dec": (D,), "threshold": ()},
    "MatryoshkaBatchTopKSAE": _PLAIN | {"threshold": ()},
    "JumpReluAutoEncoder": _PLAIN | {"threshold": (N,)},
}


def _dictionary(name: str) -> dict[str, Any]:
    tensors: dict[str, Any] = drawn(DICTIONARIES[name])
    if "TopK" in name:
        tensors["k"] = torch.tensor(K, dtype=torch.int)
    if name == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor([5, 15])
    return tensors


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning(hub: HubCache, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    sae = first("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109", "12.hook_resid_post")
    tensors = _dictionary(name)
    hub.add(sae.repo, f"{sae.path}/ae.pt", pt(tensors))
    more = {"k": K} if "TopK" in name else {}
    hub.add(sae.repo, f"{sae.path}/config.json", _trainer(name, **more))
    ours = agree(sae, monkeypatch)
    assert ours.cfg.metadata["source"] == sae.name
    assert ours.cfg.metadata["model_name"] == "google/gemma-2-2b"


def test_a_dictionary_whose_decoder_has_the_bias(tmp_path: Path) -> None:
    """AutoEncoderNew: the encoder reads inputs as they are."""
    t = drawn(_LINEAR | {"decoder.bias": (D,)})
    (tmp_path / "ae.pt").write_bytes(pt(t))
    ours = load_sae(convert_sae(tmp_path / "ae.pt", tmp_path / "out"))
    acts = (X @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    torch.testing.assert_close(ours.encode(X), acts)
    torch.testing.assert_close(ours(X), acts @ t["decoder.weight"].T + t["decoder.bias"])


@pytest.mark.parametrize(
    ("submodule", "hook"),
    [("attention_out_layer_3", "attn_out"), ("mlp_out_layer_3", "mlp_out"), (None, "resid_post"), ("x", None)],
)
def test_the_trainer_names_the_hook(tmp_path: Path, submodule: str | None, hook: str | None) -> None:
    (tmp_path / "ae.pt").write_bytes(pt(_dictionary("AutoEncoder")))
    (tmp_path / "config.json").write_bytes(_trainer("AutoEncoder", submodule_name=submodule, layer=3))
    cfg = load_sae(convert_sae(tmp_path, tmp_path / "out")).cfg
    assert cfg.hook_name == (hook and f"blocks.3.hook_{hook}")
    assert (cfg.metadata["model_name"], cfg.metadata["context_size"]) == ("google/gemma-2-2b", 128)


def test_qwen_scope(hub: HubCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """TopK with features first in the encoder; k stands in the repository's name."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    sae = first("qwen-scope-3-1.7b-base-w32k-l50")
    n = 64
    tensors = drawn({"W_enc": (n, D), "b_enc": (n,), "W_dec": (D, n), "b_dec": (D,)})
    hub.add(sae.repo, sae.path, pt(tensors))
    monkeypatch.setattr(loaders, "QWEN_SCOPE_MODEL_INFO", {"Qwen3-1.7B-Base": ("Qwen/Qwen3-1.7B-Base", D)})
    monkeypatch.setattr(loaders, "_parse_qwen_scope_repo_id", lambda _: ("Qwen3-1.7B-Base", n, 50))
    ours = agree(sae, monkeypatch)
    assert (ours.cfg.k, ours.cfg.architecture) == (50, "topk")


@pytest.mark.parametrize("release", ["goodfire-llama-3.1-8b-instruct", "deepseek-r1-distill-llama-8b-qresearch"])
def test_single_files_of_weights(hub: HubCache, monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    sae = first(release)
    tensors = drawn(_LINEAR | {"decoder.bias": (D,)})
    if release.startswith("goodfire"):
        tensors = {name.replace(".", "_linear."): tensor for name, tensor in tensors.items()}
    hub.add(sae.repo, sae.path, pt(tensors))
    for name in ("get_goodfire_config_from_hf", "get_deepseek_r1_config_from_hf"):
        original = getattr(loaders, name)
        sized = lambda *a, original=original, **kw: original(*a, **kw) | {"d_in": D, "d_sae": N, "dtype": "float32"}  # noqa: E731
        monkeypatch.setattr(loaders, name, sized)
    assert agree(sae, monkeypatch).cfg.metadata["model_name"] == sae.model


def test_attention_heads(hub: HubCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads lie side by side in the weights; SAELens is given them apart."""
    sae = first("gpt2-small-hook-z-kk")
    hub.add(sae.repo, sae.path, pt(drawn(_PLAIN)))
    settings = {"act_size": D, "dict_size": N, "act_name": "blocks.0.attn.hook_z"}
    hub.add(sae.repo, sae.path.replace(".pt", "_cfg.json"), json.dumps(settings).encode())
    assert agree(sae, monkeypatch).cfg.hook_name == "blocks.0.attn.hook_z"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("topk", [True, False])
def test_openai(tmp_path: Path, tied: bool, topk: bool) -> None:
    """As sparse_autoencoder's Autoencoder: TopK normalises its input, b_dec is taken off after that."""
    t: dict[str, Any] = drawn({"pre_bias": (D,), "latent_bias": (N,), "encoder.weight": (N, D)})
    if not tied:
        t |= drawn({"decoder.weight": (D, N)}, seed=1)
    state = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}} if topk else {}
    (tmp_path / "7.pt").write_bytes(pt({**t, "stats_last_nonzero": torch.zeros(N, dtype=torch.long), **state}))
    ours = load_sae(convert_sae(tmp_path / "7.pt", tmp_path / "out"))
    mean, std = X.mean(1, keepdim=True), X.std(1, keepdim=True)
    x = (X - mean) / (std + 1e-5) if topk else X
    acts = ((x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]).relu()
    if topk:
        acts = acts * (acts >= acts.topk(K).values[:, -1:])
    decoder = t["encoder.weight"] if tied else t["decoder.weight"].T
    out = acts @ decoder + t["pre_bias"]
    torch.testing.assert_close(ours.encode(X), acts)
    torch.testing.assert_close(ours(X), out * std + mean if topk else out)


# What is no SAE, or more than one.


def test_a_small_file_cannot_fill_the_memory(tmp_path: Path, complains: Callable[..., Any]) -> None:
    tensors: dict[str, Any] = dict(drawn(_PLAIN))
    tensors["W_dec"] = torch.zeros(1).expand(10**6, 10**6)  # torch saves the one number
    (tmp_path / "ae.pt").write_bytes(pt(tensors))
    with complains(BadFile, "W_dec claims more numbers than ae.pt holds of it"):
        convert_sae(tmp_path / "ae.pt", tmp_path / "out")
    plain = zipfile.ZipFile(io.BytesIO(pt({"W_dec": torch.zeros(1 << 20)})))
    with zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with complains(BadFile, "ae.pt would take 4,19", "which the file does not hold"):
        convert_sae(tmp_path / "ae.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_is_named_and_not_run(tmp_path: Path, complains: Callable[..., Any]) -> None:
    for name, content in (
        ("ae.pt", pt(_dictionary("AutoEncoder") | {"more": RunsCode()})),
        ("old.pt", pickle.dumps({"W_enc": 1, "more": RunsCode()})),
    ):
        (tmp_path / name).write_bytes(content)
        with complains(
            BadFile, f"{name} holds more than weights: reading it would call {os.name}.system", "do not load"
        ):
            convert_sae(tmp_path / name, tmp_path / "out")
    module = io.BytesIO()
    torch.save(torch.nn.Linear(2, 3), module)
    (tmp_path / "module.pt").write_bytes(module.getvalue())
    with complains(BadFile, "reading it would call torch.nn.modules.linear.Linear", "save its state_dict()"):
        convert_sae(tmp_path / "module.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickle_as_folder_suggests_conversion(tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "ae.pt").write_bytes(pt(_dictionary("AutoEncoder")))
    with complains(BadFile, "can run anybody's code", "convert it: saeffect convert-sae ae.pt --out FOLDER"):
        load_sae(tmp_path / "ae.pt")


@pytest.mark.parametrize(
    ("tensors", "kind", "part"),
    [
        ({"W": (2, 3)}, IncompatibleSae, "holds the tensors of no known SAE: W."),
        (_LINEAR | {"b_dec": (D,), "threshold": ()}, IncompatibleSae, "AutoEncoderTopK or BatchTopKSAE"),
        (_LINEAR | {"b_dec": (D,)}, BadFile, "is a TopK SAE, but nothing says its k"),
        (_LINEAR | {"bias": (D + 1,)}, IncompatibleSae, "b_dec of ae.pt has shape (7,); expected (6,)"),
        ({}, BadFile, "ae.pt holds no state dict, but dict"),
    ],
)
def test_other_tensors(
    tmp_path: Path, complains: Callable[..., Any], tensors: dict[str, Any], kind: Any, part: str
) -> None:
    (tmp_path / "ae.pt").write_bytes(pt(drawn(tensors)))
    with complains(kind, part):
        convert_sae(tmp_path / "ae.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_missing_and_taken(tmp_path: Path, complains: Callable[..., Any]) -> None:
    whole = pt(_dictionary("AutoEncoder"))
    (tmp_path / "ae.pt").write_bytes(whole[:500])
    with complains(BadFile, "ae.pt cannot be read"):
        convert_sae(tmp_path / "ae.pt", tmp_path / "out")
    (tmp_path / "ae.pt").write_bytes(b"hello" * 100)
    with complains(BadFile, "ae.pt cannot be read: torch.save did not write it"):
        convert_sae(tmp_path / "ae.pt", tmp_path / "out")
    with complains(NotFound, "there is no file or folder"):
        convert_sae(tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "ae.pt").write_bytes(pt(_dictionary("AutoEncoder") | {"bias": torch.full((D,), torch.nan)}))
    with complains(BadFile, "b_dec holds NaN"):
        convert_sae(tmp_path / "ae.pt", tmp_path / "out")
    (tmp_path / "ae.pt").write_bytes(whole)
    convert_sae(tmp_path / "ae.pt", tmp_path / "out")
    with complains(ConfigError, "there is an SAE in this folder already"):
        convert_sae(tmp_path / "ae.pt", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in _dictionary("AutoEncoder").items()}
    (tmp_path / "ae.pt").write_bytes(pt(tensors))
    out = convert_sae(tmp_path / "ae.pt", tmp_path / "out")
    assert json.loads((out / "cfg.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert torch.equal(load_sae(out).W_enc, tensors["encoder.weight"].T.float())


def test_any_layout_can_be_rewritten(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes(pt(_dictionary("GatedAutoEncoder")))
    first = convert_sae(tmp_path / "ae.pt", tmp_path / "first")
    again = convert_sae(first, tmp_path / "again")
    assert torch.equal(load_sae(again)(X), load_sae(first)(X))
