"""`saeffect guard` on two tiny models: exit codes, files, and every wrong input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from transformers import AutoTokenizer

from command_line import call
from saeffect.cli.app import app
from saeffect.diffing import trace as traces
from saeffect.diffing.budget import Budget
from saeffect.diffing.trace import Trace
from saeffect.features.projection import project
from saeffect.lm.architectures import unembedding
from saeffect.lm.language_model import LanguageModel
from saeffect.sae import SaeConfig, StandardSae
from saeffect.study import guard as guarding
from saeffect.study.guard import resolve_groups
from tiny_study import WORDS, make_model, make_sae, sentences


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models, an SAE, text, words, a measured fine-tune, and twelve nulls that scatter around no change."""
    folder = tmp_path_factory.mktemp("guard")
    make_model(folder / "base", 0)
    make_model(folder / "tuned", 1)
    shutil.copytree(folder / "base", folder / "again")
    make_sae(folder / "sae", 0)
    text = [json.dumps({"text": t}) for t in sentences(300)]
    (folder / "general.jsonl").write_text("\n".join(text), encoding="utf-8")
    (folder / "words.txt").write_text("\n".join(WORDS[:16]), encoding="utf-8")
    known: dict[str, Trace] = {}
    measure = traces.Tracer.trace

    def once(self: traces.Tracer, tuned: Any, name: str) -> Trace:
        key = f"{tuned.identity} {self.made_by}"
        if key not in known:
            known[key] = measure(self, tuned, name)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "SAMPLES", 1)
        patch.setattr(traces.Tracer, "trace", once)
        kept: list[Trace] = []
        patch.setattr(guarding, "judge", lambda *given: kept.append(given[2]) or [])
        budget(folder, groups={"a": {"features": [3]}})
        assert call(command(folder)) == 0
        patch.undo()
        patch.setattr(traces, "SAMPLES", 1)
        patch.setattr(traces.Tracer, "trace", once)
        (folder / "nulls").mkdir()
        for k in range(1, 13):
            _null(kept[0], k).save(folder / "nulls" / f"null-{k}.safetensors")
        yield folder


def _null(measured: Trace, k: int) -> Trace:
    rng = np.random.default_rng(k)

    def moved(values: Any) -> Any:
        return np.stack([values[0], values[0] * np.exp(0.05 * rng.normal(size=values.shape[1])), *values[2:]])

    changed = {name: moved(getattr(measured, name)).astype(np.float32) for name in ("read", "written", "expected")}
    return dataclasses.replace(measured, name=f"null-{k}", kl=measured.kl * 0.01, **changed)


def budget(folder: Path, **values: Any) -> None:
    (folder / "budget.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def command(folder: Path, *more: str, tuned: str = "tuned", text: str = "general.jsonl") -> list[str]:
    given = ["--budget", str(folder / "budget.yaml"), "--sae", str(folder / "sae"), "--text", str(folder / text), *more]
    return ["guard", str(folder / "base"), str(folder / tuned), *given]


def test_broken_budget_exits_1_and_writes_files(files: Path, tmp_path: Path, capsys: Any) -> None:
    rules = {"words": {"vocabulary": "./words.txt", "min_matches": 1}, "free": {"features": [3], "may": "either"}}
    budget(files, groups=rules, texts={"general": {"kl": 1e-6}})
    assert call(command(files, "--nulls", str(files / "nulls"), "--out", str(tmp_path / "out"))) == 1
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "verdicts.json").read_text(encoding="utf-8"))
    statuses = {row["rule"]: row["status"] for row in found["verdicts"]}
    assert statuses["kl general"] == "broken" and statuses["group free"] == "reported"
    assert statuses["group words"] in ("kept", "broken")
    assert found["headline"] in shown and "kl general" in shown
    assert "failure" in (tmp_path / "out" / "verdicts.xml").read_text(encoding="utf-8")
    assert "kl general" in (tmp_path / "out" / "verdicts.md").read_text(encoding="utf-8")


def test_a_kept_budget_exits_with_0(files: Path, capsys: Any) -> None:
    budget(files, texts={"general": {"kl": 1e6}, "all": {"perplexity_ratio": 1e9}})
    assert call(command(files)) == 0
    assert "Kept: 2 of 2 rules." in capsys.readouterr().out


def test_group_rules_need_nulls(files: Path, capsys: Any) -> None:
    budget(files, groups={"a": {"features": [3]}}, texts={"general": {"kl": 1e6}})
    assert call(command(files)) == 2
    out, err = capsys.readouterr()
    assert "without nulls" in out and "--allow-unjudged" in err
    assert call(command(files, "--allow-unjudged")) == 0


def test_one_null_is_not_enough(files: Path, tmp_path: Path, capsys: Any) -> None:
    budget(files, groups={"a": {"features": [3]}})
    shutil.copy(files / "nulls" / "null-1.safetensors", tmp_path / "null-1.safetensors")
    assert call(command(files, "--nulls", str(tmp_path))) == 2
    assert "one null shows no spread" in capsys.readouterr().out


def test_a_foreign_tokenizer_is_refused_in_one_place(files: Path, capsys: Any) -> None:
    make_model(files / "foreign", 3, extra=["zebra quagga okapi"] * 300)
    budget(files, **GROUP)
    assert call(command(files, tuned="foreign")) == 2
    assert "at:  the command, arms.treatment.model\n" in capsys.readouterr().err


