"""Readers of word vector files, one a format; `read_vectors` detects the format from the first bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from saeffect.checksums import NPZ_ERRORS, npz_shapes, open_tensors, unpacked_limit
from saeffect.errors import BadFile, NotFound
from saeffect.paths import refuse_special

__all__ = ["VECTOR_SUFFIXES", "read_vectors"]

FloatArray = NDArray[np.float32]

VECTOR_SUFFIXES = frozenset({".txt", ".vec", ".gz", ".bin", ".npz", ".safetensors", ".kv", ".model", ".pkl", ".pickle"})
_PICKLE_SUFFIXES = frozenset({".kv", ".model", ".pkl", ".pickle"})
_LONGEST_WORD = 4096  # bytes; a longer "word" in a binary file means that it is damaged
_LARGEST_DIM = 100_000
_LONGEST_LINE = 1 << 22  # bytes
_NUMBER = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_vectors(path: Path) -> tuple[list[str], FloatArray]:
    """Words as spelled, in the file's order, and their vectors, float32 [n, dim], finite. NotFound: the list of
    words beside a `.safetensors` is missing. BadFile, with its line: empty, truncated, ragged, not UTF-8, not
    finite, or a pickle.
    """
    refuse_special(path, "file of word vectors")
    if path.is_dir():
        raise BadFile("this is a folder; a file of word vectors was expected.", at=str(path))
    if path.stat().st_size == 0:
        raise BadFile("the file is empty.", at=str(path))
    try:
        words, vectors = _read_detected(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        damage = f"the compressed file is truncated or damaged ({error})."
        raise BadFile(damage, at=str(path), fix="get it anew.") from error
    except OSError as error:
        raise BadFile(f"the file cannot be read ({error.strerror or error}).", at=str(path)) from error
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        _check_finite(vectors[bad[0]], words[bad[0]], f"{path}, line {bad[0] + 1}")
    return words, vectors


def _read_detected(path: Path) -> tuple[list[str], FloatArray]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        max_bytes = unpacked_limit(path.stat().st_size) if gzipped else path.stat().st_size
        stream = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw))) if gzipped else raw
        if stream.peek(3).startswith(_BYTE_ORDER_MARK):
            stream.read(3)
        start = stream.peek(_LONGEST_WORD)
        if start.startswith(b"\x80"):  # every pickle since protocol 2; no UTF-8 text starts so
            raise _pickle_error(path)
        if start.startswith((b"PK", b"\x93NUMPY")):
            return _read_npz(path)
        if suffixes and suffixes[-1] in _PICKLE_SUFFIXES and not re.match(rb"\d+[ \t]\d", start):
            raise _pickle_error(path)
        if _is_binary(start):
            return _read_binary(stream, path, max_bytes)
        return _read_text(stream, path, max_bytes)


def _is_binary(start: bytes) -> bool:
    if re.search(rb"[\x00-\x08\x0e-\x1f]", start):
        return True
    # Binary numbers without such bytes are rare. After a header, a word of text is followed by a written number.
    header, _, row = start.partition(b"\n")
    numbers = row.partition(b" ")[2][:4]
    return _parse_header(header) is not None and re.match(rb"[-+.\dInin \t]", numbers or b"0") is None


def _pickle_error(path: Path) -> BadFile:
    command = 'KeyedVectors.load(path).save_word2vec_format("vectors.txt")'
    return BadFile(
        "this is a pickle (gensim's .kv is one); opening one runs its code, so pickles are never loaded.",
        at=str(path),
        fix=f"where it was made, run {command}, and give that file.",
    )


def _parse_header(line: bytes) -> tuple[int, int] | None:
    """(count, dim) if this is the header line of a word2vec file."""
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields):
        return None
    return int(fields[0]), int(fields[1])


def _read_text(stream: BinaryIO, path: Path, max_bytes: int) -> tuple[list[str], FloatArray]:
    """GloVe text, or word2vec text where the first line is `count dim`."""
    first = stream.readline(_LONGEST_LINE)
    if not first.strip():
        raise BadFile("the file starts with an empty line; `word x1 ... xd` was expected.", at=f"{path}, line 1")
    header = _parse_header(first)
    count, dim = header or (None, len(first.split()) - 1)
    if not 1 <= dim <= _LARGEST_DIM:
        raise BadFile(
            f"these are not word vectors: the first line gives {dim} numbers a word.",
            at=f"{path}, line 1",
            fix="each line is `word x1 ... xd`, after at most one line `count dim`.",
        )
    words: list[str] = []
    numbers = bytearray()  # grows with the rows read, not with the count in the header
    line_number, length, blank = 1 if header else 0, 0, 0
    for line in itertools.chain([] if header else [first], iter(partial(stream.readline, _LONGEST_LINE), b"")):
        line_number, length = line_number + 1, length + len(line)
        _check_length(length, max_bytes, path)
        if not line.strip() and blank in (0, line_number - 1):  # blank lines at the end are allowed
            blank = line_number
            continue
        if blank:
            raise BadFile("this line is blank; a word and its numbers were expected.", at=f"{path}, line {blank}")
        word, row = _parse_line(line, dim, f"{path}, line {line_number}")
        words.append(word)
        numbers += row.tobytes()
    _check_count(len(words), count, f"{path}, line {line_number}")
    return words, np.frombuffer(numbers, dtype=np.float32).reshape(-1, dim)


def _parse_line(line: bytes, dim: int, at: str) -> tuple[str, FloatArray]:
    # From the right: some words of large GloVe files hold spaces.
    fields = line.replace(b"\t", b" ").rstrip(b" \r\n").rsplit(b" ", dim)
    surplus = fields[0].rsplit(b" ", 1)[1:]
    if len(fields) != dim + 1 or not fields[0] or (surplus and _NUMBER.fullmatch(surplus[0])):
        n_numbers = len(line.split()) - 1
        message = f"a word and {dim} numbers were expected. Got {max(n_numbers, 0)} numbers instead."
        raise BadFile(message, at=at, fix="if this is the last line, the file was cut off: get it anew.")
    word = _decode_word(fields[0], at)
    try:
        row = np.array(fields[1:], dtype=np.float32)
    except ValueError as error:
        raise BadFile(f"not all of the {dim} fields after {word[:40]!r} are numbers.", at=at) from error
    _check_finite(row, word, at)
    return word, row


def _decode_word(word: bytes, at: str) -> str:
    try:
        return word.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"the word is not UTF-8: {word[:40]!r}.", at=at, fix="convert the file to UTF-8.") from error


def _check_finite(row: FloatArray, word: str, at: str) -> None:
    if not np.isfinite(row).all():
        fix = "leave the word out, or mend it."
        raise BadFile(f"the vector of {word[:40]!r} holds NaN or infinity.", at=at, fix=fix)


def _check_count(n_words: int, promised: int | None, at: str) -> None:
    if n_words == 0 or (promised is not None and n_words != promised):
        expected = "at least one" if promised is None else promised
        message = f"the file holds {n_words} words; {expected} were expected from its header."
        raise BadFile(message, at=at, fix="get the file anew: it was cut off, or its first line is wrong.")


def _check_length(n_bytes: int, max_bytes: int, path: Path) -> None:
    if n_bytes > max_bytes:
        message = f"unpacked, this file has more than {max_bytes:,} bytes, far more than word vectors could have."
        raise BadFile(message, at=str(path), fix="unpack it, if it is what you meant.")


def _read_binary(stream: BinaryIO, path: Path, max_bytes: int) -> tuple[list[str], FloatArray]:
    """word2vec binary: `count dim`, then for each word its bytes, a space, and dim little-endian float32."""
    header = _parse_header(stream.readline(256))
    if header is None or not 1 <= header[1] <= _LARGEST_DIM:
        raise BadFile(
            "this is no text, and the first line of a word2vec binary file is `count dim`; this one is not.",
            at=f"{path}, line 1",
            fix="give GloVe or word2vec vectors; fastText's own .bin is not supported, its .vec is.",
        )
    count, dim = header
    words: list[str] = []
    numbers = bytearray()
    for word, row in _binary_records(stream, dim, path):
        words.append(word)
        numbers += row
        _check_length(len(numbers), max_bytes, path)
        if len(words) == count:
            break
    _check_count(len(words), count, f"{path}, word {len(words)}")
    return words, np.frombuffer(numbers, dtype="<f4").astype(np.float32).reshape(-1, dim)


def _binary_records(stream: BinaryIO, dim: int, path: Path) -> Iterator[tuple[str, bytes]]:
    buffer, start, size = b"", 0, 4 * dim
    for number in itertools.count(1):
        at = f"{path}, word {number}"
        while (space := buffer.find(b" ", start)) < 0 or len(buffer) < space + 1 + size:
            too_long = space < 0 and len(buffer) - start > _LONGEST_WORD
            block = b"" if too_long else stream.read(1 << 20)
            if not block and not buffer[start:].strip():
                return
            if not block:
                raise BadFile("the file ends, or is damaged, within a word's vector.", at=at, fix="get the file anew.")
            buffer, start = buffer[start:] + block, 0
        word = _decode_word(buffer[start:space].lstrip(b"\n"), at)
        start = space + 1 + size
        row = buffer[space + 1 : start]
        _check_finite(np.frombuffer(row, dtype="<f4"), word, at)
        yield word, row


def _read_npz(path: Path) -> tuple[list[str], FloatArray]:
    layout = "two arrays, `words` (text, [n]) and `vectors` (numbers, [n, dim])"
    try:
        with zipfile.ZipFile(path) as archive:
            texts = [name for name in archive.namelist() if name.endswith((".txt", ".vec", ".bin"))]
        if texts:
            fix = "unzip it and give one of these files."
            raise BadFile(f"this is a zip with {', '.join(texts[:5])}.", at=str(path), fix=fix)
        npz_shapes(path, ("words", "vectors"))
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            words, vectors = arrays["words"], arrays["vectors"]
    except NPZ_ERRORS as error:
        raise BadFile(
            f"an .npz with {layout} was expected ({str(error) or type(error).__name__}).",
            at=str(path),
            fix='np.savez("vectors.npz", words=np.array(words), vectors=vectors) makes one.',
        ) from error
    if words.dtype.kind not in "US" or vectors.dtype.kind not in "fiu" or vectors.ndim != 2 or words.ndim != 1:
        raise BadFile(f"the .npz must hold {layout}.", at=str(path))
    if len(words) == 0 or len(words) != len(vectors) or vectors.shape[1] == 0:
        raise BadFile(f"{len(words)} words do not fit vectors of shape {list(vectors.shape)}.", at=str(path))
    if words.dtype.kind == "S":
        try:
            words = np.char.decode(words, "utf-8")
        except UnicodeDecodeError as error:
            raise BadFile("the words are not UTF-8.", at=str(path)) from error
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, and is refused as such
        return words.tolist(), vectors.astype(np.float32)


def _read_safetensors(path: Path) -> tuple[list[str], FloatArray]:
    """The bundled layout: tensor `vectors` [n, dim], and `<stem>.words.txt`, whose hash is in the metadata."""
    words_path = path.with_suffix(".words.txt")
    refuse_special(words_path, "list of words")
    try:
        data = words_path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound("the list of words is missing beside the vectors.", at=str(words_path)) from error
    with open_tensors(path, "this file of vectors or its words", fix="copy both again.", framework="numpy") as tensors:
        digest = (tensors.metadata() or {}).get("words_sha256", "")
        vectors = tensors.get_tensor("vectors").astype(np.float32)
        words = data.decode("utf-8").removesuffix("\n").split("\n")
    if hashlib.sha256(data).hexdigest() != digest or vectors.ndim != 2 or len(words) != len(vectors):
        raise BadFile(f"{words_path.name} is not the list that these vectors were saved with.", at=str(path))
    return words, vectors
