"""Text files as rows: JSON, plain text, CSV, Parquet, Arrow, compressed or not."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from saeffect.errors import BadFile, ConfigError, first_line
from saeffect.lm.fields import TextField, kind_of

__all__ = ["FORMATS", "SUFFIXES", "Record", "file_rows", "format_of"]

FORMATS = (
    ".jsonl, .json, .txt, .csv and .tsv, each also as .gz or .zst; .parquet; .arrow; a folder or a pattern such as"
    " data/*.jsonl.gz of them; a folder that save_to_disk of datasets wrote; or a dataset id on the hub"
)
_READ = f"what is read: {FORMATS}."
_PACKED = (".gz", ".zst")
_ARROW = (".arrow", ".feather", ".ipc")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".parquet", *_ARROW)
_GZIP, _ZSTD, _PARQUET, _ARROW_FILE = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARRO"
_ARROW_STREAM = b"\xff\xff\xff\xff"
# Most characters of a line or paragraph: a few compressed megabytes could expand to a line that fills the memory.
_LONGEST = 2**27
_LARGE_COLUMN = 2**24  # bytes of a group of rows
_BLOCK = 2**16  # characters of an array that are read at once
_SPACE = re.compile(r"[ \t\r\n]*")
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
_BYTE_ORDER_MARKS = (  # the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# A text with more than this share and number of bytes above 127 is not in a Western alphabet.
_FOREIGN_SHARE, _MIN_FOREIGN = 0.15, 16


class Record(NamedTuple):
    """One row: its fields (for plain text, the text itself), and its position, such as "a.jsonl, line 3"."""

    values: Mapping[str, Any] | str
    at: str


def file_rows(path: Path, field: TextField, encoding: str = "utf-8") -> Iterator[Record]:
    """The rows of a file, in its order; tables give at least the columns of `field`.

    Compressed, Parquet and Arrow files are recognised by their first bytes, the others by their name: `.txt`, a
    document a paragraph; `.csv` and `.tsv`, with a line of column names; `.json`, an array of objects; any other, an
    object a line. BadFile, with its position: another format or encoding, damaged, too long a line. ConfigError: no
    such encoding.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BadFile(f"the file cannot be read: {error.strerror}.", at=str(path)) from error
    if start == _PARQUET:
        return _parquet_rows(path, field)
    if start in (_ARROW_FILE, _ARROW_STREAM) or format_of(path) in _ARROW:
        return _arrow_rows(path, start)
    packed = path.suffix if path.suffix in _PACKED else ""
    if start.startswith(_GZIP):
        packed = ".gz"
    elif start == _ZSTD:
        packed = ".zst"
    kind, lines = format_of(path), _read_lines(path, packed, encoding)
    if kind in _DELIMITERS:
        return _csv_rows(path, lines, field, _DELIMITERS[kind])
    if kind == ".txt":
        return _paragraphs(path, lines)
    return _json_array(path, lines, field) if kind == ".json" else _json_rows(path, lines, field)


def format_of(path: Path) -> str:
    """The suffix of a file's name, without that of its compression: `.csv` for `a.csv.gz`."""
    return (path.with_suffix("") if path.suffix in _PACKED else path).suffix


def _read_lines(path: Path, packed: str, encoding: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        how = _choose_encoding(path, packed, encoding)
        with path.open("rb") as raw, io.TextIOWrapper(_decompress(raw, packed), encoding=how) as file:
            while line := file.readline(_LONGEST):
                number += 1
                if len(line) == _LONGEST:
                    raise _too_long_error(f"{path}, line {number}")
                if number == 1 and "\0" in line:  # UTF-16 without a byte order mark, which may be valid UTF-8
                    raise UnicodeError("null characters")
                yield number, line
    except UnicodeError as error:
        raise _encoding_error(path, packed, encoding, number, error) from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadFile(
            f"the file cannot be read to its end: {error}.",
            at=f"{path}, after line {number}",
            fix=f"copy it again; {_READ}",
        ) from error


def _decompress(raw: IO[bytes], packed: str) -> IO[bytes]:
    if packed == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if packed == ".zst":
        import pyarrow as pa

        return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return raw


def _choose_encoding(path: Path, packed: str, wanted: str) -> str:
    """The encoding to read with: that of the byte order mark, if there is one."""
    try:
        name = codecs.lookup(wanted).name
    except LookupError as error:
        fix = "write one that Python knows, such as utf-8, cp1252 or utf-16."
        raise ConfigError(f"there is no encoding {wanted!r}.", at="encoding", fix=fix) from error
    with path.open("rb") as raw:
        start = _decompress(raw, packed).read(4)
    marked = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if start.startswith(mark)), None)
    return marked or ("utf-8-sig" if name == "utf-8" else name)


