"""One writer a folder: a second process that would write to the same place is refused before it writes anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from saeffect.errors import BadFile, InUse
from saeffect.io import writing

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["sole_writer"]

_LOCK = ".saeffect-lock"
_TRIES = 100


@contextlib.contextmanager
def sole_writer(folder: Path | str, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a folder while the block runs. The folder need not exist; if it is empty at the end, it is gone again.

    The operating system lets go of the lock when the process ends, however it ends: what `kill -9` leaves behind
    is an empty file that keeps nobody out.

    Args:
        folder: What to hold.
        wait: Called where another process holds it, before this one waits for its end; None to be refused.

    Raises:
        InUse: Another process holds the folder.
        BadFile: The folder cannot be made, or written to.

    Example:
        >>> import tempfile; folder = Path(tempfile.mkdtemp())
        >>> with sole_writer(folder), sole_writer(folder):  # doctest: +ELLIPSIS
        ...     pass
        Traceback (most recent call last):
        saeffect.errors.InUse: InUse: another process is writing to this folder.
          at: ...
    """
    from filelock import FileLock, Timeout

    folder = Path(folder).absolute()
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
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
        raise InUse(
            "another process is writing to this folder.",
            at=str(folder),
            fix="wait until it has ended or stop it, or choose another folder.",
        ) from None
    except BadFile:
        _remove_empty(missing)
        raise
    try:
        yield
    finally:
        # Before the release: whoever opened the file in the meantime finds that it is not the folder's any more.
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()
        _remove_empty(missing)


def _acquire(lock: FileLock, folder: Path, *, timeout: float) -> None:
    for _ in range(_TRIES):
        # Who held it may have left nothing, and taken the folder away.
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=timeout)
            return
    raise BadFile("this folder vanishes as soon as it is made.", at=str(folder), fix="choose another folder.")


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the deepest first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
