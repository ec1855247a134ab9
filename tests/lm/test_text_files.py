"""Text as it lies around: folders, patterns, spreadsheets, Arrow, other encodings, and templates over several fields."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeffect.config import TextSource
from saeffect.config_file import read_config_file
from saeffect.errors import BadFile, ConfigError, EmptySelection, NotFound
from saeffect.lm import text_files
from saeffect.lm.corpora import read_corpus, source_files, source_identity
from saeffect.lm.fields import TextField

QA = [{"question": "What is a fever?", "answer": "A rise.", "n": 1}, {"question": "Pulse?", "answer": "Feel.", "n": 2}]


@pytest.mark.parametrize("kind", ["file", "stream", "feather"])
def test_arrow(kind: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "Müller", "x" * 100_000], "n": [1, 2, 3]})
    path = tmp_path / ("a.feather" if kind == "feather" else "a.arrow")
    if kind == "feather":
        import pyarrow.feather

        pyarrow.feather.write_feather(table, str(path))
    else:
        how = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with how(str(path), table.schema) as writer:
            writer.write_table(table)
    assert list(read_corpus(str(path))) == ["one", "Müller", "x" * 100_000]


@pytest.mark.parametrize("data", [b"ARROW1 and no more", b"\xff\xff\xff\xff", b"no table"])
def test_damaged_arrow(data: bytes, tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "a.arrow").write_bytes(data)
    with complains(BadFile, "Arrow file cannot be read", at="a.arrow"):
        list(read_corpus(str(tmp_path / "a.arrow")))


@pytest.mark.parametrize("name", ["qa.json", "qa.jsonl", "qa.csv", "semicolons.csv", "qa.parquet", "qa.tsv.gz"])
def test_a_template_over_fields_of_any_format(name: str, tmp_path: Path) -> None:
    path, table = tmp_path / name, pd.DataFrame(QA)
    if name == "qa.json":
        path.write_text(json.dumps(QA, indent=1))
    elif name == "qa.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in QA))
    elif name == "qa.parquet":
        table.to_parquet(path)
    elif name == "qa.tsv.gz":
        path.write_bytes(gzip.compress(table.to_csv(sep="\t", index=False).encode()))
    else:
        table.to_csv(path, index=False, sep=";" if name == "semicolons.csv" else ",")
    for template in ("{n}. {question}\n{{{answer}}}", r"{n}. {question}\n{{{answer}}}"):  # as a shell leaves it
        source = TextSource(path=str(path), field=template)
        assert list(read_corpus(source)) == ["1. What is a fever?\n{A rise.}", "2. Pulse?\n{Feel.}"]
    assert source.name == path.name.partition(".")[0]


ITEMS = [{"text": "one, [two] \u00e9"}, {"text": "]", "n": [[1.5e3, {}], None]}, {"text": 'a "quoted" \\ word'}]


@pytest.mark.parametrize("block", [1, 7, 10_000])
@pytest.mark.parametrize("spaces", [None, 0, 3])
def test_items_of_an_array_come_one_by_one(
    block: int, spaces: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text("\n \n" + json.dumps(ITEMS * 4, indent=spaces).replace("{", "\n {\n") + "\r\n\n", encoding="utf-8")
    assert list(read_corpus(str(path))) == [str(item["text"]) for item in ITEMS * 4]
    path.write_text("[\n \n]\n")
    with pytest.raises(EmptySelection):
        list(read_corpus(str(path)))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('[{"text": "a"},', "Expecting value"),
        ('[{"text": "a"}', "Expecting ',' delimiter"),
        ('[{"text": "a"} {"text": "b"}]', "Expecting ',' delimiter"),
        ('[{"text": "a"},]', "Expecting value"),
        ('[,{"text": "a"}]', "Expecting value"),
        ('[{"text": "a"}]\n{"text": "b"}', "after the end of this array"),
        ('[{"text": "a"}, {"text": "b\nc"}]', "Invalid control character"),
        ('[{"text": "a", "n": ' + "9" * 5000 + "}]", "a number that is too long"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"text": "a"}, 5]', "this item is a number"),
        ("[", "Expecting value"),
    ],
)
def test_arrays_that_are_none(content: str, part: str, tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "a.json").write_text(content)
    with complains(BadFile, part, at="a.json"):
        list(read_corpus(str(tmp_path / "a.json")))


def test_an_array_is_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    """A small packed file may hold an array that fills the memory."""
    monkeypatch.setattr(text_files, "_LONGEST", 500)
    monkeypatch.setattr(text_files, "_BLOCK", 10)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"[" + b'{"text": "again"},\n' * 10_000 + b'{"text": "last"}]'))
    assert sum(1 for _ in read_corpus(str(path))) == 10_001
    path.write_bytes(gzip.compress(b'[{"text": "a"},\n{"text": [' + b"5,\n" * 10_000))
    with complains(BadFile, "more than 500 characters", at="item 2"):
        list(read_corpus(str(path)))


def test_dictionary_encoded_text_is_decoded_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, path = "a" * 2_000_000, tmp_path / "a.parquet"
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": rows, "n": range(64)}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(text_files, "_LARGE_COLUMN", 2**20)
    before = pa.total_allocated_bytes()
    documents = read_corpus(str(path))
    assert next(documents) == text
    assert pa.total_allocated_bytes() - before < 10 * len(text), "not 64 copies"
    assert sum(1 for _ in documents) == 63


def test_two_columns_of_one_name_are_refused(tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "a.csv").write_text("text,n,text\na,1,b\n")
    with complains(BadFile, "two columns are called 'text'", at="a.csv, line 1"):
        list(read_corpus(str(tmp_path / "a.csv")))
    assert list(read_corpus(TextSource(path=str(tmp_path / "a.csv"), field="n"))) == ["1"]


def test_fields_inside_others() -> None:
    row = {"a.b": "plain", "meta": {"body": "inside"}, "answers": {"text": ["first"]}}
    found = [TextField.parse(name).text(row, "x") for name in ("a.b", "meta.body", "answers.text.0")]
    assert found == ["plain", "inside", "first"]
    assert TextField.parse("meta.body").columns(["meta", "a.b", "other"]) == ["meta"]


@pytest.mark.parametrize("template", ["{question", "{}", "{question!r}", "{question:>9}", "{{question}}"])
def test_what_is_no_template(template: str, complains: Callable[..., Any]) -> None:
    with complains(ConfigError, repr(template), at="field"):
        TextField.parse(template)


def test_a_missing_field_of_a_template_is_named(tmp_path: Path, complains: Callable[..., Any]) -> None:
    pd.DataFrame(QA).to_parquet(tmp_path / "qa.parquet")
    source = TextSource(path=str(tmp_path / "qa.parquet"), field="{question}{reply}")
    with complains(BadFile, "no field 'reply' here; it has: answer, n, question", at="row 1"):
        list(read_corpus(source))
    (tmp_path / "null.jsonl").write_text('{"question": "a", "answer": null}\n')
    with complains(BadFile, "the field 'answer' holds null", at="line 1"):
        list(read_corpus(TextSource(path=str(tmp_path / "null.jsonl"), field="{question}{answer}")))


def test_folders_and_patterns(tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "b" / "2.txt").write_text("third\n\nfourth")
    pd.DataFrame({"text": ["first"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b" / "1.jsonl.gz").write_bytes(gzip.compress(b'{"text": "second"}\n'))
    for name in ("README.md", ".hidden.txt", ".cache/x.txt"):
        (tmp_path / name).write_text("no text of the corpus")
    assert list(read_corpus(str(tmp_path))) == ["first", "second", "third\n", "fourth"]
    assert list(read_corpus(str(tmp_path / "**" / "*.txt"))) == ["third\n", "fourth"]
    with complains(NotFound, "no file matches", at="*.csv"):
        list(read_corpus(str(tmp_path / "*.csv")))


def test_a_downloaded_dataset_has_splits(tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        pd.DataFrame({"text": [split]}).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert list(read_corpus(str(tmp_path))) == ["train"]
    assert list(read_corpus(TextSource(path=str(tmp_path), split="test"))) == ["test"]
    with complains(NotFound, "split 'validation'"):
        list(read_corpus(TextSource(path=str(tmp_path), split="validation")))
    saved = tmp_path / "saved"
    both = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(saved)
    assert list(read_corpus(TextSource(path=str(saved), split="test"))) == ["test"]


def test_identity_follows_the_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    pattern = TextSource(path=str(tmp_path / "*.txt"))
    first = source_identity(pattern)
    assert [file.name for file in source_files(pattern)] == ["a.txt", "b.txt"]
    (tmp_path / "b.txt").write_text("c")
    assert source_identity(pattern) != first
    one = TextSource(path=str(tmp_path / "a.txt"))
    assert isinstance(source_identity(one), str), "as before there were splits and encodings"
    assert source_identity(one.model_copy(update={"encoding": "cp1252"})) != source_identity(one)
    hub = TextSource(path="org/name")
    assert source_identity(hub) == "org/name"
    assert source_identity(hub.model_copy(update={"split": "test"})) != "org/name"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_a_byte_order_mark_decides(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Müller\n\n你好".encode(encoding))
    assert list(read_corpus(str(tmp_path / "a.txt"))) == ["Müller\n", "你好"]


@pytest.mark.parametrize(
    ("encoding", "text", "guessed"),
    [
        ("cp1252", "The patient – Müller – is well.", "cp1252"),
        ("cp1252", "déjà vu", "cp1252"),  # half of the letters are no ASCII
        ("utf-16-le", "The patient is well.", "utf-16-le"),
        ("cp1251", "Пациент чувствует себя хорошо, температура нормальная, боли нет.", "cp1251"),
        ("gb18030", "病人感觉良好，体温正常，没有疼痛。今天可以出院回家休息。", "gb18030"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["as is", "gzip"])
def test_the_encoding_is_guessed_with_its_line(
    encoding: str, text: str, guessed: str, packed: bool, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    head = "plain\n\n" * 4_000 if encoding != "utf-16-le" else ""
    data = (head + text).encode(encoding)
    path.write_bytes(gzip.compress(data) if packed else data)
    line = 8_001 if head else 1
    with complains(BadFile, f"it looks like {guessed}", f"encoding: {guessed}", at=f"line {line}") as _:
        list(read_corpus(str(path)))
    assert list(read_corpus(TextSource(path=str(path), encoding=guessed)))[-1] == text


def test_a_wrong_encoding(tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x81 here")
    with complains(ConfigError, "no encoding 'cp9999'", at="encoding"):
        list(read_corpus(TextSource(path=str(tmp_path / "a.txt"), encoding="cp9999")))
    with complains(BadFile, "the text is not cp1252", at="a.txt"):
        list(read_corpus(TextSource(path=str(tmp_path / "a.txt"), encoding="cp1252")))


def test_the_hub_is_asked_for_subset_and_split(monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]) -> None:
    asked: list[Any] = []

    def load_dataset(*names: str, **options: Any) -> list[dict[str, str]]:
        asked.append((names, options))
        return [{"text": "a"}]

    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=config))
    assert list(read_corpus(TextSource(path="hf:imdb", subset="plain", split="test[:10%]"))) == ["a"]
    assert asked == [(("imdb", "plain"), {"split": "test[:10%]", "streaming": True})]
    config.HF_HUB_OFFLINE = True
    assert list(read_corpus("hf:imdb")) == ["a"]
    assert asked[1] == (("imdb",), {"split": "train", "streaming": False}), "its cache is read"
    with complains(NotFound, "there is no text file 'imdb'", "hf:name"):
        list(read_corpus("imdb"))


def test_sources_in_a_file_may_be_paths_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "a.yaml").write_text("sources: [notes, 'data/*.jsonl', 'hf:imdb', org/name]\n")
    paths = read_config_file(tmp_path / "a.yaml", "study")["sources"]
    assert paths == [str(tmp_path / "notes"), str(tmp_path / "data/*.jsonl"), "hf:imdb", "org/name"]
    assert [TextSource.model_validate(path).name for path in paths] == ["notes", "text", "imdb", "name"]
