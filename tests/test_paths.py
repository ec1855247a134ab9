"""What paths are relative to, what can be none, and text in UTF-8."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeffect.config import StudyConfig
from saeffect.errors import BadFile, ConfigError, NotFound
from saeffect.lm.finetune import FinetuneConfig
from saeffect.paths import decode_utf8, read_bytes, refuse_special, resolve_paths, user_path
from saeffect.sae.training.config import SaeRecipe


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the file's folder, the current folder): each has a folder `here`, a file `a.txt`; the second `only.txt` too."""
    beside, current = tmp_path / "beside", tmp_path / "current"
    for place in (beside, current):
        (place / "here").mkdir(parents=True)
        (place / "a.txt").write_text("x")
    (current / "only.txt").write_text("x")
    (current / "org" / "name").mkdir(parents=True)
    (current / "medical").write_text("x")
    (beside / "medical").write_text("x")
    monkeypatch.chdir(current)
    return beside, current


@pytest.mark.parametrize("bad", ["a\0b", "~nobody-of-that-name/x", "\ud83d", "a" * 5000])
def test_what_can_be_no_path(bad: str, complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "can be no path", at="here"):
        user_path(bad, at="here")
    for values in ({"arms": {"c": {"model": {"path": bad}, "sae": bad}}}, {"text": [{"path": bad}]}):
        with complains(ConfigError, "can be no path", at="file"):
            resolve_paths(values, Path(), at="file")


def test_path_may_be_missing_or_in_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/none/at all") == tmp_path / "none" / "at all"


def test_path_keys_are_relative_to_the_file(places: tuple[Path, Path]) -> None:
    beside, _ = places
    values = {
        "arms": {"c": {"model": "here", "sae": "here", "more_saes": ["./here", "new"], "training": {"init_from": "n"}}},
        "model": {"path": "here", "adapter": "./here"},
        "text": {"sources": [{"name": "a", "path": "a.txt", "field": "a.txt"}]},
        "coherence": {"embeddings": "a.txt"},
        "selection": {"vocabulary": "a.txt", "verdicts": "none.csv", "domain": "here"},
        "steering": {"outcome_encoder": "here"},
        "training": {"text": [{"path": "a.txt"}], "saes": {"sae": {"init_from": "here"}}},
    }
    found = resolve_paths(values, beside, at="s")
    here, a = str(beside / "here"), str(beside / "a.txt")
    assert found["arms"]["c"] == {
        **{"model": here, "sae": here, "more_saes": [here, str(beside / "new")]},
        "training": {"init_from": str(beside / "n")},
    }
    assert found["model"] == {"path": here, "adapter": here}
    assert found["text"]["sources"] == [{"name": "a", "path": a, "field": "a.txt"}]
    assert found["coherence"]["embeddings"] == a
    assert found["selection"] == {"vocabulary": a, "verdicts": str(beside / "none.csv"), "domain": "here"}
    assert found["steering"]["outcome_encoder"] == here
    assert found["training"] == {"text": [{"path": a}], "saes": {"sae": {"init_from": here}}}
    assert resolve_paths(found, beside / "elsewhere", at="s") == found


def test_every_key_that_holds_a_path_is_known() -> None:
    """A key whose description speaks of a file or folder, and that nobody resolves, depends on where one stands."""
    from saeffect.paths import _KINDS

    spoken = set()
    for model in (StudyConfig, SaeRecipe, FinetuneConfig):
        found = [model]
        while found:
            one = found.pop()
            for name, field in one.model_fields.items():
                if any(word in (field.description or "") for word in ("older of", "file", "older in", "Folder,")):
                    spoken.add(name)
                for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                    if isinstance(kind, type) and hasattr(kind, "model_fields"):
                        found.append(kind)
    assert spoken >= {"sae", "vocabulary", "embeddings", "outcome_encoder", "init_from"}
    assert spoken - {"path", "arms", "text", "training", "context_size", "saes", "sources"} <= set(_KINDS)


@pytest.mark.parametrize(
    ("key", "value"),
    [("text", "only.txt"), ("model", "org/name"), ("model", "./org/name"), ("verdicts", "only.txt")],
)
def test_path_in_current_folder_is_not_taken(
    key: str, value: str, places: tuple[Path, Path], complains: Callable[..., Any]
) -> None:
    beside, _ = places
    with complains(NotFound, f"no '{value}' beside the file", "in the current folder", at=f"s, {key}"):
        resolve_paths({key: value}, beside, at="s")


def test_names_stay_names(places: tuple[Path, Path]) -> None:
    beside, _ = places
    values = {
        "model": "gpt2",
        "adapter": "bundled:medical-lora",
        "vocabulary": "medical",  # bundled, though files of that name are in both folders
        "embeddings": "glove-wiki-gigaword-100",
        "outcome_encoder": "bert-base-uncased",
        "text": [{"path": "org/dotted-1.0"}],
    }
    assert resolve_paths(values, beside, at="s") == values
    assert resolve_paths({"vocabulary": "./medical"}, beside, at="s") == {"vocabulary": str(beside / "medical")}
    missing = resolve_paths({"model": "a.gguf", "text": [{"path": "b/c.txt"}]}, beside, at="s")
    assert missing == {"model": str(beside / "a.gguf"), "text": [{"path": str(beside / "b" / "c.txt")}]}


def test_pipes_and_devices_are_no_files(tmp_path: Path, complains: Callable[..., Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with complains(BadFile, "pipe or a device", at=str(path)):
            refuse_special(path, "text")
    refuse_special(tmp_path, "text")
    refuse_special(tmp_path / "nothing", "text")


def test_byte_order_mark_is_dropped_and_text_kept() -> None:
    assert decode_utf8("\ufeffœdème\n".encode(), at="f") == "œdème\n"


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("abc\ndé".encode("latin-1"), "byte 0xe9 at position 5 (line 2)"),
        ("abc".encode("utf-16"), "byte 0xff at position 0 (line 1); it looks like UTF-16"),
        ("abc".encode("utf-16-le"), "byte 0x00 at position 1 (line 1)"),
        (b"\xef\xbb\xbfab\xff", "byte 0xff at position 5 (line 1)"),
    ],
)
def test_other_encodings_name_the_byte(data: bytes, place: str) -> None:
    with pytest.raises(BadFile) as caught:
        decode_utf8(data, at="words.txt")
    assert place in caught.value.message
    assert caught.value.at == "words.txt"
    assert "UTF-8" in (caught.value.fix or "")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no verdicts file 'a\.csv'"):
        read_bytes(tmp_path / "a.csv", "verdicts")
    with pytest.raises(BadFile, match="is a directory"):
        read_bytes(tmp_path, "verdicts")
