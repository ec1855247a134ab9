from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from saeffect.errors import BadFile, ConfigError, EmptySelection, NotFound
from saeffect.lm import corpora
from saeffect.lm.corpora import is_held_out, read_corpus

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
        (b'{"text": "a"}\n\n{"body": "a", "n": 1}\n', "no field 'text' here; it has: body, n", "line 3"),
        (b'{"text": 3}\n', "'text' holds a number, not text", "line 1"),
        (b'{"text": null}\n', "'text' holds null, not text", "line 1"),
        (b'{"text": NaN}\n', "'text' holds NaN, not text", "line 1"),
        (b'{"text": ["a", "b"]}\n', "'text' holds a list, not text", "line 1"),
        (b'{"text": {}}\n', "'text' holds an object, not text", "line 1"),
        (b'["text"]\n', "holds a list; it has to be an object", "line 1"),
        (b'{"text": "\xe9"}\n', "not UTF-8", "after line 0"),
        (b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deep", "line 1"),
        (b'{"text": "a", "b": ' + b"9" * 5_000 + b"}", "a number that is too long", "line 1"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8", "after line 0"),
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


def test_half_a_character_is_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00 \\ude00"}\n')
    assert list(read_corpus(str(tmp_path / "a.jsonl"))) == ["a \ufffd b \U0001f600 \ufffd"]


def _zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def _of_kind(kind: str, texts: list[str], path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    table = pd.DataFrame({"id": range(len(texts)), "text": texts})
    if kind == "csv":
        path.write_bytes(b"\xef\xbb\xbf" + table.to_csv(index=False).encode())
    elif kind == "tsv.gz":
        path.write_bytes(gzip.compress(table.to_csv(index=False, sep="\t").encode(), mtime=0))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "jsonl.zst":
        path.write_bytes(_zstd(lines))
    elif kind == "jsonl":  # called so, and packed all the same
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif kind == "saved":
        datasets.Dataset.from_pandas(table).save_to_disk(path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_pandas(table)}).save_to_disk(path)


@pytest.mark.parametrize("kind", ["csv", "tsv.gz", "parquet", "jsonl.zst", "jsonl", "saved", "splits"])
def test_other_formats(kind: str, tmp_path: Path) -> None:
    texts = ['one,\ttwo "three"', "Müller\nsecond line", "x" * 200_000]
    path = tmp_path / f"a.{kind}"
    _of_kind(kind, texts, path)
    assert list(read_corpus(str(path))) == texts


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", b'text,n\n"a,1\n', "not CSV"),
        ("a.csv", b"text,n\na\n", "1 cells where the first line has 2"),
        ("a.csv", b"body,n\na,1\n", "no field 'text' here; it has: body, n"),
        ("a.parquet", b"PAR1 and no more", "Parquet file cannot be read"),
        ("a.jsonl.zst", _zstd(os.urandom(9_000))[:500], ".jsonl, .txt, .csv and .tsv"),
        ("a.jsonl.zst", b"(\xb5/\xfd" + b"\xff" * 99, "cannot be read to its end"),
        ("a.jsonl", b"[\n{}]", ".parquet; a folder that save_to_disk"),
    ],
)
def test_other_formats_gone_wrong(
    name: str, content: bytes, part: str, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    (tmp_path / name).write_bytes(content)
    with complains(BadFile, part, at=name):
        list(read_corpus(str(tmp_path / name)))


def test_what_is_no_file(tmp_path: Path, complains: Callable[..., Any]) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with complains(BadFile, "pipe", at="pipe.jsonl"):
        next(read_corpus(str(tmp_path / "pipe.jsonl")))
    with complains(BadFile, "this is a folder", ".jsonl, .txt", at=str(tmp_path)):
        next(read_corpus(str(tmp_path)))
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "tested")
    with complains(BadFile, "no split 'train'; it has: test", at="tested"):
        next(read_corpus(str(tmp_path / "tested")))
    with complains(ConfigError, "can be no path"):
        next(read_corpus("a\0b.jsonl"))
    pd.DataFrame({"text": ["a", None]}).to_parquet(tmp_path / "null.parquet")
    with complains(BadFile, "'text' holds null", at="null.parquet, row 2"):
        list(read_corpus(str(tmp_path / "null.parquet")))


@pytest.mark.parametrize("lines", [b'{"text": "' + b"a" * 300, b'text\n"' + b"a\n" * 300, b"a\n" * 300])
def test_a_document_without_end_is_not_read_to_its_end(
    lines: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complains: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(corpora, "_LONGEST", 200)
    request.addfinalizer(partial(csv.field_size_limit, csv.field_size_limit()))
    name = "a.jsonl.gz" if b"{" in lines else "a.csv.gz" if b'"' in lines else "a.txt.gz"
    (tmp_path / name).write_bytes(gzip.compress(lines, mtime=0))
    with complains(BadFile, "200" if "csv" in name else "more than 200 characters", at=name):
        list(read_corpus(str(tmp_path / name)))


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
        if (name, split) != ("org/dotted-1.0", "train"):
            raise RuntimeError  # without a message, as some of them come
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return rows


def test_a_hub_dataset_may_have_dots_in_its_name(hub: list[dict[str, Any]]) -> None:
    hub += [{"text": "a"}, {"text": ""}, {"text": "b"}]
    assert list(read_corpus("org/dotted-1.0")) == ["a", "b"]


def test_bad_hub_datasets(hub: list[dict[str, Any]], complains: Callable[..., Any]) -> None:
    with complains(NotFound, "cannot read the dataset 'org/none': RuntimeError", at="org/none"):
        list(read_corpus("org/none"))
    hub.append({"body": "a", "id": 1})
    with complains(BadFile, "it has: body, id", at="org/dotted-1.0"):
        list(read_corpus("org/dotted-1.0"))
    with complains(BadFile, "'id' holds a number", at="org/dotted-1.0, row 1"):
        list(read_corpus("org/dotted-1.0", field="id"))


def test_held_out_is_decided_by_content_alone() -> None:
    texts = [f"document {i}" for i in range(4000)]
    chosen = [t for t in texts if is_held_out(t, 0.1)]
    assert 330 < len(chosen) < 470  # 400 expected, standard deviation 19
    assert chosen == [t for t in texts if is_held_out(f"  {t}\n", 0.1)]
    assert set(chosen) < {t for t in texts if is_held_out(t, 0.2)}
    assert not any(is_held_out(t, 0.0) for t in texts)
    assert isinstance(is_held_out("\ud800", 0.5), bool)
