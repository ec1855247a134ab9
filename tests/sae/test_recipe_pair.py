"""Recipes of two models: crosscoders, and SAEs of the difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saeffect.errors import BadFile, ConfigError, IncompatibleSae
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.crosscoder import JumpReluCrosscoderSae
from saeffect.sae.formats import load_sae
from saeffect.sae.training.config import SaeRecipe
from saeffect.sae.training.recipe import harvest_from_recipe, train_from_recipe
from saeffect.study.study import require_width

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def keys(
    tiny_llama: LanguageModel,
    tiny_llama_folder: Path,
    random_model: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pair")
    model = random_model(tiny_llama.model.config)
    model.load_state_dict(tiny_llama.model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(folder / "tuned")
    tiny_llama.tokenizer.save_pretrained(folder / "tuned")
    with (folder / "text.jsonl").open("w") as file:
        for i in range(150):
            file.write(
                json.dumps({"text": f"The {('nurse', 'train', 'river')[i % 3]} number {i} and the town."}) + "\n"
            )
    return {
        "model": {"path": str(tiny_llama_folder), "dtype": "float32"},
        "tuned": {"path": str(folder / "tuned"), "dtype": "float32"},
        "hook": HOOK,
        "text": [{"name": "general", "path": str(folder / "text.jsonl")}],
        "tokens": 1024,
        "held_out_tokens": 256,
        "held_out": 0.2,
        "context_size": 16,
        "ce_rows": 4,
        "evaluation_rows": 2,
        "evaluation_tokens": 64,
        "dtype": "float32",
        "sae": {
            "architecture": "crosscoder",
            "d_sae": 48,
            "k": 4,
            "epochs": 3,
            "batch_size": 64,
            "learning_rate": 0.01,
        },
    }


@pytest.fixture(scope="module")
def work(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of these harvest to."""
    return tmp_path_factory.mktemp("work")


def _recipe(keys: dict[str, Any], sae: dict[str, Any] | None = None, **changes: Any) -> SaeRecipe:
    return SaeRecipe.read({**keys, "sae": keys["sae"] | (sae or {}), **changes}, at="recipe.yaml")


def test_a_crosscoder(keys: dict[str, Any], work: Path, tmp_path: Path) -> None:
    recipe = _recipe(keys)
    folders = harvest_from_recipe(recipe, work=work)
    assert len(set(folders)) == 4
    measured = train_from_recipe(recipe, tmp_path / "sae", work=work)
    sae = load_sae(tmp_path / "sae")
    assert isinstance(sae, JumpReluCrosscoderSae) and sae.cfg.d_in == 64
    assert sae.cfg.metadata["reads"] == "both" and sae.cfg.metadata["tuned_name"] == keys["tuned"]["path"]
    assert 0.3 < measured["explained_variance"] < 1
    assert 0.3 < measured["explained_variance_base"] < 1 and 0.3 < measured["explained_variance_tuned"] < 1
    assert 0 < abs(measured["ce_sae"] - measured["ce_clean"]) < 0.3, "random models predict nothing"
    card = (tmp_path / "sae" / "README.md").read_text()
    assert card.startswith(f"# BatchTopK crosscoder for tiny-llama and tuned at {HOOK}")
    assert f"| explained variance, tuned model | {measured['explained_variance_tuned']:.4f} |" in card
    assert train_from_recipe(recipe, tmp_path / "sae", work=work) == measured
    warm = _recipe(keys, {"architecture": "crosscoder_l1", "init_from": str(tmp_path / "sae"), "k": 32})
    train_from_recipe(warm, tmp_path / "warm", work=work)


def test_the_difference(keys: dict[str, Any], work: Path, tmp_path: Path, complains: Callable[..., Any]) -> None:
    recipe = _recipe(keys, {"architecture": "batchtopk"})
    measured = train_from_recipe(recipe, tmp_path / "sae", work=work)
    sae = load_sae(tmp_path / "sae")
    assert sae.cfg.d_in == 32 and sae.cfg.metadata["reads"] == "difference"
    assert "explained_variance_base" not in measured
    assert measured["explained_variance"] > 0.2
    # The base model's activations plus the rebuilt difference are closer to the tuned model's than zeros are.
    assert measured["ce_sae"] < measured["ce_zero"]
    with complains(IncompatibleSae, "activations of two models; an arm has one", at="arms.control.sae"):
        require_width(sae.cfg, 32, HOOK, "tiny", at="arms.control.sae")
    assert "minus those of" in (tmp_path / "sae" / "README.md").read_text().splitlines()[0]


def test_streamed(keys: dict[str, Any], tmp_path: Path) -> None:
    recipe = _recipe(keys, {"steps": 20}, activations="streamed", pool_rows=16, tokens=None)
    train_from_recipe(recipe, tmp_path / "sae", work=tmp_path / "work")
    assert load_sae(tmp_path / "sae").cfg.metadata["reads"] == "both"
    assert len(list((tmp_path / "work").iterdir())) == 2, "only the held-out activations are kept"


def test_a_stopped_training_goes_on_to_the_same_weights(
    keys: dict[str, Any], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(keys, {"checkpoint_every": 5})
    train_from_recipe(recipe, tmp_path / "whole", work=work)
    from saeffect.sae.training import train as training

    real, seen = training.SaeRun.record, []

    def stop_at_12(self: Any, log: Any, step: int, *rest: Any) -> None:
        real(self, log, step, *rest)
        seen.append(step)
        if step == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.SaeRun, "record", stop_at_12)
        with pytest.raises(Exception, match="stopped"):
            train_from_recipe(recipe, tmp_path / "parts", work=work)
    assert not (tmp_path / "parts" / "sae_weights.safetensors").exists()
    train_from_recipe(recipe, tmp_path / "parts", work=work)
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_mistakes(keys: dict[str, Any], tmp_path: Path, complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "a crosscoder reads two models", at="tuned"):
        _recipe(keys, tuned=None)
    with complains(ConfigError, "cannot share activations"):
        _recipe(keys, saes={"a": {}, "b": {"architecture": "topk"}})
    with complains(ConfigError, "rescale_acts_by_decoder_norm is a setting of topk"):
        _recipe(keys, {"rescale_acts_by_decoder_norm": True})
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    with complains(BadFile, "d_in and d_sae"):
        train_from_recipe(_recipe(keys, {"init_from": str(tmp_path / "sae")}), tmp_path / "out", work=tmp_path / "work")
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()
