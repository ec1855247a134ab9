from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saeffect.errors import BadFile, EmptySelection, NotFound
from saeffect.text.corpora import is_held_out, read_corpus

ROWS = [{"text": "one\ntwo", "n": 1}, {"text": "Müller"}, {"text": "  "}, {"text": "last"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS = ["one\ntwo", "Müller", "last"]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("packed", [False, True], ids=["as is", "gzip"])
def test_json_lines(tmp_path: Path, packed: bool, mark: str) -> None:
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    data = (mark + LINES + "\n\n").encode()
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert list(read_corpus(str(path))) == TEXTS


@pytest.mark.parametrize("packed", [False, True], ids=["as is", "gzip"])
def test_paragraphs(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    data = b"one\ntwo\n\n \n\nthree\r\n\r\nfour"
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert list(read_corpus(str(path))) == ["one\ntwo\n", "three\n", "four"]


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert list(read_corpus(str(tmp_path / "a.jsonl"), field="body")) == ["x"]


@pytest.mark.parametrize(
    ("content", "part", "place"),
    [
        (b'{"text": "a"}\n{"text": \n', "not JSON", "line 2"),
        (b'{"text": "a"}\n\n{"body": "a", "n": 1}\n', "it has: body, n", "line 3"),
        (b'{"text": 3}\n', "no text field 'text'", "line 1"),
        (b'["text"]\n', "it has: list", "line 1"),
        (b'{"text": "\xe9"}\n', "not UTF-8", "after line 0"),
    ],
)
def test_bad_rows_name_their_line(
    tmp_path: Path, complains: Callable[..., Any], content: bytes, part: str, place: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with complains(BadFile, part, at=f"{path}, {place}"):
        list(read_corpus(str(path)))


def test_truncated_and_false_gzip(tmp_path: Path, complains: Callable[..., Any]) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(LINES.encode() * 2000, mtime=0)
    for content in (whole[: len(whole) // 2], whole[:-6] + b"\0\0\0\0\0\0", b"no gzip at all"):
        path.write_bytes(content)
        with complains(BadFile, "cannot be read to its end", at=str(path)):
            list(read_corpus(str(path)))


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": " "}\n'])
def test_no_documents(tmp_path: Path, complains: Callable[..., Any], content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with complains(EmptySelection, "not one document", at=str(path)):
        list(read_corpus(str(path)))


@pytest.mark.parametrize("source", ["none.jsonl", "data/none.jsonl.gz", "/none", "none", "a/b/c"])
def test_no_file(complains: Callable[..., Any], source: str) -> None:
    with complains(NotFound, "there is no text file", at=source):
        list(read_corpus(source))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one dataset, org/dotted-1.0, of these rows."""
    rows: list[dict[str, Any]] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert streaming
        if (name, split) != ("org/dotted-1.0", "test"):
            raise RuntimeError  # without a message, as some of them come
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return rows


def test_a_hub_dataset_may_have_dots_in_its_name(hub: list[dict[str, Any]]) -> None:
    hub += [{"text": "a"}, {"text": ""}, {"text": "b"}]
    assert list(read_corpus("org/dotted-1.0", split="test")) == ["a", "b"]


def test_bad_hub_datasets(hub: list[dict[str, Any]], complains: Callable[..., Any]) -> None:
    with complains(NotFound, "cannot read the dataset 'org/none': RuntimeError", at="org/none"):
        list(read_corpus("org/none", split="test"))
    hub.append({"body": "a", "id": 1})
    with complains(BadFile, "it has: body, id", at="org/dotted-1.0"):
        list(read_corpus("org/dotted-1.0", split="test"))
    with complains(BadFile, "'id' holds int"):
        list(read_corpus("org/dotted-1.0", field="id", split="test"))


def test_held_out_is_decided_by_content_alone() -> None:
    texts = [f"document {i}" for i in range(4000)]
    chosen = [t for t in texts if is_held_out(t, 0.1)]
    assert 330 < len(chosen) < 470  # 400 expected, standard deviation 19
    assert chosen == [t for t in texts if is_held_out(f"  {t}\n", 0.1)]
    assert set(chosen) < {t for t in texts if is_held_out(t, 0.2)}
    assert not any(is_held_out(t, 0.0) for t in texts)
    assert isinstance(is_held_out("\ud800", 0.5), bool)
