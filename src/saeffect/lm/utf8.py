"""Text files that people write: UTF-8, or an error that says which byte is not."""

from __future__ import annotations

import codecs
from pathlib import Path

from saeffect.errors import BadFile, NotFound
from saeffect.paths import refuse_special, user_path

__all__ = ["decode_utf8", "read_bytes"]

_FIX = "save it as UTF-8 (in an editor or spreadsheet: Save As, encoding UTF-8)."


def read_bytes(path: Path | str, kind: str) -> bytes:
    """The bytes of a file that the user named.

    Args:
        path: The file; `~` stands for the home folder.
        kind: What it should be, for the message: "vocabulary", "verdicts".

    Raises:
        NotFound: There is no such file.
        BadFile: It is a folder or a pipe, or may not be read.
        ConfigError: It can be no path.
    """
    file = user_path(path)
    refuse_special(file, f"{kind} file")
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"there is no {kind} file {file.name!r}.", at=str(path), fix="check the path.") from error
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise BadFile(f"the {kind} file cannot be read: {reason}.", at=str(path), fix="give a file.") from error


def decode_utf8(data: bytes, *, at: str) -> str:
    """The text of `data`, without a byte order mark.

    A null byte counts as an error too: UTF-16 without a byte order mark is valid UTF-8 full of them.

    Raises:
        BadFile: A byte is not UTF-8; the message gives the byte, its position (from 0) and its line (from 1).

    Example:
        >>> decode_utf8(bytes.fromhex("efbbbf") + b"cancer", at="words.txt")
        'cancer'
        >>> decode_utf8("tumeur bénigne".encode("latin-1"), at="words.txt")
        Traceback (most recent call last):
        saeffect.errors.BadFile: BadFile: the file is not UTF-8: byte 0xe9 at position 8 (line 1).
          at:  words.txt
          fix: save it as UTF-8 (in an editor or spreadsheet: Save As, encoding UTF-8).
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(data, error.start, at) from error
    if (null := data.find(0)) >= 0:
        raise _not_utf8(data, null, at)
    return text.removeprefix(codecs.BOM_UTF8.decode("utf-8"))


def _not_utf8(data: bytes, position: int, at: str) -> BadFile:
    line = data.count(b"\n", 0, position) + 1
    guess = "; it looks like UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
    byte = f"byte 0x{data[position]:02x} at position {position} (line {line})"
    return BadFile(f"the file is not UTF-8: {byte}{guess}.", at=at, fix=_FIX)
