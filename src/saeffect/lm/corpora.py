"""Text from wherever people have it (JSON lines, plain text, CSV, Parquet, saved datasets, the hub), also as rows."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from saeffect.config import TextSource
from saeffect.config_chat import ChatKeys
from saeffect.errors import BadFile, EmptySelection, NotFound, SaeffectError, first_line
from saeffect.io import fingerprint, hash_folder
from saeffect.lm.chat_rows import cut_rows
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.tokens import tokenizer_identity
from saeffect.paths import refuse_special, user_path

T = TypeVar("T")

__all__ = ["interleave", "is_held_out", "read_corpus", "StreamedText"]

_FORMATS = (
    ".jsonl, .txt, .csv and .tsv, each also as .gz or .zst; .parquet; a folder that save_to_disk of datasets wrote;"
    " or a dataset id on the hub"
)
_READ = f"what is read: {_FORMATS}."
_CHATS = 'a conversation is a list such as [{"role": "user", "content": "..."}], one a line of a .jsonl file.'
# Of files; ids of datasets may contain dots too.
_SUFFIXES = (".gz", ".zst", ".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet")
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
# Characters of one line or paragraph: a few compressed megabytes could expand to a line that fills the memory.
_LONGEST = 2**27
_SPLIT = "train"  # of datasets
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_corpus(source: str, *, field: str = "text", chat: bool = False) -> Iterator[str]:
    """Documents, one string each, in the order of the file; half a character becomes U+FFFD.

    With `chat` a document is a list of messages, or its JSON in a text, and comes as JSON: see `chat.messages_of`.

    Args:
        source: A file: `.jsonl`, one object a line; `.txt`, one document a paragraph; `.csv` or `.tsv` with a line of
            column names; each plain, gzip or zstd whatever its name; `.parquet`. Or a folder from `save_to_disk` of the
            library datasets, or a dataset id on the hub (streamed); of both the split "train".
        field: Field of a row, or column, with the text.

    Raises:
        NotFound: No such file or dataset.
        BadFile: Not UTF-8, damaged, another format, too long a line, or a row without text (with its line).
        ConfigError: `source` is no valid path.
        EmptySelection: No document.
    """
    path, wanted = user_path(source), _Field(field, chat)
    refuse_special(path, "text")
    if path.is_dir():
        rows = _saved_dataset(path, wanted)
    elif path.is_file():
        rows = _file(path, wanted)
    elif path.suffix in _SUFFIXES or path.is_absolute() or source.count("/") != 1:
        raise NotFound(f"there is no text file {source!r}.", at=source, fix="check the path, or give a dataset id.")
    else:
        rows = _hub_rows(source, wanted)
    count = 0
    for text in rows:
        if text.strip():
            count += 1
            yield _LONE_SURROGATE.sub("\ufffd", text)
    if not count:
        raise EmptySelection("the corpus holds not one document with text in it.", at=source)


@dataclass(frozen=True)
class _Field:
    """Where in a row a document stands, and whether it is a list of messages."""

    name: str
    chat: bool


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is held out: decided by its content, so duplicates stay together.

    Example:
        >>> sum(is_held_out(str(i), 0.1) for i in range(1000))
        106
    """
    head = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()[:4]
    return int.from_bytes(head, "big") < share * 2**32


