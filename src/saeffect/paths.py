"""Paths and text files from the user: resolution, errors, and UTF-8 decoding."""

from __future__ import annotations

import codecs
import errno
import re
from pathlib import Path
from typing import Any, NamedTuple

from saeffect.errors import BadFile, ConfigError, NotFound

__all__ = [
    "BUNDLED_FOLDER",
    "decode_utf8",
    "name_to_share",
    "read_bytes",
    "refuse_special",
    "resolve_paths",
    "user_path",
]

BUNDLED = "bundled:"
BUNDLED_FOLDER = Path(__file__).parent / "bundled"


def user_path(text: Path | str, *, at: str | None = None) -> Path:
    """A path as typed by the user, which need not exist; `~` is the home folder. ConfigError for a path that cannot
    exist (null character, lone surrogate, too long, unknown home folder) or lies in a folder without access.

    Example:
        >>> user_path("saes/control").as_posix()
        'saes/control'
        >>> user_path("a\\0b")
        Traceback (most recent call last):
        saeffect.errors.ConfigError: ConfigError: 'a\\x00b' can be no path: embedded null byte.
          fix: write the path of a file or folder.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (RuntimeError, ValueError) as error:
        reason = "half a character" if isinstance(error, UnicodeError) else str(error).rstrip(".")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return path
        reason = (error.strerror or type(error).__name__).lower()
    else:
        return path
    shown = repr(str(text)[:80])[1:-1]
    raise ConfigError(f"'{shown}' can be no path: {reason}.", at=at, fix="write the path of a file or folder.")


def name_to_share(name: str) -> str:
    """What a model card calls a model: a path without this machine's folders, any other name as it is.

    Example:
        >>> name_to_share("/home/me/models/tuned.gguf"), name_to_share("google/gemma-3-270m")
        ('tuned.gguf', 'google/gemma-3-270m')
    """
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def refuse_special(path: Path, kind: str) -> None:
    """Raise BadFile for a pipe, socket or device: reading a pipe would block for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise BadFile(
            f"the {kind} is a pipe or a device, not a file.", at=str(path), fix="write what it gives to a file first."
        )


def read_bytes(path: Path | str, kind: str) -> bytes:
    """The bytes of a file that the user named; `kind` is its name in messages ("vocabulary"). NotFound: no such
    file; BadFile: a folder, a pipe or not readable; ConfigError: an impossible path.
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
    """The text of `data`, without a byte order mark. BadFile for invalid UTF-8 or a null byte (UTF-16), with byte,
    position (from 0) and line (from 1).

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
    return BadFile(
        f"the file is not UTF-8: {byte}{guess}.",
        at=at,
        fix="save it as UTF-8 (in an editor or spreadsheet: Save As, encoding UTF-8).",
    )


class _PathKind(NamedTuple):
    """Kind of a path key: pattern of names that are not paths, folder of bundled artifacts, whether the path may be
    created later.
    """

    name: re.Pattern[str] | None = None
    bundled: str = ""
    may_be_missing: bool = False


_HUB_ID = re.compile(r"(?!.*\.gguf$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DATASET = re.compile(r"(?!.*\.(gz|zst|jsonl?|ndjson|txt|csv|tsv|parquet|arrow)$)[A-Za-z0-9][\w.-]*/[\w.-]+|hf:.+")
_ENCODER = re.compile(r"(?!.*\.(txt|vec|gz|bin|zip|npz|safetensors)$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WORD = re.compile(r"[\w-]+")
_HUB_PREFIXES = ("saelens:", "hf:")  # see saeffect.sae.hub
_MODEL, _TEXT, _SAE = _PathKind(_HUB_ID), _PathKind(_DATASET), _PathKind(may_be_missing=True)
_KINDS = {
    "model": _MODEL,
    "adapter": _MODEL,
    "text": _TEXT,
    "sources": _TEXT,
    "control_text": _TEXT,
    "sae": _SAE,
    "more_saes": _SAE,
    "init_from": _SAE,
    "vocabulary": _PathKind(_WORD, "vocabularies"),
    "embeddings": _PathKind(_WORD, "embeddings"),
    "outcome_encoder": _PathKind(_ENCODER, "embeddings"),
    "nulls": _PathKind(may_be_missing=True),
    "verdicts": _PathKind(),
    "chat_template": _PathKind(),
}


def resolve_paths(values: Any, folder: Path, *, at: str) -> Any:
    """The contents of a study or recipe file, `values`, with every path in it made absolute.

    Paths are relative to the file's folder. Names (a hub id, a bundled word list) stay names unless such a file exists
    there; bundled names always win. ConfigError: an impossible path; NotFound: one that exists only relative to the
    current folder.
    """
    return _resolve(values, folder.resolve(), at, ())


def _resolve(value: Any, folder: Path, at: str, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(item, folder, at, (*keys, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, folder, at, (*keys, str(index))) for index, item in enumerate(value)]
    kind = _kind_of_key(keys)
    if kind is None or not isinstance(value, str) or not value or value.startswith(BUNDLED):
        return value
    if keys[-1] == "chat_template" and ("{" in value or "\n" in value):  # the template itself
        return value
    if kind is _SAE and value.startswith(_HUB_PREFIXES):
        return value
    return _absolute_path(value, kind, folder, f"{at}, {'.'.join(keys)}")


def _kind_of_key(keys: tuple[str, ...]) -> _PathKind | None:
    names = [key for key in keys if not key.isdigit()]
    if names[-1:] == ["path"]:
        return _MODEL if names[-2:-1] == ["model"] else _TEXT
    return _KINDS.get(names[-1]) if names else None


def _absolute_path(value: str, kind: _PathKind, folder: Path, at: str) -> str:
    path = user_path(value, at=at)
    if kind.bundled and any(p.name.partition(".")[0] == value for p in (BUNDLED_FOLDER / kind.bundled).iterdir()):
        return value
    candidate = user_path(folder / path, at=at)
    absolute = str(candidate.resolve() if candidate.name in ("", "..") else candidate.parent.resolve() / candidate.name)
    if candidate.exists() or kind.may_be_missing:
        return absolute
    if path.exists():
        raise NotFound(
            f"there is no {value!r} beside the file ({absolute}). There is one in the current folder, but paths are"
            " relative to the file that names them.",
            at=at,
            fix=f"write {str(path.resolve())!r}, or where it lies as seen from the file.",
        )
    return value if kind.name is not None and kind.name.fullmatch(value) else absolute
