"""An adapter is used whole or refused: nothing of it is dropped, and merging changes nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, IncompatibleModels, UnknownName
from saeffect.lm import adapters
from saeffect.lm.adapters import AdapterFile, read_adapter, require_fit
from saeffect.lm.language_model import LanguageModel, probe_logits
from saeffect.lm.loading import load_language_model

AT = "arms.a.model"
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
MERGED = {
    "lora": peft.LoraConfig(r=2, bias="all", **TARGETS),
    "dora": peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "saved": peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "loha": peft.LoHaConfig(r=2, **TARGETS),
    "lokr": peft.LoKrConfig(r=2, **TARGETS),
    "vera": peft.VeraConfig(r=2, **TARGETS),
    "norms": peft.LNTuningConfig(task_type="CAUSAL_LM"),
}


def _adapter(model: Any, out: Path, config: Any) -> Any:
    """An adapter with random weights, saved to `out`; the adapted model."""
    adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(out)
    return adapted


def _load(base: Path, adapter: Path) -> LanguageModel:
    return load_language_model(ModelConfig(path=str(base), adapter=str(adapter), dtype="float32", device="cpu"), at=AT)


@pytest.fixture
def saved(tiny_llama: LanguageModel, tmp_path: Path) -> Path:
    """A LoRA adapter of the tiny Llama, which a test may break."""
    _adapter(tiny_llama.model, tmp_path / "adapter", MERGED["lora"])
    return tmp_path / "adapter"


def _rename(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def _configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", MERGED)
def test_merged_as_peft_runs_it(tiny_llama: LanguageModel, tiny_llama_folder: Path, tmp_path: Path, kind: str) -> None:
    adapted = _adapter(tiny_llama.model, tmp_path / kind, MERGED[kind])
    lm = _load(tiny_llama_folder, tmp_path / kind)
    torch.testing.assert_close(probe_logits(lm.model), probe_logits(adapted), rtol=1e-4, atol=1e-4)
    effect = (probe_logits(adapted) - probe_logits(tiny_llama.model)).abs().max()
    assert lm.adapter is not None
    assert lm.adapter.effect == pytest.approx(float(effect), rel=1e-3)
    assert lm.adapter.error < 1e-4


def test_projections_of_vera_are_those_of_the_file(
    tiny_llama: LanguageModel, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    _adapter(tiny_llama.model, tmp_path, MERGED["vera"])
    _rename(tmp_path, lambda t: t | {"base_model.vera_A": 2 * t["base_model.vera_A"]})
    try:
        lm = _load(tiny_llama_folder, tmp_path)
    except IncompatibleModels as error:  # PEFT draws them from the seed in its configuration
        assert "base_model.vera_A has other values in the model" in str(error)
        assert Version(peft.__version__) < Version("0.21")
    else:
        expected = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_llama.model), tmp_path).eval()
        torch.testing.assert_close(probe_logits(lm.model), probe_logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_are_untied(tiny_gpt2: LanguageModel, tmp_path: Path, targets: list[str]) -> None:
    names = {"embed_tokens": "wte", "lm_head": "lm_head"}
    tiny_gpt2.model.save_pretrained(tmp_path / "base")
    tiny_gpt2.tokenizer.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=[names[one] for one in targets], task_type="CAUSAL_LM")
    adapted = _adapter(tiny_gpt2.model, tmp_path / "adapter", config)
    lm = _load(tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(probe_logits(lm.model), probe_logits(adapted), rtol=1e-4, atol=1e-4)
    # Running it ties nothing again.
    assert lm.model.get_input_embeddings().weight is not lm.model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: {n.replace("model.model", "model._orig_mod.model"): x for n, x in t.items()}, "find no place"),
        (lambda t: t | {"base_model.model.score.weight": torch.ones(2)}, "1 of its 13 tensors find no place"),
        (lambda t: dict(list(t.items())[1:]), "lacks 1 tensors"),
        (
            lambda t: {n: x[..., :1].contiguous() if n.endswith("lora_B.weight") else x for n, x in t.items()},
            "has shape",
        ),
    ],
    ids=["wrapped", "more", "fewer", "narrower"],
)
def test_tensors_without_a_place(
    tiny_llama_folder: Path, saved: Path, complains: Callable[..., Any], change: Any, part: str
) -> None:
    _rename(saved, change)
    with complains(IncompatibleModels, part, at=f"{AT}.adapter"):
        _load(tiny_llama_folder, saved)


def test_a_value_lost_on_the_way(
    tiny_llama_folder: Path, saved: Path, complains: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = adapters._adapter_tensors
    monkeypatch.setattr(adapters, "_adapter_tensors", lambda adapted: {n: t + 1 for n, t in real(adapted).items()})
    with complains(IncompatibleModels, "has other values in the model", at=f"{AT}.adapter"):
        _load(tiny_llama_folder, saved)


def test_a_merge_that_changes_the_model(
    tiny_llama_folder: Path, saved: Path, complains: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def halve(self: Any) -> Any:
        model = self.unload()
        model.lm_head.weight.data /= 2
        return model

    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", halve)
    with complains(ConfigError, "gives another model: logits differ by up to", at=f"{AT}.adapter"):
        _load(tiny_llama_folder, saved)


def test_embeddings_of_another_size(
    tiny_llama: LanguageModel, tiny_llama_folder: Path, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    larger = copy.deepcopy(tiny_llama.model)
    larger.resize_token_embeddings(322, mean_resizing=False)
    _adapter(larger, tmp_path / "a", peft.LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"], **TARGETS))
    with complains(IncompatibleModels, "trained with 322 tokens, the base has 320 rows", "save the whole model"):
        _load(tiny_llama_folder, tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "kind", "part"),
    [
        ({"peft_type": "PROMPT_TUNING"}, ConfigError, "PROMPT_TUNING cannot be merged"),
        ({"peft_type": "POLY"}, ConfigError, "POLY cannot be merged"),
        ({"peft_type": "LORE"}, UnknownName, "LORA"),
        ({"peft_type": None}, BadFile, "names no peft_type"),
        ({"layer_replication": [[0, 3]]}, ConfigError, "layer_replication"),
        ({"r": 10**7}, BadFile, "r: 10000000"),
        ({"rank_pattern": {"q_proj": 10**7}}, BadFile, "r: 10000000"),
        ({"r": "many"}, BadFile, "r: many"),
        ({"lora_alpha": math.inf}, BadFile, "lora_alpha: inf; expected a number"),
        ({"lora_alpha": "16"}, BadFile, "lora_alpha: 16; expected a number"),
        ({"alpha_pattern": {"q_proj": math.nan}}, BadFile, "lora_alpha: nan"),
        ({"alora_invocation_tokens": [1, 2]}, ConfigError, "aLoRA cannot be merged"),
    ],
)
def test_kinds_and_sizes_that_are_refused_unloaded(
    saved: Path, complains: Callable[..., Any], changes: dict[str, Any], kind: Any, part: str
) -> None:
    _configure(saved, **changes)
    with complains(kind, part, at="here"):
        read_adapter(saved, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(saved: Path, complains: Callable[..., Any], value: float) -> None:
    _rename(saved, lambda tensors: {name: tensor.fill_(value) for name, tensor in tensors.items()})
    with complains(BadFile, "the adapter holds NaN or infinite values (first in base_model.", at="here"):
        read_adapter(saved, "here")


@pytest.mark.parametrize(
    ("changes", "kind", "part"),
    [
        ({"target_modules": "(q_proj"}, IncompatibleModels, "missing )"),
        ({"lora_alpha": 1e300}, BadFile, "the model's logits are NaN or infinite"),
    ],
)
def test_settings_that_only_loading_shows(
    tiny_llama_folder: Path, saved: Path, complains: Callable[..., Any], changes: dict[str, Any], kind: Any, part: str
) -> None:
    _configure(saved, **changes)
    with complains(kind, part, at=f"{AT}.adapter"):
        _load(tiny_llama_folder, saved)


def test_rank_must_be_that_of_the_tensors(
    tiny_llama: LanguageModel, saved: Path, complains: Callable[..., Any]
) -> None:
    _configure(saved, r=3)
    with complains(IncompatibleModels, "lora_A.weight has shape [2, 48] in the adapter and [3, 48]", at="here"):
        require_fit(read_adapter(saved, "here"), tiny_llama.model.config, "here")


@pytest.mark.parametrize(
    ("named", "model", "same"),
    [
        ("org/Model-7B", "/models/model-7b/", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "bundled:smollm2-135m-instruct", True),
        ("org/other", "org/model-7b", False),
        (None, "org/model-7b", True),
        ("", "org/model-7b", True),
    ],
)
def test_the_base_that_an_adapter_names(named: str | None, model: str, same: bool) -> None:
    line = AdapterFile(Path(), {"base_model_name_or_path": named}, {}).other_base(model)
    assert (line is None) == same
    assert same or "org/other" in str(line)