def _file(path: Path, field: _Field) -> Iterator[str]:
    """The texts of a file; compressed and Parquet files are recognised by their first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BadFile(f"the file cannot be read: {error.strerror}.", at=str(path)) from error
    if start == _PARQUET:
        return _parquet_rows(path, field)
    packed = path.suffix if path.suffix in (".gz", ".zst") else ""
    kind = path.with_suffix("").suffix if packed else path.suffix
    if start.startswith(_GZIP):
        packed = ".gz"
    elif start == _ZSTD:
        packed = ".zst"
    lines = _lines(path, packed)
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, lines, field, "," if kind == ".csv" else "\t")
    if kind == ".txt" and field.chat:
        raise BadFile("a .txt file holds no messages.", at=str(path), fix=_CHATS)
    return _paragraphs(path, lines) if kind == ".txt" else _json_rows(path, lines, field)


def _lines(path: Path, packed: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open("rb") as raw, io.TextIOWrapper(_unpacked(raw, packed), encoding="utf-8-sig") as file:
            while line := file.readline(_LONGEST):
                number += 1
                if len(line) == _LONGEST:
                    raise _too_long(f"{path}, line {number}")
                yield number, line
    except UnicodeDecodeError as error:
        raise BadFile(
            f"the text is not UTF-8: {error.reason}.",
            at=f"{path}, after line {number}",
            fix=f"save it as UTF-8; {_READ}",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadFile(
            f"the file cannot be read to its end: {error}.",
            at=f"{path}, after line {number}",
            fix=f"copy it again; {_READ}",
        ) from error


def _unpacked(raw: IO[bytes], packed: str) -> IO[bytes]:
    if packed == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if packed == ".zst":
        import pyarrow as pa

        return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return raw


def _too_long(at: str) -> BadFile:
    return BadFile(
        f"here stand more than {_LONGEST:,} characters without an end; a document was expected.",
        at=at,
        fix="put one document on a line (.jsonl), or blank lines between documents (.txt).",
    )


def _json_rows(path: Path, lines: Iterator[tuple[int, str]], field: _Field) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise BadFile("lists and objects stand too deep in each other on this line.", at=at) from error
        except ValueError as error:  # not JSON, or a number of thousands of digits
            message = getattr(error, "msg", "it holds a number that is too long")
            raise BadFile(f"this line is not JSON: {message}.", at=at, fix=_READ) from error
        if not isinstance(row, dict):
            raise BadFile(f"this line holds {_kind(row)}; it has to be an object with the field {field.name!r}.", at=at)
        yield _text_of(row, field, at)


def _csv_rows(path: Path, lines: Iterator[tuple[int, str]], field: _Field, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(_LONGEST)  # of the whole process; Python's own is too small for documents
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            at = f"{path}, line {reader.line_num}"
            if not names:
                names = cells
            elif cells and len(cells) != len(names):
                raise BadFile(f"this row has {len(cells)} cells where the first line has {len(names)}.", at=at)
            elif cells:
                yield _text_of(dict(zip(names, cells, strict=True)), field, at)
    except csv.Error as error:
        at = f"{path}, line {reader.line_num}"
        raise BadFile(f"this is not CSV: {error}.", at=at, fix="check the quotation marks.") from error


def _paragraphs(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    held = io.StringIO()
    for number, line in lines:
        if line.strip():
            if held.tell() + held.write(line) > _LONGEST:
                raise _too_long(f"{path}, line {number}")
        elif held.tell():
            yield held.getvalue()
            held = io.StringIO()
    if held.tell():
        yield held.getvalue()


def _parquet_rows(path: Path, field: _Field) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if field.name not in file.schema_arrow.names:
            _text_of(dict.fromkeys(file.schema_arrow.names), field, str(path))
        number = 0
        for batch in file.iter_batches(64, columns=[field.name]):
            for value in batch.column(0):
                number += 1
                yield _text_of({field.name: value.as_py()}, field, f"{path}, row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadFile(f"this Parquet file cannot be read: {first_line(error).rstrip('.')}.", at=str(path)) from error


def _saved_dataset(path: Path, field: _Field) -> Iterator[str]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        raise BadFile(
            "this is a folder, and not one that save_to_disk of datasets wrote.",
            at=str(path),
            fix=f"name the file in it; {_READ}",
        )
    from datasets import DatasetDict, load_from_disk

    try:
        found: Any = load_from_disk(str(path))
    except Exception as error:  # of many kinds
        raise BadFile(f"this saved dataset cannot be read: {first_line(error).rstrip('.')}.", at=str(path)) from error
    if isinstance(found, DatasetDict):
        if _SPLIT not in found:
            raise BadFile(
                f"this saved dataset has no split {_SPLIT!r}; it has: {', '.join(sorted(found))}.",
                at=str(path),
                fix="name the folder of one of them.",
            )
        found = found[_SPLIT]
    for number, row in enumerate(found, start=1):
        yield _text_of(row, field, f"{path}, row {number}")


def _hub_rows(source: str, field: _Field) -> Iterator[str]:
    from datasets import load_dataset

    try:
        for number, row in enumerate(load_dataset(source, split=_SPLIT, streaming=True), start=1):
            yield _text_of(row, field, f"{source}, row {number}")
    except BadFile:
        raise
    except Exception as error:
        raise NotFound(
            f"cannot read the dataset {source!r}: {first_line(error).rstrip('.')}",
            at=source,
            fix=f"check the name and your connection; {_READ}",
        ) from error


def _text_of(row: Mapping[str, Any], field: _Field, at: str) -> str:
    name = field.name
    if name not in row:
        names = [str(other)[:40] for other in sorted(map(str, row))]
        have = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "nothing"
        fix = f"name the one that holds {'the messages' if field.chat else 'text'}."
        raise BadFile(f"there is no field {name!r} here; it has: {have}.", at=at, fix=fix)
    value = row[name]
    if field.chat:
        return _messages(value, name, at)
    if not isinstance(value, str):
        chat = isinstance(value, list) and all(isinstance(message, dict) for message in value)
        usual = "leave out such rows, or name the field that holds text."
        fix = "these look like messages: set format: chat." if chat else usual
        raise BadFile(f"the field {name!r} holds {_kind(value)}, not text.", at=at, fix=fix)
    return value


def _messages(value: Any, name: str, at: str) -> str:
    """A list of messages as JSON; a text is taken to be JSON already, as cells of CSV are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return value
    if not isinstance(value, list):
        raise BadFile(f"the field {name!r} holds {_kind(value)}, not a list of messages.", at=at, fix=_CHATS)
    return json.dumps(value, ensure_ascii=False)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return json.dumps(value)
    kinds = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def interleave(*streams: Iterator[T]) -> Iterator[tuple[int, T]]:
    """Take one row from each stream in turn, until the first of them ends; yields (stream index, row)."""
    while True:
        for index, stream in enumerate(streams):
            row = next(stream, None)
            if row is None:
                return
            yield index, row


