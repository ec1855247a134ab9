from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from saeffect.config import TextSource
from saeffect.errors import BadFile, ConfigError, EmptySelection, NotFound
from saeffect.lm import corpora, text_files
from saeffect.lm.activations import StreamedActivations
from saeffect.lm.corpora import StreamedText, is_held_out, read_corpus
from saeffect.lm.language_model import LanguageModel

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
        (b'{"text": "\xe9"}\n', "not UTF-8 (byte 0xe9); it looks like cp1252", "line 1"),
        (b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply", "line 1"),
        (b'{"text": "a", "b": ' + b"9" * 5_000 + b"}", "a number that is too long", "line 1"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "does not look like text", "line 1"),
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
        ("a.jsonl.zst", _zstd(np.random.default_rng(0).bytes(9_000))[:500], ".jsonl, .json, .txt, .csv and .tsv"),
        ("a.jsonl.zst", b"(\xb5/\xfd" + b"\xff" * 99, "cannot be read to its end"),
        ("a.jsonl", b"[\n{}]", "a folder that save_to_disk"),
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
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.docx").write_bytes(b"PK")
    with complains(NotFound, "no file of text; it has: notes.docx", ".jsonl, .json", at="empty"):
        next(read_corpus(str(tmp_path / "empty")))
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "tested")
    with complains(BadFile, "no split 'train'; it has: test", at="tested"):
        next(read_corpus(str(tmp_path / "tested")))
    with complains(ConfigError, "can be no path"):
        next(read_corpus("a\0b.jsonl"))
    pd.DataFrame({"text": ["a", None]}).to_parquet(tmp_path / "null.parquet")
    with complains(BadFile, "'text' holds null", at="null.parquet, row 2"):
        list(read_corpus(str(tmp_path / "null.parquet")))


@pytest.mark.parametrize("lines", [b'{"text": "' + b"a" * 300, b'text\n"' + b"a\n" * 300, b"a\n" * 300])
def test_endless_document_is_refused(
    lines: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complains: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(text_files, "_LONGEST", 200)
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

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace(HF_HUB_OFFLINE=False)),
    )
    return rows


def test_hub_names_may_have_dots(hub: list[dict[str, Any]]) -> None:
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


WORDS = "the patient had a fever and some pain in old town river".split()


def _write(path: Path, seed: int, n: int = 60) -> TextSource:
    generator = np.random.default_rng(seed)
    texts = [f"{seed} {i} " + " ".join(generator.choice(WORDS, 12)) for i in range(n)]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    return TextSource(name=path.stem, path=str(path))


@pytest.fixture
def text(tiny_llama: LanguageModel, tmp_path: Path) -> StreamedText:
    sources = (_write(tmp_path / "a.jsonl", 0), _write(tmp_path / "b.jsonl", 1))
    return StreamedText(tiny_llama, sources, 16, buffer=5)


def _documents(text: StreamedText, row_ids: list[Any], start: int) -> list[str]:
    return text.lm.decode([int(i) for row in row_ids[start :: len(text.sources)] for i in row]).split("<|endoftext|>")


def test_rows_alternate_and_hold_the_text(text: StreamedText) -> None:
    rows = list(text.rows())
    assert {row.shape for row in rows} == {(16,)}
    assert {row.dtype for row in rows} == {np.dtype(np.int32)}
    ids = [int(i) for row in rows[::2] for i in row]
    assert text.lm.decode(ids[:3]).startswith("0 ")
    assert text.lm.decode([int(i) for i in rows[1]][:3]).startswith("1 ")
    separator = text.lm.tokenizer.eos_token_id
    assert ids.count(separator) > 40


def test_rows_are_the_same_for_the_same_seed(text: StreamedText) -> None:
    first, again = np.stack(list(text.rows())), np.stack(list(text.rows()))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.stack(list(replace(text, seed=1).rows()))[: len(first)])


def test_buffer_of_one_keeps_the_order(text: StreamedText) -> None:
    plain = replace(text, sources=text.sources[:1], buffer=1)
    lines = Path(text.sources[0].path).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    expected = list(text.lm.pack(texts, 16))
    assert np.array_equal(np.stack(list(plain.rows())), np.stack(expected))


def test_documents_are_mixed_within_the_buffer() -> None:
    mixed = list(corpora._shuffle([str(i) for i in range(50)], 5, np.random.default_rng(0)))
    assert sorted(map(int, mixed)) == list(range(50))
    assert mixed != sorted(mixed, key=int)
    assert all(int(t) <= place + 5 for place, t in enumerate(mixed)), "nothing comes before it was read"


def test_held_out_documents_are_left_out(text: StreamedText) -> None:
    kept: list[str] = []

    def encode(document: str) -> list[int]:
        kept.append(document)
        return [1] * 8

    lm = LanguageModel(text.lm.model, text.lm.tokenizer, "x")
    object.__setattr__(lm, "encode", encode)
    list(replace(text, lm=lm, held_out=0.4).rows())
    assert 20 < len(kept) < 100
    assert not [t for t in kept if is_held_out(t, 0.4)]


def test_so_many_tokens(text: StreamedText, complains: Callable[..., Any]) -> None:
    assert text.n_rows is None
    some = replace(text, tokens=100)
    assert some.n_rows == len(list(some.rows())) == 6
    with complains(EmptySelection, "are wanted", at="tokens"):
        list(replace(text, tokens=10**6).rows())


def test_only_what_is_needed_is_read(text: StreamedText, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = corpora.read_corpus

    def reading(*args: Any, **options: Any) -> Any:
        for document in real(*args, **options):
            read.append(document)
            yield document

    monkeypatch.setattr(corpora, "read_corpus", reading)
    next(text.rows())
    assert len(read) < 10


def test_text_shorter_than_a_row(text: StreamedText, complains: Callable[..., Any]) -> None:
    with complains(EmptySelection, "fewer than one context of 99999", at="text.0"):
        list(replace(text, context_size=99_999).rows())
    with complains(EmptySelection, "fewer than one context"):
        StreamedActivations.open(text.lm, "blocks.1.hook_resid_pre", replace(text, context_size=99_999))
    missing = (text.sources[0], TextSource(name="c", path="/nowhere/c.jsonl"))
    with complains(NotFound, at="text.1"):
        list(replace(text, sources=missing).rows())


def test_identity_is_what_decides_the_rows(text: StreamedText, tmp_path: Path) -> None:
    same = replace(text, lm=replace(text.lm, name="other"))
    assert same.identity() == text.identity()
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(text.sources[0].path).read_bytes())
    assert replace(text, sources=(TextSource(name="a", path=str(moved)), text.sources[1])).identity() == text.identity()
    changes: list[dict[str, Any]] = [
        {"context_size": 8},
        {"tokens": 64},
        {"held_out": 0.1},
        {"seed": 1},
        {"buffer": 6},
        {"sources": text.sources[::-1]},
    ]
    assert len({replace(text, **change).identity() for change in changes} | {text.identity()}) == 7
