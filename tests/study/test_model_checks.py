"""What check and gate say of models and their adapters, on a tiny study."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from saeffect.errors import BadFile, ConfigError, IncompatibleModels, SaeffectError
from saeffect.io import read_json
from saeffect.progress import Log
from saeffect.study.check import check_study
from saeffect.study.run import run_study
from saeffect.study.study import Study
from tiny_study import make_sae, make_study


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose treatment is the base model with an adapter."""
    folder = tmp_path_factory.mktemp("adapted")
    path = make_study(folder, steering=None)
    config = yaml.safe_load(path.read_text())
    base = {"path": "./base", "dtype": "float32"}  # on some processors the default is bfloat16
    config["arms"]["control"]["model"] = base
    config["arms"]["treatment"]["model"] = base | {"adapter": "./adapter"}
    path.write_text(yaml.safe_dump(config))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "study"))


def _check(folder: Path) -> str:
    return "\n".join(check_study(Study.open(folder / "study.yaml")).lines)


def _gate(folder: Path) -> tuple[dict[str, Any], str]:
    lines: list[str] = []
    run_study(Study.open(folder / "study.yaml"), folder / "run", stages=("gate",), log=Log(lines.append))
    return read_json(folder / "run" / "arms" / "treatment" / "gate.json"), "\n".join(lines)


def test_the_gate_measures_the_merge(folder: Path) -> None:
    assert "warning" not in _check(folder)
    measured, said = _gate(folder)
    assert measured["adapter"]["effect"] > 0.1
    assert measured["adapter"]["error"] < 1e-4
    assert measured["same_as_control"] is False
    assert len(measured["probe_logprobs"]) == 16
    assert "arm treatment: its adapter changes logits by up to" in said


def test_an_adapter_without_effect(folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({n: t * 0 if "lora_B" in n else t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    measured, said = _gate(folder)
    assert measured["same_as_control"] is True
    assert "warning: the adapter changes nothing" in said
    assert "warning: it gives the control's probabilities" in said


def test_an_adapter_of_another_base(folder: Path) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/another"}))
    assert "warning: arm treatment: the adapter names 'org/another' as its base model" in _check(folder)
    assert "org/another" in _gate(folder)[1]


def _truncate(adapter: Path) -> None:
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])


def _pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def _rename(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({f"module.{n}": t for n, t in tensors.items()}, adapter / "adapter_model.safetensors")


def _other_kind(adapter: Path) -> None:
    raw = json.loads((adapter / "adapter_config.json").read_text()) | {"peft_type": "PREFIX_TUNING"}
    (adapter / "adapter_config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("damage", "kind"),
    [(_truncate, BadFile), (_pickle, BadFile), (_rename, IncompatibleModels), (_other_kind, ConfigError)],
)
def test_check_opens_adapters(folder: Path, damage: Callable[[Path], None], kind: type[SaeffectError]) -> None:
    damage(folder / "adapter")
    with pytest.raises(kind) as caught:
        _check(folder)
    assert caught.value.at == "study.yaml, arms.treatment.model.adapter"


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        raw = json.loads((base / "config.json").read_text()) | changes
        (base / "config.json").write_text(json.dumps(raw))

    return change


def _prefixed(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({f"module.{n}": t for n, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})


def _pipe(base: Path) -> None:
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_prefixed, "the file lacks"),
        (_pipe, "a pipe or a device"),
        (_config(num_hidden_layers=2), "tensors that the model has no place for"),
        (_config(num_key_value_heads=4), "other shapes than its config.json asks for"),
        (_config(hidden_act="no-such"), "no-such"),
        (_config(model_type="no-such"), "no-such"),
    ],
)
def test_check_accounts_for_the_models_tensors(folder: Path, damage: Callable[[Path], None], part: str) -> None:
    damage(folder / "base")
    with pytest.raises(BadFile, match=part):
        _check(folder)


def test_check_sees_equal_weights(folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "copy")
    config = yaml.safe_load((folder / "study.yaml").read_text())
    config["arms"]["treatment"]["model"] = "./copy"
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    assert "warning: arm treatment: its weights are those of the control" in _check(folder)


def test_a_hook_named_as_a_module(folder: Path) -> None:
    for arm in ("control", "treatment", "placebo"):
        make_sae(folder / "saes" / arm, 0, hook_name="model.layers.1")
    study = Study.open(folder / "study.yaml")
    assert study.hook("control") == "blocks.1.hook_resid_post"
    assert "at blocks.1.hook_resid_post" in _check(folder)


def test_a_study_for_another_machine(folder: Path) -> None:
    path = folder / "study.yaml"
    config = yaml.safe_load(path.read_text())
    config["arms"]["control"]["model"]["device"] = "cuda:99"
    path.write_text(yaml.safe_dump(config))
    said = "warning: arm control: there is no device cuda:99 here: torch finds"
    assert said in _check(folder)
    assert said in check_study(Study.open(path))._repr_html_()