def _encoding_error(path: Path, packed: str, wanted: str, number: int, error: UnicodeError) -> BadFile:
    """The error for a file that has another encoding than `wanted`, after line `number` at the earliest."""
    reason = getattr(error, "reason", str(error))
    at, guess, quote = f"{path}, after line {number}", None, ""
    if codecs.lookup(wanted).name == "utf-8":
        with path.open("rb") as raw:
            file = _decompress(raw, packed)
            for count in range(1, number + 100_000):  # a decoder reads ahead by a block
                line = file.readline(_LONGEST)
                position = _first_bad_byte(line)
                if position is not None:
                    at, reason = f"{path}, line {count}", f"byte 0x{line[position]:02x}"
                    guess = _guess_encoding(line + file.read(65_536))
                    quote = _quote_around(line, position, guess)
                if position is not None or not line:
                    break
    problem = f"the text is not {'UTF-8' if codecs.lookup(wanted).name == 'utf-8' else wanted} ({reason})"
    if guess is None:
        return BadFile(f"{problem}, and does not look like text.", at=at, fix=_READ)
    return BadFile(
        f"{problem}; it looks like {guess}{quote}.",
        at=at,
        fix=f"say so in the study or recipe, encoding: {guess}, or save the file as UTF-8.",
    )


def _first_bad_byte(line: bytes) -> int | None:
    """Position of the first byte that is not UTF-8 text; None if there is none."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return line.index(0) if 0 in line else None


def _guess_encoding(data: bytes) -> str | None:
    """The likely encoding of bytes that are not UTF-8; None if they are not text."""
    if b"\0" in data[:200]:
        for name, zeros in (("utf-16-le", data[1:200:2]), ("utf-16-be", data[0:200:2])):
            if zeros.count(0) > len(zeros) / 2:
                return name
        return None
    if sum(byte < 32 and byte not in b"\t\n\r\f" for byte in data) > 0.01 * len(data):
        return None
    foreign = sum(byte > 127 for byte in data)
    if foreign > max(_MIN_FOREIGN, _FOREIGN_SHARE * len(data)):
        from charset_normalizer import from_bytes

        best = from_bytes(data).best()
        return None if best is None else best.encoding
    for name in ("cp1252", "latin-1"):
        try:
            data.decode(name)
        except UnicodeDecodeError:
            continue
        return name
    return None


def _quote_around(line: bytes, position: int, encoding: str | None) -> str:
    if encoding is None or encoding.startswith("utf-16"):
        return ""
    return f" ({line[max(0, position - 12) : position + 12].decode(encoding, 'replace').strip()!r})"


def _too_long_error(at: str) -> BadFile:
    return BadFile(
        f"this document has more than {_LONGEST:,} characters.",
        at=at,
        fix="put one document on a line (.jsonl), or blank lines between documents (.txt).",
    )


def _json_rows(path: Path, lines: Iterable[tuple[int, str]], field: TextField) -> Iterator[Record]:
    for number, line in lines:
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _json_error("this line", at, error) from error
        if not isinstance(row, dict):
            raise BadFile(
                f"this line holds {kind_of(row)}; it has to be an object with the field {field.names[0]!r}.", at=at
            )
        yield Record(row, at)


def _json_error(what: str, at: str, error: ValueError | RecursionError) -> BadFile:
    if isinstance(error, RecursionError):
        return BadFile(f"lists and objects are nested too deeply in {what}.", at=at)
    message = getattr(error, "msg", "it holds a number that is too long")  # of thousands of digits
    return BadFile(f"{what} is not JSON: {message}.", at=at, fix=_READ)


def _json_array(path: Path, lines: Iterator[tuple[int, str]], field: TextField) -> Iterator[Record]:
    """An array of objects, or (as is common in .json files) an object a line."""
    number, first = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    if not first.lstrip().startswith("["):
        rest = iter([(number, first)] if first else [])
        yield from _json_rows(path, chain(rest, lines), field)
        return
    for index, row in enumerate(_array_items(first.lstrip()[1:], (line for _, line in lines), path), start=1):
        at = f"{path}, item {index}"
        if not isinstance(row, dict):
            raise BadFile(f"this item is {kind_of(row)}; it has to be an object.", at=at, fix=_READ)
        yield Record(row, at)


def _array_items(text: str, lines: Iterator[str], path: Path) -> Iterator[Any]:
    """The items of a JSON array, from the text after its bracket: one by one, as together they may fill the memory."""
    decoder, start, n_characters, n_items, sign = json.JSONDecoder(), 0, _BLOCK, 0, "["
    while sign != "]":
        try:
            start = _skip_space(text, start)
            if sign == "[" and text[start : start + 1] == "]":
                start += 1
                break
            item, end = decoder.raw_decode(text, start)
            end = _skip_space(text, end)
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except json.JSONDecodeError as error:
            # No JSON token spans lines, so an error before the end of the text read so far is final.
            more = "" if text[error.pos :].strip(" \t\r\n,:") else "".join(_next_lines(lines, n_characters))
            if not more:
                raise _json_error("this file", str(path), error) from error
            text, start, n_characters = text[start:] + more, 0, 2 * n_characters
            if len(text) > _LONGEST:
                raise _too_long_error(f"{path}, item {n_items + 1}") from None
            continue
        except (RecursionError, ValueError) as error:
            raise _json_error("this item", f"{path}, item {n_items + 1}", error) from error
        n_items, sign, start, n_characters = n_items + 1, text[end], end + 1, _BLOCK
        yield item
    if text[start:].strip() or any(line.strip() for line in lines):
        raise BadFile("there is text after the end of this array.", at=str(path), fix=_READ)


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _next_lines(lines: Iterator[str], characters: int) -> Iterator[str]:
    """The next lines, of at least `characters` characters in all."""
    while characters > 0 and (line := next(lines, "")):
        characters -= len(line)
        yield line


def _csv_rows(path: Path, lines: Iterator[tuple[int, str]], field: TextField, delimiters: str) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST)  # of the whole process; Python's own is too small for documents
    header = next(lines, None)
    if header is None:
        return
    reader = csv.reader(
        (line for _, line in chain([header], lines)),
        delimiter=_find_delimiter(header[1], field, delimiters),
        strict=True,
    )
    names: list[str] = []
    try:
        for cells in reader:
            at = f"{path}, line {reader.line_num}"
            if not names:
                names = cells
                doubled = [name for name in field.names if names.count(name) > 1]
                if doubled:
                    fix = "give the other one another name."
                    raise BadFile(f"two columns are called {doubled[0]!r}.", at=at, fix=fix)
            elif cells and len(cells) != len(names):
                raise BadFile(f"this row has {len(cells)} cells where the first line has {len(names)}.", at=at)
            elif cells:
                yield Record(dict(zip(names, cells, strict=True)), at)
    except csv.Error as error:
        at = f"{path}, line {reader.line_num}"
        raise BadFile(f"this is not CSV: {error}.", at=at, fix="check the quotation marks.") from error


def _find_delimiter(header: str, field: TextField, delimiters: str) -> str:
    """The first delimiter that gives the columns of `field`; spreadsheets in many languages write semicolons."""
    for delimiter in delimiters:
        names = next(csv.reader([header], delimiter=delimiter), [])
        if set(field.names) <= set(names):
            return delimiter
    return delimiters[0]


def _paragraphs(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    buffer, first = io.StringIO(), 0
    for number, line in lines:
        if line.strip():
            first = first or number
            if buffer.tell() + buffer.write(line) > _LONGEST:
                raise _too_long_error(f"{path}, line {number}")
        elif buffer.tell():
            yield Record(buffer.getvalue(), f"{path}, line {first}")
            buffer, first = io.StringIO(), 0
    if buffer.tell():
        yield Record(buffer.getvalue(), f"{path}, line {first}")


def _parquet_rows(path: Path, field: TextField) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        columns = field.columns(names) or names
        batches = file.iter_batches(_rows_at_once(file.metadata, columns), columns=columns)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            if number == 1 and set(columns) != set(names):
                field.text(dict.fromkeys(names, "") | row, f"{path}, row 1")
            yield Record(row, f"{path}, row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadFile(f"this Parquet file cannot be read: {first_line(error).rstrip('.')}.", at=str(path)) from error


def _rows_at_once(metadata: Any, columns: list[str]) -> int:
    """How many rows of a Parquet file to decode at once: 1 where a long text may be stored once for many rows."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(metadata.num_columns)):
            stored_once = column.has_dictionary_page and column.path_in_schema.partition(".")[0] in columns
            if stored_once and column.total_uncompressed_size > _LARGE_COLUMN:
                return 1
    return 64


def _arrow_rows(path: Path, start: bytes) -> Iterator[Record]:
    """Arrow's file format (Feather) and its stream format (tables of datasets)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if start == _ARROW_FILE:
                file = pa.ipc.open_file(source)
                batches: Iterable[Any] = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                batches = pa.ipc.open_stream(source)
            parts = (batch.slice(first, 64) for batch in batches for first in range(0, batch.num_rows, 64))
            for number, row in enumerate((row for part in parts for row in part.to_pylist()), start=1):
                yield Record(row, f"{path}, row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadFile(f"this Arrow file cannot be read: {first_line(error).rstrip('.')}.", at=str(path)) from error
