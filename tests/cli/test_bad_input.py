"""Every mistake of point six, typed by a user: the error's form, exit code 2, and an untouched run directory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from command_line import call
from tiny_study import make_model, make_sae, make_study

Change = Callable[[Path, dict[str, Any]], None]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def template(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make_study(folder, steering=None)
    shutil.copytree(tiny_run / "run", folder / "run")
    return folder


@pytest.fixture
def study(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "s")
    return tmp_path / "s"


def _set(*keys: str, to: Any) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config.setdefault(key, {})
        config[keys[-1]] = to

    return change


def _weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        path = folder / "saes" / "treatment" / "sae_weights.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def _truncate(*parts: str) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        path = folder.joinpath(*parts)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def _file(name: str, data: bytes, *keys: str) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        (folder / name).write_bytes(data)
        _set(*keys, to=f"./{name}")(folder, config)

    return change


def _wide_sae(folder: Path, config: dict[str, Any]) -> None:
    make_sae(folder / "saes" / "wide", 0, d_in=48)
    config["arms"]["treatment"]["sae"] = "./saes/wide"


def _other_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    make_model(folder / "foreign", 3, extra=["entirely different words zebra quagga okapi"] * 50)
    config["arms"]["treatment"]["model"] = "./foreign"


def _nan_model(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "tuned" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def _pickled_model(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tuned" / "model.safetensors").unlink()
    torch.save({}, folder / "tuned" / "pytorch_model.bin")


def _other_hook_in_sae(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "saes" / "control" / "cfg.json"
    raw = json.loads(path.read_text())
    raw["metadata"]["hook_name"] = "blocks.2.hook_resid_pre"
    path.write_text(json.dumps(raw))
    config["arms"]["control"]["hook"] = "blocks.1.hook_resid_pre"


def _no_answer(folder: Path, config: dict[str, Any]) -> None:
    lines = ["feature,arm,rater,verdict,label,note", "0,control,ann,perhaps,,"]
    (folder / "verdicts.csv").write_text("\n".join(lines))
    config["selection"]["verdicts"] = "./verdicts.csv"


CASES: dict[str, tuple[Change, str, str]] = {
    "unknown hub id": (
        _set("arms", "treatment", "model", to="nobody/no-such-model"),
        "NotFound",
        "no-such-model",
    ),
    "missing model folder": (_set("arms", "treatment", "model", to="./nowhere"), "NotFound", "nowhere"),
    "missing SAE folder": (_set("arms", "treatment", "sae", to="./nowhere"), "NotFound", "nowhere"),
    "unknown bundled SAE": (
        _set("arms", "treatment", "sae", to="bundled:smolm2-control"),
        "UnknownName",
        "bundled:",
    ),
    "hook beyond the model": (
        _set("arms", "treatment", "hook", to="blocks.7.hook_resid_pre"),
        "",
        "blocks.7",
    ),
    "hook of no kind": (_set("arms", "control", "hook", to="blocks.1.hook_resid_prr"), "", "hook"),
    "hook contradicts the SAE": (_other_hook_in_sae, "IncompatibleSae", "blocks.2"),
    "SAE of another width": (_wide_sae, "IncompatibleSae", "d_in=48"),
    "NaN in the SAE": (_weights(lambda t: t["W_dec"].__setitem__((0, 0), float("nan"))), "BadFile", "W_dec"),
    "NaN in the model": (_nan_model, "BadFile", "NaN"),
    "tensor missing": (_weights(lambda t: t.pop("b_enc")), "BadFile", "b_enc"),
    "truncated SAE": (_truncate("saes", "treatment", "sae_weights.safetensors"), "BadFile", "sae_weights"),
    "truncated model": (_truncate("tuned", "model.safetensors"), "BadFile", "tuned"),
    "pickled model": (_pickled_model, "", "tuned"),
    "vocabulary in UTF-16": (
        _file("v.txt", "cancer\n".encode("utf-16"), "selection", "vocabulary"),
        "BadFile",
        "UTF-8",
    ),
    "empty vocabulary": (
        _file("v.txt", b"# nothing\n", "selection", "vocabulary"),
        "EmptySelection",
        "v.txt",
    ),
    "no word that is a token": (
        _file("v.txt", b"xylophone\n", "selection", "vocabulary"),
        "EmptySelection",
        "xylophone",
    ),
    "no domain features": (_set("selection", "min_matches", to=10), "EmptySelection", "min_matches"),
    "another tokenizer": (_other_tokenizer, "IncompatibleModels", "tokenizer"),
    "verdict of no kind": (_no_answer, "", "perhaps"),
    "unknown key": (_set("selection", "min_match", to=3), "UnknownName", "min_matches"),
    "two controls": (_set("arms", "treatment", "role", to="control"), "ConfigError", "one control"),
    "text is missing": (
        _set("text", "sources", to=[{"name": "domain", "path": "./no.jsonl"}]),
        "NotFound",
        "no.jsonl",
    ),
    "a push of no length": (_set("push", to={"doses": [0.0]}), "ConfigError", "a push is longer than 0, not 0"),
    "a push without end": (_set("push", to={"doses": [float("inf")]}), "ConfigError", "push.doses.0"),
    "a push without doses": (_set("push", to={"doses": []}), "ConfigError", "push.doses"),
    "a push twice": (_set("push", to={"doses": [1, 1.0]}), "ConfigError", "the number in doses 1.0 is there twice"),
    "a dose twice": (_set("steering", to={"doses": [0.3, 0.3], "search_prompts": ["A"]}), "ConfigError", "doses"),
    "a negative dose": (_set("steering", to={"doses": [-1.0]}), "ConfigError", "doses"),
    "a test prompt searched on": (
        _set("steering", to={"prompts": ["One two"], "search_prompts": ["one  TWO"]}),
        "ConfigError",
        "one two",
    ),
    "no such operator": (_set("steering", to={"operator": "clampp"}), "UnknownName", "valid: ablate, add, clamp"),
    "no such placebo": (_set("steering", to={"placebos": ["matchd"]}), "UnknownName", "valid: matched, random"),
    "no such outcome": (_set("steering", to={"outcomes": ["off_lst"]}), "UnknownName", "off_list"),
    "doses for an ablation": (_set("steering", to={"operator": "ablate", "doses": [2.0]}), "ConfigError", "no doses"),
    "a name that is a path": (_set("name", to="../evil"), "ConfigError", "evil"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_explained_and_change_nothing(case: str, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, kind, mention = CASES[case]
    config = yaml.safe_load((study / "study.yaml").read_text())
    change(study, config)
    (study / "study.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before = tree(study / "run")
    capsys.readouterr()
    code = call(["run", str(study / "study.yaml"), "--out", str(study / "run")])
    message = capsys.readouterr().err
    assert code == 2, message
    assert "Traceback" not in message
    error = message[message.index(kind + ":") if kind else 0 :]
    assert mention in error
    assert "\n  at:  " in error
    assert tree(study / "run") == before


def test_nothing_is_made_where_nothing_was(study: Path) -> None:
    config = yaml.safe_load((study / "study.yaml").read_text())
    config["arms"]["treatment"]["sae"] = "./nowhere"
    (study / "study.yaml").write_text(yaml.safe_dump(config))
    assert call(["run", str(study / "study.yaml"), "--out", str(study / "fresh")]) == 2
    assert not (study / "fresh").exists()


@pytest.mark.parametrize("text", ["{", "- a\n- b\n", ""])
def test_a_study_that_is_no_mapping(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.yaml").write_text(text)
    assert call(["check", str(tmp_path / "s.yaml")]) == 2
    assert "BadFile" in capsys.readouterr().err


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["chek"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_check_computes_nothing_and_shows_the_design(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(study)
    assert call(["check", str(study / "study.yaml"), "--out", str(study / "new")]) == 0
    out = capsys.readouterr().out
    assert "design check" in out
    assert tree(study) == before
