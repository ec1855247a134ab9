"""Atomic files, hashes and locks."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeffect.errors import BadFile, InUse, NotFound
from saeffect.paths import refuse_special

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = [
    "FORMULA_STARTS",
    "atomic_path",
    "fingerprint",
    "hash_file",
    "hash_folder",
    "read_json",
    "remove_leftovers",
    "sole_writer",
    "versions",
    "write_json",
    "writing",
]

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that starts so for a formula, so the CSV files have an apostrophe before it."""

# Packages whose versions could affect numbers.
_TRACKED = ("saeffect", "torch", "transformers", "peft", "numpy", "scipy", "statsmodels", "pandas", "safetensors")
# A unique prefix, so that files left by a killed process cannot be mistaken for the user's.
_WRITING = ".saeffect-writing-"
# The second alternative is the temporary file of safetensors.
_LEFTOVER = re.compile(re.escape(_WRITING) + r".*\.[a-z0-9_]{8}(\.[^.]+)?|\.tmp[A-Za-z0-9]{6}")
_LOCK = ".saeffect-lock"
_DISK_FULL = {os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn system errors when writing to a file or folder into BadFile: disk full, too many files, not writable.

    Example:
        >>> with writing("numbers.csv"):
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
        saeffect.errors.BadFile: BadFile: this cannot be written: No space left on device.
          at:  numbers.csv
          fix: free some space (or remove files, if there are too many); then run the same command again.
    """
    try:
        yield
    except Exception as error:
        reason = _disk_error(error, Path(path))
        if reason is None:
            raise
        remedy = (
            "free some space (or remove files, if there are too many)"
            if reason in _DISK_FULL
            else "change the permissions or choose another folder"
        )
        fix = f"{remedy}; then run the same command again."
        raise BadFile(f"this cannot be written: {reason}.", at=str(path), fix=fix) from error


def _disk_error(error: Exception, path: Path) -> str | None:
    """Why a path cannot be written; None if the error concerns another file, such as one being read."""
    if isinstance(error, OSError) and error.errno is not None:
        target = path if error.filename is None else Path(os.fsdecode(error.filename))
        concerns_path = target.parent == path.parent or target in (path, *path.parents) or path in target.parents
        return os.strerror(error.errno) if concerns_path else None
    # safetensors raises an error of its own, with the system's number in its text.
    system_error = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return os.strerror(int(system_error[1])) if system_error else None


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it if the block succeeds, and is deleted otherwise.

    Data are flushed to disk before the rename, so readers see the old file or the complete new one. BadFile as
    `writing`.

    Example:
        >>> import tempfile; folder = Path(tempfile.mkdtemp())
        >>> with atomic_path(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [p.name for p in folder.iterdir()]
        ['a.txt']
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_WRITING}{path.stem[:40]}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path | str) -> None:
    """Delete temporary files that killed processes left. No process may be writing to the folder."""
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
        if _LEFTOVER.fullmatch(path.name) and path.is_file() and not path.is_symlink() and _is_leftover(path):
            path.unlink(missing_ok=True)


def _is_leftover(path: Path) -> bool:
    """Whether a file with the name of a leftover is one; other programs use the names of safetensors, too."""
    if path.name.startswith(_WRITING):
        return True
    with path.open("rb") as file:
        start = file.read(9)  # the length of the header, and the header
        if start[4:] == b"\0\0\0\0{":
            return True
        # safetensors gives the file its size before it writes: until then it is nothing but zeros, or empty.
        return not start.strip(b"\0") and not any(part.strip(b"\0") for part in iter(lambda: file.read(1 << 20), b""))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with sorted keys, atomically; NaN becomes null."""
    with atomic_path(path) as temporary:
        text = json.dumps(_without_nan(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return _without_nan(value.item())
    return value


def read_json(path: Path | str) -> Any:
    """Read a UTF-8 JSON file; NotFound if there is none, BadFile if it is not valid or cannot be read."""
    path = Path(path)
    refuse_special(path, "JSON file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path.name!r}.", at=str(path)) from error
    except (ValueError, RecursionError) as error:  # among them 5,000 digits, and 100,000 brackets
        raise BadFile(f"this is not JSON: {error}.", at=str(path), fix="restore the file, or make it again.") from error
    except OSError as error:  # a folder, or not ours to read
        reason = (error.strerror or type(error).__name__).lower()
        raise BadFile(f"this cannot be read: {reason}.", at=str(path), fix="check what it is, and whose.") from error


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(path: Path | str) -> str:
    """SHA-256 over relative names and contents of all files in a folder (or one file); NotFound if there is nothing."""
    path = Path(path)
    if not path.exists():
        raise NotFound(f"there is nothing at {str(path)!r}.", at=str(path), fix="check the path.")
    if path.is_file():
        return hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + hash_file(file).encode())
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys.

    Example:
        >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that could affect numbers; a cached dict, not to be changed."""
    result = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in _TRACKED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[name] = importlib.metadata.version(name)
    return result


@contextlib.contextmanager
def sole_writer(folder: Path | str, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock a folder for the block. A missing folder is created, and removed at the end if empty.

    The system releases the lock when the process ends, also after `kill -9`. If another process holds the folder,
    calls `wait` and then waits for it to end; InUse if `wait` is None. BadFile if the folder cannot be made or written.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder).absolute()
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = FileLock(folder / _LOCK)
    try:
        with writing(folder):
            try:
                _acquire(lock, folder, timeout=0)
            except Timeout:
                if wait is None:
                    raise
                wait()
                _acquire(lock, folder, timeout=-1)
    except Timeout:
        fix = "wait until it has ended or stop it, or choose another folder."
        raise InUse("another process is writing to this folder.", at=str(folder), fix=fix) from None
    except BadFile:
        _remove_empty(missing)
        raise
    try:
        yield
    finally:
        # Before the release, so that a process that has just opened the file finds it deleted.
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()
        _remove_empty(missing)


def _acquire(lock: FileLock, folder: Path, *, timeout: float) -> None:
    for _ in range(100):
        # The previous holder may have removed the empty folder.
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=timeout)
            return
    raise BadFile("this folder vanishes as soon as it is made.", at=str(folder), fix="choose another folder.")


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the deepest first, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
