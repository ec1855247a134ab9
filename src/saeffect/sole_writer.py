"""One writer a folder: a second process that would write to the same place is refused before it writes anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from saeffect.errors import BadFile, InUse
from saeffect.provenance import writing

__all__ = ["sole_writer"]

_LOCK = ".saeffect-lock"


@contextlib.contextmanager
def sole_writer(folder: Path | str) -> Iterator[None]:
    """Hold a folder while the block runs. The folder need not exist; if it is empty at the end, it is gone again.

    The operating system lets go of the lock when the process ends, however it ends: what `kill -9` leaves behind
    is an empty file that keeps nobody out.

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
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
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


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the deepest first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
