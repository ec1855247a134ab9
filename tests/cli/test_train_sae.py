"""`saeffect train-sae` and `harvest` as typed: what they leave, what they refuse, Ctrl-C, and the second call."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from command_line import call
from hub_cache import HubCache
from processes import Forked, command
from saeffect.io import hash_file
from saeffect.published import find_published
from saeffect.sae.base import SaeConfig
from saeffect.sae.formats import load_sae, save_sae
from saeffect.sae.standard import StandardSae
from saeffect.sae.training import run as training_run
from saeffect.sae.training.config import SaeTrainingConfig, recipe_keys
from saeffect.sae.training.log import read_metrics
from tiny_study import HOOK, make_model, make_study, sentences


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


RECIPE: dict[str, Any] = {
    "model": {"path": "./model", "dtype": "float32"},
    "hook": HOOK,
    "text": [{"name": "general", "path": "./text.txt", "licence": "CC0-1.0"}],
    "tokens": 4096,
    "held_out_tokens": 256,
    "held_out": 0.2,
    "context_size": 16,
    "ce_rows": 2,
    "evaluation_rows": 2,
    "evaluation_tokens": 64,
    "sae": {"d_sae": 64, "k": 4, "epochs": 1, "batch_size": 64, "metrics_every": 5, "evaluate_every": 20},
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", 0)
    (folder / "text.txt").write_text("\n\n".join(sentences(1200)), encoding="utf-8")
    (folder / "short.txt").write_text("The doctor said it.", encoding="utf-8")
    return folder


def write(workshop: Path, folder: Path, **changes: Any) -> Path:
    """A recipe whose `sae` takes the key `sae`, everything else replaced at the top."""
    values = {**RECIPE, **changes, "sae": {**RECIPE["sae"], **changes.get("sae", {})}}
    values["model"] = (
        {"path": str(workshop / "model"), "dtype": "float32"} if "model" not in changes else values["model"]
    )
    if not isinstance(values["text"], list) or "text" not in changes:
        values["text"] = [{**RECIPE["text"][0], "path": str(workshop / changes.get("text", "text.txt"))}]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def saeffect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line in this process: a process of its own takes four seconds to start."""

    def run(*arguments: str, cwd: Path) -> Done:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        return Done(call(arguments), *capsys.readouterr())

    return run


