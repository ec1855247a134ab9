"""SAEs by name: from the list, from any repository, offline, with the hub's cache laid out as the hub does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saeffect as sx
from hub_cache import COMMIT, HubCache
from published_peers import agree, first
from saeffect.errors import BadFile, ConfigError, IncompatibleSae, NotFound, UnknownName, Unreachable
from saeffect.published import find_published, list_source, published_saes
from saeffect.sae import ARCHITECTURES
from saeffect.sae.base import SaeConfig
from saeffect.sae.formats import load_sae, read_sae_config, save_sae
from saeffect.sae.hub import is_sae_name, locate_sae

D, N = 6, 20
X = torch.randn(7, D, generator=torch.Generator().manual_seed(3)) + 2.0
OURS = "me/my-saes"


def _folder(folder: Path, architecture: str = "standard", **options: Any) -> Path:
    sae = ARCHITECTURES[architecture](SaeConfig(architecture, D, N, **options))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(sae.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return save_sae(sae, folder)


def _old_cfg(folder: Path, **cfg: Any) -> Path:
    """cfg.json as before SAELens 6."""
    old = {"d_in": D, "d_sae": N, "dtype": "torch.float32", "device": "cpu", "prepend_bos": True, **cfg}
    (folder / "cfg.json").write_text(json.dumps(old))
    return folder


def test_the_paper_s_sae(hub: HubCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt2-small-res-jb reads centred residuals, which only the list says."""
    sae = find_published("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    source = _old_cfg(_folder(tmp_path / "sae"), hook_point="blocks.8.hook_resid_pre", model_name="gpt2-small")
    hub.add_folder(sae.repo, sae.path, source)
    ours = sx.load_sae(sae.name)
    assert ours.cfg.centre_input and ours.cfg.hook_name == "blocks.8.hook_resid_pre"
    plain = load_sae(source)
    mean = X.mean(1, keepdim=True)
    torch.testing.assert_close(ours.encode(X), plain.encode(X - mean))
    torch.testing.assert_close(ours(X), plain(X - mean) + mean)
    # SAELens leaves the centring to the model that it loads.
    agree(sae, monkeypatch, X - mean)
    folder = locate_sae(sae.name)
    weights = folder / "sae_weights.safetensors"
    assert weights.is_symlink() and weights.resolve().parent.name == "blobs"  # not copied
    # The same by its place: the list says of it what it says by name.
    assert load_sae(f"hf:{sae.repo}/{sae.path}").cfg == ours.cfg


@pytest.mark.parametrize(
    ("release", "cfg"),
    [
        ("gpt2-small-mlp-tm", {"normalize_activations": "expected_average_only_in"}),
        ("mistral-7b-res-wg", {"normalize_activations": "none"}),
        ("gpt2-small-resid-post-v5-32k", {"normalize_activations": "layer_norm", "activation_fn_str": "topk"}),
        ("pythia-70m-deduped-res-sm", {"normalize_activations": None}),
        ("gemma-2b-res-jb", {"normalize_activations": "none"}),
    ],
)
def test_releases_in_saelens_layout(
    hub: HubCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, cfg: dict[str, Any]
) -> None:
    sae = first(release)
    if "activation_fn_str" in cfg:
        cfg = {**cfg, "activation_fn_kwargs": {"k": 3}}
    source = _old_cfg(_folder(tmp_path / "sae"), hook_name=sae.hook, model_name="m", **cfg)
    hub.add_folder(sae.repo, sae.path, source)
    x = X - X.mean(1, keepdim=True)  # some read centred activations, which SAELens leaves to the model
    ours = agree(sae, monkeypatch, x)
    if sae.scale:  # folded in, as by hand
        plain = load_sae(source)
        torch.testing.assert_close(ours.encode(x), plain.encode(x * sae.scale), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours(x), plain(x * sae.scale) / sae.scale, rtol=1e-4, atol=1e-3)
    if release.startswith("mistral"):
        assert ours.cfg.normalize_activations == "constant_norm_rescale"


def test_a_repository_of_one_s_own(hub: HubCache, tmp_path: Path) -> None:
    source = _folder(tmp_path / "sae", "jumprelu", metadata={"hook_name": "blocks.1.hook_resid_pre"})
    place = hub.add_folder(OURS, "a/layer_1", source)
    assert locate_sae(f"hf:{OURS}/a/layer_1") == place  # read where the hub's client keeps it
    for name in (f"hf:{OURS}/a/layer_1", f"hf:{OURS}@main/a/layer_1/", f"hf:{OURS}@{COMMIT}/a/layer_1"):
        assert torch.equal(load_sae(name)(X), load_sae(source)(X))
    assert read_sae_config(f"hf:{OURS}/a/layer_1").hook_name == "blocks.1.hook_resid_pre"
    hub.add_folder("me/one", ".", source)
    assert load_sae("hf:me/one").cfg.d_sae == N


def test_sparsify_s_repositories(hub: HubCache, tmp_path: Path) -> None:
    tensors = load_file(_folder(tmp_path / "sae", "topk", k=3) / "sae_weights.safetensors")
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    folder = tmp_path / "layers.3"
    folder.mkdir()
    saved = {names[name]: (t.T if name == "W_enc" else t).contiguous() for name, t in tensors.items()}
    save_file(saved, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": 3, "expansion_factor": 32}))
    hub.add_folder("EleutherAI/sae-pythia-70m-32k", "layers.3", folder)
    run = {"model": "EleutherAI/pythia-70m", "ctx_len": 2048, "sae": {"k": 3}}
    hub.add("EleutherAI/sae-pythia-70m-32k", "config.json", json.dumps(run).encode())
    ours = load_sae("hf:EleutherAI/sae-pythia-70m-32k/layers.3")
    assert ours.cfg.hook_name == "blocks.3.hook_resid_post"
    assert (ours.cfg.metadata["model_name"], ours.cfg.metadata["context_size"]) == ("EleutherAI/pythia-70m", 2048)
    torch.testing.assert_close(ours(X), load_sae(tmp_path / "sae")(X))


def test_a_checkpoint_comes_with_its_scaling(
    hub: HubCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    """Without the file beside it, SAELens' checkpoint would be read unscaled."""
    import huggingface_hub

    asked: list[str] = []
    original = huggingface_hub.snapshot_download

    def download(repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.extend(allow_patterns)
        return str(original(repo, allow_patterns=allow_patterns, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = _folder(tmp_path / "sae")
    (source / "activation_scaler.json").write_text('{"scaling_factor": 2.5}')
    hub.add_folder(OURS, "a", source)
    (source / "activation_scaler.json").unlink()
    torch.testing.assert_close(load_sae(f"hf:{OURS}/a")(X), load_sae(source)(X * 2.5) / 2.5)
    assert {"a/activation_scaler.json", "a/activation_whitening.safetensors"} <= set(asked)
    hub.add(OURS, "b/activation_scaler.json", b"{}")
    with complains(Unreachable, "without an SAE in the folder 'b'"):
        load_sae(f"hf:{OURS}/b")


def test_a_study_names_its_saes(hub: HubCache, tmp_path: Path) -> None:
    from saeffect.paths import resolve_paths

    name = "saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre"
    arms = {"control": {"sae": name, "more_saes": [f"hf:{OURS}/b"]}, "training": {"init_from": name}}
    assert resolve_paths(arms, tmp_path, at="study.yaml") == arms
    assert is_sae_name(name) and is_sae_name(f"hf:{OURS}/b") and not is_sae_name("bundled:x")


# What is not there.


def test_offline(hub: HubCache, complains: Callable[..., Any], tmp_path: Path) -> None:
    name = "saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre"
    with complains(Unreachable, f"{name} is not in the hub's cache", "HF_HUB_OFFLINE is set", at="arms.a.sae"):
        load_sae(name, at="arms.a.sae")
    hub.add_folder("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.7.hook_resid_pre", _folder(tmp_path / "sae"))
    with complains(Unreachable, "without an SAE in the folder 'blocks.8.hook_resid_pre'"):
        load_sae(name)
    with complains(Unreachable, "is not in the hub's cache"):
        load_sae("hf:nobody/nothing/x")
    with complains(Unreachable, "is not in the hub's cache"):
        load_sae(first("goodfire-llama-3.1-8b-instruct").name)


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pr", UnknownName, "similar: blocks.8.hook_resid_pre"),
        ("saelens:gpt2-small-res-jb", UnknownName, "saeffect saes --release gpt2-small-res-jb"),
        ("saelens:gpt2-small-res-bj/blocks.8.hook_resid_pre", UnknownName, "among 170; similar: gpt2-small-res-jb"),
        ("saelens:me/mine", UnknownName, "write hf:me/mine."),
        ("hf:mine", ConfigError, "names no SAE on the hub"),
        ("hf:me/mine/../x", ConfigError, "names no SAE on the hub"),
        ("saelens:gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76", IncompatibleSae, "is a transcoder"),
        ("saelens:temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", IncompatibleSae, "temporal SAE"),
    ],
)
def test_wrong_names(hub: HubCache, complains: Callable[..., Any], name: str, kind: Any, part: str) -> None:
    with complains(kind, part, at="arms.a.sae"):
        load_sae(name, at="arms.a.sae")


@pytest.mark.parametrize(
    ("error", "kind", "part"),
    [
        ("RepositoryNotFoundError", NotFound, "the hub has no repository 'me/mine' that you can read"),
        ("GatedRepoError", NotFound, "accept them at https://huggingface.co/me/mine, then log in"),
        ("RevisionNotFoundError", NotFound, "me/mine has no revision 'v2'"),
        ("HfHubHTTPError", Unreachable, "could not be fetched: asked in vain"),
    ],
)
def test_what_the_hub_answers(
    hub: HubCache,
    monkeypatch: pytest.MonkeyPatch,
    complains: Callable[..., Any],
    error: str,
    kind: Any,
    part: str,
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_: Any, **__: Any) -> str:
        raised: Exception = getattr(errors, error).__new__(getattr(errors, error))
        raised.args = ("asked in vain",)
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with complains(kind, part):
        load_sae("hf:me/mine@v2/x")


def test_a_folder_without_an_sae_lists_those_with_one(
    hub: HubCache, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any], tmp_path: Path
) -> None:
    from huggingface_hub import HfApi, constants

    hub.add_folder(OURS, "a", _folder(tmp_path / "sae"))
    snapshot = hub.home / "models--me--my-saes" / "snapshots" / COMMIT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr(
        HfApi, "list_repo_files", lambda *_, **__: ["a/sae_weights.safetensors", "b/params.npz", "x.md"]
    )
    with complains(NotFound, "me/my-saes has no SAE in the folder 'c'. It has: a, b."):
        load_sae(f"hf:{OURS}/c")


def test_a_damaged_cfg_in_the_cache(hub: HubCache, tmp_path: Path, complains: Callable[..., Any]) -> None:
    sae = first("gpt2-small-res-jb")
    source = _folder(tmp_path / "sae")
    (source / "cfg.json").write_text("[]")
    hub.add_folder(sae.repo, sae.path, source)
    with complains(BadFile, "cfg.json holds no mapping"):
        load_sae(sae.name)


# The list.


def test_the_list_is_saelens_own() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    theirs = get_pretrained_saes_directory()
    ours = published_saes()
    assert "MIT" in list_source()
    assert len(ours) == sum(len(release.saes_map) for release in theirs.values()) > 10_000
    for sae in ours[::50]:
        release = theirs[sae.release]
        assert (sae.repo, sae.path) == (release.repo_id, release.saes_map[sae.id])
        assert (sae.l0, sae.scale or None) == (release.expected_l0[sae.id], release.norm_scaling_factor.get(sae.id))
        assert (sae.neuronpedia_id or None) == release.neuronpedia_id[sae.id]
        assert sae.overrides == (release.config_overrides or {})


def test_the_list_by_model_release_and_block() -> None:
    found = published_saes("google/gemma-2-2b", release="gemma-scope-2b-pt-res-canonical", layer=12)
    assert {sae.model for sae in found} == {"google/gemma-2-2b"} and len(found) > 3
    assert all(sae.hook == "blocks.12.hook_resid_post" for sae in found)
    assert published_saes("GPT2") == published_saes("openai-community/gpt2") != []
    assert all(sae.hook for sae in published_saes(readable=True))
    assert not any("transcoder" in sae.release for sae in published_saes(readable=True))


def test_unknown_models_and_releases(complains: Callable[..., Any]) -> None:
    with complains(UnknownName, "there is no published SAE of a model 'gemma-2-2c' among 38; similar: ", "gemma-2-2b"):
        published_saes("gemma-2-2c")
    with complains(UnknownName, "there is no release of SAEs 'x'"):
        published_saes(release="x")


def test_loading_by_name_does_not_import_sae_lens() -> None:
    code = (
        "import sys; from saeffect.published import published_saes; from saeffect.sae import hub, convert;"
        "published_saes(); assert not {'sae_lens', 'transformer_lens', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
