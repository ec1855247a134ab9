"""Text from files: JSON lines (plain or gzip), plain text, or a dataset on the Hugging Face hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from saeffect.errors import BadFile, EmptySelection, NotFound

__all__ = ["is_held_out", "read_corpus"]

# Of files; ids of datasets may hold dots too.
_SUFFIXES = (".gz", ".json", ".jsonl", ".txt")


def read_corpus(source: str, *, field: str = "text", split: str = "train") -> Iterator[str]:
    """Documents, one string each, in file order.

    Args:
        source: A `.jsonl` file with one object a line; a `.txt` file with one document a paragraph (blank
            lines between them); either of them with `.gz` behind; or a dataset id on the hub (streamed).
        field: Which field of each row holds the text.
        split: Split of a hub dataset.

    Raises:
        NotFound: No such file, and no such dataset.
        BadFile: Not UTF-8, not gzip, not JSON, or a row without the field; the message gives the line.
        EmptySelection: Not one document.
    """
    path = Path(source).expanduser()
    if path.is_file():
        plain = path.name.removesuffix(".gz").endswith(".txt")
        rows = _paragraphs(path) if plain else _json_rows(path, field)
    elif path.suffix in _SUFFIXES or path.is_absolute() or source.count("/") != 1:
        raise NotFound(f"there is no text file {source!r}.", at=source, fix="check the path, or give a dataset id.")
    else:
        rows = _hub_rows(source, field, split)
    count = 0
    for text in rows:
        if text.strip():
            count += 1
            yield text
    if not count:
        raise EmptySelection("the corpus holds not one document with text in it.", at=source)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out part: decided by its content, so duplicates stay together.

    Example:
        >>> sum(is_held_out(str(i), 0.1) for i in range(1000))
        106
    """
    head = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()[:4]
    return int.from_bytes(head, "big") < share * 2**32


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise BadFile(
            f"the text is not UTF-8: {error.reason}.",
            at=f"{path}, after line {number}",
            fix="save it as UTF-8.",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadFile(
            f"the file cannot be read to its end: {error}.",
            at=f"{path}, after line {number}",
            fix="copy it again.",
        ) from error


def _json_rows(path: Path, field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadFile(f"this line is not JSON: {error.msg}.", at=f"{path}, line {number}") from error
        value = row.get(field) if isinstance(row, dict) else None
        if not isinstance(value, str):
            have = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise BadFile(f"this row has no text field {field!r}; it has: {have}.", at=f"{path}, line {number}")
        yield value


def _paragraphs(path: Path) -> Iterator[str]:
    held: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held)
            held = []
    if held:
        yield "".join(held)


def _hub_rows(source: str, field: str, split: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source, split=split, streaming=True)
        for row in rows:
            if field not in row:
                raise BadFile(f"the dataset has no column {field!r}; it has: {', '.join(sorted(row))}.", at=source)
            if not isinstance(row[field], str):
                kind = type(row[field]).__name__
                raise BadFile(f"the column {field!r} holds {kind}, not text.", at=source, fix="name another field.")
            yield row[field]
    except BadFile:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotFound(
            f"cannot read the dataset {source!r}: {reason}",
            at=source,
            fix="check the name and your connection, or give a .jsonl file.",
        ) from error
