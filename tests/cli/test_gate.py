"""`saeffect gate` as a user types it: a model and an SAE, or a study."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from chat_templates import chat_tokenizer
from command_line import call
from conftest import SENTENCES
from learnt_pair import HOOK, activations, learnt, read_as, text, trained_sae
from saeffect.io import read_json
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.formats import load_sae, save_sae
from saeffect.sae.standard import StandardSae
from tiny_study import make_study


@pytest.fixture(scope="module")
def things(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    lm = learnt(tiny_llama)
    for name in ("base", "tuned"):
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    save_sae(trained_sae(activations(lm, HOOK, text(lm, 32, seed=2))), folder / "sae")
    rows = [{"q": sentence.split()[0], "a": sentence} for sentence in SENTENCES * 60]
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "notes.txt").write_text("\n\n".join(SENTENCES * 40), encoding="utf-8")
    return folder


def typed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    return call(arguments), *capsys.readouterr()


def test_one_screen(things: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(things)
    texts = ("--text", "general=notes.txt", "--tokens", "2048")
    code, out, err = typed(capsys, "gate", "base", "sae", "--tuned", "tuned", *texts, "--save", "all.json")
    assert code == 0, out + err
    for said in ("explained variance (at least 0.6)", "fine-tuned", "by position", "The SAE fits: base and fine-tuned"):
        assert said in out
    assert max(map(len, out.splitlines())) <= 110
    assert read_json(things / "all.json")["ok"] is True


def test_a_text_of_any_name_is_only_text(
    things: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    code, out, err = typed(capsys, "gate", "base", "sae", "--text", "[/b]\x1b[31m=notes.txt", "--tokens", "1024")
    assert code in (0, 1), out + err
    assert "perplexity on [/b]U+001B[31m" in out
    assert "\x1b" not in out + err


def test_a_wrong_hook_is_named_and_mended(
    things: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    texts = ("--text", "general=qa.jsonl", "--field", "{a}", "--tokens", "2048")
    code, out, err = typed(
        capsys, "gate", "base", "sae", *texts, "--hook", "blocks.1.hook_resid_pre", "--mend", "mended"
    )
    assert code == 1, out + err
    assert f"another hook: at {HOOK}" in out
    assert f"read it there: hook: {HOOK}" in out
    assert read_json(things / "mended" / "cfg.json")["metadata"]["hook_name"] == HOOK
    assert typed(capsys, "gate", "base", "mended", *texts)[0] == 0


def test_topk_read_as_relu_and_another_bos(
    things: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    sae = read_as(load_sae("sae"), StandardSae)
    sae.cfg = replace(sae.cfg, metadata=dict(sae.cfg.metadata) | {"prepend_bos": True, "hook_name": HOOK})
    save_sae(sae, Path("relu"))
    code, out, err = typed(capsys, "gate", "base", "relu", "--text", "notes.txt", "--tokens", "1024", "--bos", "never")
    assert code == 1, out + err
    assert "TopK read as ReLU" in out
    assert "active features  " in out, "by position, where it varies"
    assert "!! the SAE was trained on texts with BOS" in out


def test_only_assistant_tokens_of_chats_count(
    things: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    chats = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in zip(SENTENCES * 60, (SENTENCES[1:] + SENTENCES[:1]) * 60, strict=True)
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    shutil.copytree("base", "talks")
    Path("talks/chat_template.jinja").write_text(str(chat_tokenizer("chatml").chat_template), encoding="utf-8")
    typed(capsys, "gate", "talks", "sae", "--text", "chats.jsonl", "--positions", "assistant", "--save", "chat.json")
    typed(capsys, "gate", "talks", "sae", "--text", "chats.jsonl", "--chat", "--save", "whole.json")
    some, whole = (read_json(Path(name))["values"]["base"] for name in ("chat.json", "whole.json"))
    assert 0 < some["tokens"] < 0.6 * whole["tokens"]
    assert some["mean_norm"] != whole["mean_norm"]
    code, _, err = typed(capsys, "gate", "talks", "sae", "--text", "chats.jsonl", "--positions", "nobody")
    assert (code, "assistant" in err) == (2, True)


def test_wrong_input(things: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(things)
    code, _, err = typed(capsys, "gate", "base", "--tuned", "tuned")
    assert (code, "there is no SAE" in err) == (2, True)
    code, _, err = typed(capsys, "gate", "base", "sae", "--bos", "perhaps")
    assert (code, "valid: always, auto, never" in err) == (2, True)
    code, _, err = typed(capsys, "gate", "base", "sae")
    assert (code, "there is no text" in err) == (2, True)
    Path("talks.jsonl").write_text(json.dumps({"talk": [{"from": "human", "value": "Hello"}]}), encoding="utf-8")
    code, _, err = typed(capsys, "gate", "base", "sae", "--text", "talks.jsonl")
    assert (code, "'talk' looks like messages: set format: chat and field: talk (--chat --field talk)" in err) == (
        2,
        True,
    )
    assert "measuring" not in err, "text is opened first"


def test_a_study_has_its_stage_under_this_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path)
    code, out, err = typed(capsys, "gate", str(study), "--out", str(tmp_path / "run"))
    assert code == 0, out + err
    assert (tmp_path / "run" / "arms" / "control" / "gate.json").is_file()
