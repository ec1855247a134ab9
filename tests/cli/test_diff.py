"""`saeffect diff` as a user types it, on two random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from chat_templates import FAMILIES
from command_line import call
from saeffect.diffing import trace, written
from saeffect.io import read_json
from saeffect.study.stages import push
from tiny_study import make_model, make_sae, sentences


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, SAEs and text. Copy before changing anything."""
    folder = tmp_path_factory.mktemp("things")
    for seed, name in enumerate(("base", "tuned")):
        make_model(folder / name, seed)
    make_sae(folder / "sae", 0)
    rows = [json.dumps({"text": text}) for text in sentences(200)]
    (folder / "notes.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "web.jsonl").write_text("\n".join(rows[::-1]), encoding="utf-8")
    (folder / "short.txt").write_text(" ".join(sentences(8)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _short_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "OPENINGS", trace.OPENINGS[:3])
    monkeypatch.setattr(written, "OPENINGS", trace.OPENINGS[:3])
    monkeypatch.setattr(push, "OPENINGS", trace.OPENINGS[:3])
    monkeypatch.setattr(trace, "NEW_TOKENS", 4)


@pytest.fixture
def here(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty, with the things one above it."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned", "sae", "notes.jsonl", "web.jsonl", "short.txt"):
        (tmp_path / name).symlink_to(things / name)
    return tmp_path


def typed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    return call(arguments), *capsys.readouterr()


def test_models_alone_then_the_written_study(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("--text", "notes.jsonl", "--text", "general=web.jsonl")
    code, out, err = typed(capsys, "diff", "base", "tuned", *texts, "--out", "runs/x")
    assert code == 0, err
    for said in (
        "perplexity: ",
        " on notes, ",
        " on general",
        "KL ",
        "words expected more often: ",
        "no SAE was given",
    ):
        assert said in out
    assert "report: " in out
    assert "saeffect run runs/x.yaml" in out
    page = (here / "runs/x/report.html").read_text(encoding="utf-8")
    assert "words expected more often" in page
    written = yaml.safe_load((here / "runs/x.yaml").read_text(encoding="utf-8"))
    assert [source["name"] for source in written["text"]["sources"]] == ["notes", "general"]
    manifest = read_json(here / "runs/x/manifest.json")
    code, again, err = typed(capsys, "run", "runs/x.yaml")
    assert code == 0, err
    assert "changes: finished before, skipped" in err
    assert out.splitlines()[1] in again
    assert read_json(here / "runs/x/manifest.json")["stages"]["changes"] == manifest["stages"]["changes"]
    # The copy in the run directory is a study too.
    assert typed(capsys, "run", "runs/x/study.yaml")[0] == 0
    # What somebody edited is never written over.
    with (here / "runs/x.yaml").open("a", encoding="utf-8") as file:
        file.write("seed: 3\n")
    code, _, err = typed(capsys, "diff", "base", "tuned", *texts, "--out", "runs/x")
    assert code == 2
    assert "not as `saeffect diff` wrote it" in err
    assert "saeffect run runs/x.yaml" in err


def test_a_push_comes_after_the_first_findings(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "LEAST_TEXTS", 1)  # random models hardly write a word twice
    code, _, err = typed(capsys, "diff", "base", "tuned", "--text", "notes.jsonl", "--push", "--out", "runs/x")
    assert code == 0, err
    assert set(read_json(here / "runs/x/manifest.json")["stages"]) == {"trace", "changes", "push", "report"}
    assert yaml.safe_load((here / "runs/x.yaml").read_text(encoding="utf-8"))["push"] == {}
    page = (here / "runs/x/report.html").read_text(encoding="utf-8")
    assert "by 0.15 mean residual norms, the base model writes" in page
    assert "pushed along the fine-tune" in page and "along a null" not in page
    assert (here / "runs/x/comparison/difference_words.parquet").is_file()


def test_chats_are_read_by_the_template(here: Path, capsys: pytest.CaptureFixture[str], without_figures: None) -> None:
    said = sentences(120)
    talks = zip(said[::2], said[1::2], strict=True)
    rows = [{"talk": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in talks]
    (here / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ["diff", "base", "tuned", "--text", "chats.jsonl", "--field", "talk", "--out", "runs/c"]
    code, _, err = typed(capsys, *command, "--positions", "assistant")
    assert (code, "no chat template" in err) == (2, True), err
    (here / "tuned").unlink()
    shutil.copytree(here.joinpath("base").resolve().with_name("tuned"), here / "tuned")
    (here / "tuned" / "chat_template.jinja").write_text(FAMILIES["chatml"], encoding="utf-8")
    code, out, err = typed(capsys, *command, "--positions", "assistant")
    assert code == 0, err
    written = yaml.safe_load((here / "runs/c.yaml").read_text(encoding="utf-8"))
    assert written["text"]["format"] == "chat" and written["text"]["positions"] == ["assistant"]
    assert written["text"]["sources"][0]["field"] == "talk"
    assert "perplexity: " in out


def test_one_sae_for_both_models(here: Path, capsys: pytest.CaptureFixture[str], without_figures: None) -> None:
    command = ("diff", "base", "tuned", "--sae", "sae", "--text", "notes.jsonl", "--out", "runs/y")
    code, _, err = typed(capsys, *command)
    # Random models know no text; the file is there to say that this is wanted.
    assert code == 2
    assert "on_failure: warn" in err
    path = here / "runs/y.yaml"
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert study["arms"]["control"]["sae"] == study["arms"]["treatment"]["sae"]
    study["gate"]["on_failure"] = "warn"
    study["comparison"] = {"n_boot": 40, "n_permutations": 100}
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    code, out, err = typed(capsys, "run", "runs/y.yaml")
    assert code == 0, err
    assert "One SAE reads both models" in out
    stages = read_json(here / "runs/y/manifest.json")["stages"]
    assert "changes" in stages
    assert "match" not in stages
    assert (here / "runs/y/comparison/change_groups.parquet").is_file()
    code, out, _ = typed(capsys, "check", "runs/y.yaml")
    assert "One SAE reads both models" in out


def test_a_model_against_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = typed(capsys, "diff", "base", "base", "--text", "notes.jsonl", "--out", "runs/x")
    assert (code, err) == (0, "")
    assert "no difference" in out
    assert not (here / "runs").exists()


def test_an_equal_model_under_another_name(here: Path, things: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(things / "base", here / "copy")
    (here / "copy" / "notes.json").write_text("{}", encoding="utf-8")
    code, out, err = typed(capsys, "diff", "base", "copy", "--text", "notes.jsonl", "--out", "runs/x")
    assert code == 0, err
    assert "no difference: on this text, both models predict the same" in out


@pytest.mark.parametrize(
    ("arguments", "said", "fix"),
    [
        (("base", "tuned"), "no text for the models to read", "--text general="),
        (("base", "missing/model/here", "--text", "notes.jsonl"), "no model at", "hub id"),
        (("base", "tuned", "--text", "none.jsonl"), "none.jsonl", ""),
        (("base", "tuned", "--text", "short.txt"), "one row of 64 tokens", "text.context_size"),
        (("base", "tuned", "--text", "notes.jsonl", "--sae", "./nowhere"), "no SAE folder './nowhere'", "org/name"),
        (
            ("base", "tuned", "--text", "notes.jsonl", "--sae", "notes.jsonl"),
            "is a file; an SAE is a folder",
            "cfg.json",
        ),
        (("base", "tuned", "--text", "notes.jsonl", "--sae", "wide"), "d_in=16", "trained on this model"),
        (("base", "wider", "--text", "notes.jsonl"), "width", "its own fine-tune"),
        (("base", "foreign", "--text", "notes.jsonl"), "tokenizers", "its own fine-tune"),
        (("bundled:nothing", "tuned"), "bundled:nothing", "smollm2"),
    ],
)
def test_wrong_input_is_told_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str, fix: str
) -> None:
    if "wide" in arguments:
        make_sae(here / "wide", 0, d_in=16)
    if "wider" in arguments:
        make_model(here / "wider", 2, hidden=48)
    if "foreign" in arguments:
        make_model(here / "foreign", 3, extra=["zebra quagga okapi"] * 300)
    code, _, err = typed(capsys, "diff", *arguments, "--out", "runs/x")
    assert code == 2
    assert said in err
    assert fix in err
    assert "Traceback" not in err
    assert not (here / "runs").exists()