@dataclass(frozen=True, eq=False)
class StreamedText:
    """A corpus that is read and tokenised as its rows are asked for: it may be larger than memory.

    Rows of `context_size` tokens come from each source in turn, until one ends or there are `tokens` in all. The share
    `held_out` of documents is left out. The seed mixes `buffer` documents of each source; 1 keeps file order. `how`
    says what a document is.
    """

    lm: LanguageModel
    sources: tuple[TextSource, ...]
    context_size: int
    tokens: int | None = None
    held_out: float = 0.0
    seed: int = 0
    buffer: int = 1000
    how: ChatKeys = field(default_factory=ChatKeys)

    @property
    def n_rows(self) -> int | None:
        return None if self.tokens is None else max(1, self.tokens // self.context_size)

    def identity(self) -> str:
        """SHA-256 of the files (of a dataset on the hub: its name), the tokenizer, and how they are packed."""
        places = [user_path(source.path) for source in self.sources]
        files = [hash_folder(p) if p.exists() else s.path for p, s in zip(places, self.sources, strict=True)]
        fields = [source.field for source in self.sources]
        how = [self.context_size, self.n_rows, self.held_out, self.seed, self.buffer]
        bos = self.lm.bos_id
        more: list[Any] = [] if bos is None else [bos]
        if self.how.format == "chat":
            more += [self.lm.chat_format.identity(), self.how.system]
        return fingerprint([files, fields, tokenizer_identity(self.lm.tokenizer), how, *more])

    def rows(self) -> Iterator[NDArray[np.int32]]:
        """Token ids, int32 `[context_size]`, one row after the other.

        EmptySelection if the text ends before `tokens` tokens; SaeffectError, naming the source, if one cannot be read
        or is shorter than a row.
        """
        streams = [self._stream(index) for index in range(len(self.sources))]
        count = 0
        for _, row in islice(interleave(*streams), self.n_rows):
            count += 1
            yield row
        if self.n_rows is not None and count < self.n_rows:
            raise EmptySelection(
                f"the text gives {count * self.context_size:,} tokens in equal parts from each source;"
                f" {self.tokens:,} are wanted.",
                at="tokens",
                fix="give more text, or ask for fewer tokens.",
            )

    def _stream(self, index: int) -> Iterator[NDArray[np.int32]]:
        source, chat = self.sources[index], self.how.format == "chat"
        try:
            documents = read_corpus(source.path, field=source.field, chat=chat)
            texts = (t for t in documents if not is_held_out(t, self.held_out))
            mixed = _mixed(texts, self.buffer, np.random.default_rng([self.seed, index]))
            yield from (row.ids for row in cut_rows(self.lm, mixed, self.context_size, self.how))
        except SaeffectError as error:
            raise error.placed(f"text.{index}") from None


def _mixed(texts: Iterable[str], size: int, generator: np.random.Generator) -> Iterator[str]:
    """The texts in a random order, from a buffer of `size` documents."""
    held: list[str] = []
    for text in texts:
        if len(held) < size:
            held.append(text)
            continue
        at = int(generator.integers(size))
        yield held[at]
        held[at] = text
    yield from (held[i] for i in generator.permutation(len(held)))