def test_from_a_recipe_to_an_sae_and_again(workshop: Path, tmp_path: Path, saeffect: Callable[..., Done]) -> None:
    recipe = write(workshop, tmp_path)
    found = saeffect("train-sae", str(recipe), "--out", "sae", "--work", "work", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"SAE: {(tmp_path / 'sae').resolve()}"
    assert "tokens/s" in found.stderr and "explained variance" in found.stderr
    assert load_sae(tmp_path / "sae").cfg.d_sae == 64
    metrics = read_metrics(tmp_path / "sae" / "metrics.jsonl")
    assert len(metrics) >= 5
    assert (tmp_path / "sae" / "training.png").read_bytes().startswith(b"\x89PNG")
    before = {p.name: hash_file(p) for p in (tmp_path / "sae").iterdir() if p.is_file()}

    again = saeffect("train-sae", str(recipe), "--out", "sae", "--work", "work", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert {p.name: hash_file(p) for p in (tmp_path / "sae").iterdir() if p.is_file()} == before


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about the curve of a training, which takes as long to draw as a tiny SAE to train."""
    monkeypatch.setattr(training_run, "save_training_figure", lambda folder: None)


@pytest.mark.usefixtures("no_figures")
def test_harvest_first_and_train_from_it(workshop: Path, tmp_path: Path, saeffect: Callable[..., Done]) -> None:
    recipe = write(workshop, tmp_path)
    found = saeffect("harvest", str(recipe), "--work", "work", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    folders = [Path(line.removeprefix("activations: ")) for line in found.stdout.splitlines()]
    assert len(folders) == 2 and all(any(f.glob("shard-*.safetensors")) for f in folders)
    dated = {p: p.stat().st_mtime_ns for f in folders for p in f.iterdir()}
    assert saeffect("train-sae", str(recipe), "--out", "sae", "--work", "work", cwd=tmp_path).returncode == 0
    assert {p: p.stat().st_mtime_ns for f in folders for p in f.iterdir()} == dated


@pytest.mark.usefixtures("no_figures")
def test_training_on_from_a_published_sae(
    workshop: Path, tmp_path: Path, saeffect: Callable[..., Done], hub: HubCache
) -> None:
    """gpt2-small-res-jb reads centred residuals."""
    published = find_published("gpt2-small-res-jb/blocks.1.hook_resid_pre")
    assert published is not None
    source = StandardSae(SaeConfig("standard", 32, 64, metadata={"hook_name": HOOK}))
    source.initialise(torch.randn(9, 32), SaeTrainingConfig(architecture="standard", d_sae=64))
    hub.add_folder(published.repo, published.path, save_sae(source, tmp_path / "published"))
    sae = {"architecture": "standard", "k": 32, "init_from": published.name}
    write(workshop, tmp_path, sae=sae)
    refused = saeffect("train-sae", "recipe.yaml", "--out", "sae", cwd=tmp_path)
    assert (refused.returncode, "set centre_inputs: true" in refused.stderr) == (2, True), refused.stderr
    write(workshop, tmp_path, sae=sae | {"centre_inputs": True})
    done = saeffect("train-sae", "recipe.yaml", "--out", "sae", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_sae(tmp_path / "sae").cfg.centre_input
    assert f"weights started from {published.name}" in (tmp_path / "sae" / "README.md").read_text()


def test_several_seeds_go_to_folders_of_their_names(
    workshop: Path, tmp_path: Path, saeffect: Callable[..., Done]
) -> None:
    recipe = write(workshop, tmp_path, saes={"seed-0": {"seed": 0}, "wide": {"seed": 1, "d_sae": 96}})
    found = saeffect("train-sae", str(recipe), "--out", "saes", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert [Path(line.removeprefix("SAE: ")).name for line in found.stdout.splitlines()] == ["seed-0", "wide"]
    assert load_sae(tmp_path / "saes" / "wide").cfg.d_sae == 96


def test_the_keys_are_those_of_the_documentation(tmp_path: Path, saeffect: Callable[..., Done]) -> None:
    assert saeffect("train-sae", "--keys", cwd=tmp_path).stdout == recipe_keys()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "negative penalty": ({"sae": {"architecture": "standard", "k": 32, "l1_coefficient": -1.0}}, "l1_coefficient"),
    "k beyond the width": ({"sae": {"k": 65}}, "k=65 is more than d_sae=64"),
    "no such hook": ({"hook": "blocks.9.hook_resid_pre"}, "blocks.9.hook_resid_pre"),
    "too little text": ({"tokens": 10_000_000}, "10,000,000 are wanted"),
    "unknown key": ({"sae": {"lerning_rate": 1.0}}, "learning_rate"),
    "unknown architecture": ({"sae": {"architecture": "top-k"}}, "architecture"),
    "no such model": ({"model": "./nowhere"}, "nowhere"),
    "no such text": ({"text": [{"name": "general", "path": "./nowhere.txt"}]}, "nowhere.txt"),
    "steps of nothing": ({"sae": {"batch_size": 0}}, "batch_size"),
    "fewer than one batch": ({"context_size": 64, "tokens": 32}, "fewer than one batch of 64"),
    "shorter than a context": ({"text": "short.txt", "context_size": 64}, "fewer than one context of 64"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_write_nothing(name: str, workshop: Path, tmp_path: Path, saeffect: Callable[..., Done]) -> None:
    changes, said = MISTAKES[name]
    recipe = write(workshop, tmp_path, **changes)
    found = saeffect("train-sae", str(recipe), "--out", "sae", "--work", "work", cwd=tmp_path)
    assert found.returncode == 2, found.stderr
    assert said in found.stderr and "Traceback" not in found.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe.yaml"], "--out"),
        (["recipe.yaml", "--out", "sae", "--logger", "neptune"], "wandb"),
        (["nowhere.yaml", "--out", "sae"], "nowhere.yaml"),
        (["study/study.yaml", "--out", "sae"], "--arm control"),
        (["study/study.yaml", "--arm", "contrl", "--out", "sae"], "control"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], said: str, workshop: Path, tmp_path: Path, saeffect: Callable[..., Done]
) -> None:
    write(workshop, tmp_path)
    (tmp_path / "study").mkdir()
    make_study(tmp_path / "study")
    found = saeffect("train-sae", *arguments, cwd=tmp_path)
    assert found.returncode == 2, found.stderr
    assert said in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "sae").exists()


def test_ctrl_c_saves_and_tells_how_to_resume(workshop: Path, tmp_path: Path, saeffect: Callable[..., Done]) -> None:
    recipe = write(workshop, tmp_path, sae={"steps": 200, "checkpoint_every": 10})
    arguments = ["train-sae", str(recipe), "--out", str(tmp_path / "sae"), "--work", str(tmp_path / "work")]
    running = Forked(command, arguments, {})
    running.wait_until(lambda: any((tmp_path / "sae").glob("checkpoint/step-*")))
    assert running.process.pid is not None
    os.kill(running.process.pid, signal.SIGINT)
    code, _, said = running.end()
    assert code == 130, said
    assert "Traceback" not in said and "same command" in said
    assert (
        any((tmp_path / "sae").glob("checkpoint/step-*"))
        and not (tmp_path / "sae" / "sae_weights.safetensors").exists()
    )

    again = saeffect(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "from step" in again.stderr
    alone = saeffect("train-sae", str(recipe), "--out", "alone", "--work", "work", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    weights = [hash_file(tmp_path / name / "sae_weights.safetensors") for name in ("sae", "alone")]
    assert weights[0] == weights[1]