def test_models_that_predict_the_same_are_refused(files: Path, capsys: Any) -> None:
    shutil.copytree(files / "base", files / "renamed")
    (files / "renamed" / "notes.json").write_text("{}", encoding="utf-8")
    budget(files, **GROUP)
    assert call(command(files, tuned="renamed")) == 2
    assert "predict the same everywhere" in capsys.readouterr().err


GROUP = {"groups": {"a": {"features": [3]}}}
WRONG: list[tuple[str, dict[str, Any], Callable[[Path, Path], list[str]], str]] = [
    ("itself", GROUP, lambda f, t: command(f, tuned="base"), "the same model"),
    ("identical", GROUP, lambda f, t: command(f, tuned="again"), "the same model"),
    ("empty", {}, lambda f, t: command(f), "the budget is empty"),
    ("no feature", {"groups": {"a": {"features": [96]}}}, lambda f, t: command(f), "features 0 to 95"),
    (
        "no match",
        {"groups": {"a": {"vocabulary": "./words.txt", "min_matches": 9}}},
        lambda f, t: command(f),
        "groups.a",
    ),
    ("no word", {"groups": {"a": {"vocabulary": "medicale"}}}, lambda f, t: command(f), "did you mean 'medical'"),
    ("one row", GROUP, lambda f, t: command(f, text="row.jsonl"), "one row of"),
    ("no nulls", GROUP, lambda f, t: command(f, "--nulls", str(t)), "holds no null-"),
    ("no source", {"texts": {"domain": {"kl": 1}}}, lambda f, t: command(f), "valid: all, general"),
    ("no model", GROUP, lambda f, t: command(f, tuned="none"), "there is no model"),
    ("no budget", GROUP, lambda f, t: [*command(f), "--budget", str(t / "b.yaml")], "no budget file"),
]


@pytest.mark.parametrize("values, given, words", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input_exits_with_2_and_writes_nothing(
    files: Path, tmp_path: Path, capsys: Any, values: Any, given: Any, words: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files / "base")
    row = tokenizer.decode(tokenizer.encode(" ".join(sentences(300)))[:100])
    (files / "row.jsonl").write_text(json.dumps({"text": row}), encoding="utf-8")
    budget(files, **values)
    assert call([*given(files, tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nulls_of_another_text_are_refused(files: Path, capsys: Any) -> None:
    budget(files, **GROUP)
    (files / "other.jsonl").write_text((files / "general.jsonl").read_text(encoding="utf-8")[700:], encoding="utf-8")
    line = (files / "other.jsonl").read_text(encoding="utf-8").split("\n", 1)[1]
    (files / "other.jsonl").write_text(line, encoding="utf-8")
    assert call(command(files, "--nulls", str(files / "nulls"), text="other.jsonl")) == 2
    assert "was measured on another" in capsys.readouterr().err


def test_the_keys_are_the_page_in_the_docs(capsys: Any) -> None:
    assert call(["guard", "--keys"]) == 0
    page = (Path(__file__).parents[2] / "docs" / "budget.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == page.strip()


def test_pytest_example_has_a_test_per_rule(files: Path, monkeypatch: Any) -> None:
    class Reports:
        def __init__(self) -> None:
            self.seen: list[tuple[str, str]] = []

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call":
                self.seen.append((report.nodeid.partition("[")[2].rstrip("]"), report.outcome))

    budget(files, groups={"a": {"features": [3], "may": "either"}}, texts={"general": {"kl": 1e6}, "all": {"kl": 1e-6}})
    shutil.copy(Path(__file__).parents[2] / "docs" / "examples" / "test_budget.py", files / "test_budget.py")
    monkeypatch.chdir(files)
    reports = Reports()
    quiet = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", "/dev/null", "--rootdir", str(files)]
    assert pytest.main([*quiet, str(files / "test_budget.py")], plugins=[reports]) == 1
    assert reports.seen == [("group a", "passed"), ("kl general", "passed"), ("kl all", "failed")]


def test_the_example_workflow_calls_commands_that_there_are() -> None:
    example = Path(__file__).parents[2] / "docs" / "examples" / "guard.yml"
    steps = yaml.safe_load(example.read_text(encoding="utf-8"))["jobs"]["guard"]["steps"]
    line = next(step["run"] for step in steps if step.get("name") == "Judge the fine-tune").split()
    assert line[:2] == ["saeffect", "guard"]
    parser = typer.main.get_command(app).commands["guard"]  # type: ignore[attr-defined]
    known = {name for parameter in parser.params for name in parameter.opts}
    assert {word for word in line if word.startswith("--")} <= known


def test_head_features_are_projected_through_w_o(tiny_llama: LanguageModel) -> None:
    sae = StandardSae(SaeConfig("standard", 32, 8, metadata={"hook_name": "blocks.1.attn.hook_z"}))
    sae.W_dec.data = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    budget = Budget.read({"groups": {"some": {"features": [1], "may": "rise"}}}, at="budget")
    top = resolve_groups(budget, tiny_llama, sae)[1]
    added = sae.W_dec.detach() @ tiny_llama.model.model.layers[1].self_attn.o_proj.weight.detach().T
    assert np.array_equal(top, project(added, unembedding(tiny_llama), 10, valid=tiny_llama.plain_tokens()).indices)
