"""Folders in the user's cache: made once, by one process, whole or not at all, and made again if they were damaged."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from saeffect.errors import BadFile
from saeffect.io import SILENT, Log, hash_file, read_json, sole_writer, write_json, writing

__all__ = ["cache_folder", "cached"]

_NOTE = "saeffect.json"  # written last: its presence says that the folder was whole
_SCRATCH = ".fetching-"


def cache_folder() -> Path:
    """Where converted models are kept: `SAEFFECT_CACHE`, or the platform's user cache."""
    chosen = os.environ.get("SAEFFECT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("saeffect"))


def cached(folder: Path, make: Callable[[Path], None], *, note: Mapping[str, Any], log: Log = SILENT) -> Path:
    """A folder of the cache, made on the first call.

    Args:
        folder: Where it is to be.
        make: Writes its files into a new folder of the path that it is given; what it needs meanwhile may lie beside.
        note: What made it; kept in it as `saeffect.json`, with the files' hashes.
        log: Receives a line if another process makes it, or if something is in the way.

    Returns:
        `folder`, whole.

    Raises:
        BadFile: The disk is full, or cannot be written to.
        SaeffectError: As `make`.
    """
    if _is_whole(folder):
        return folder
    home = folder.parent
    waiting = f"another process is making {folder.name}: waiting for it"
    with sole_writer(home, wait=lambda: log(waiting)), writing(home):
        # Processes that waited find what they wanted; it is in use by now, so nobody may touch it.
        if _is_whole(folder):
            return folder
        for left in home.glob(f"{_SCRATCH}????????"):  # of killed processes: whoever makes one holds the cache
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=_SCRATCH) as name:
            made = Path(name).resolve() / "model"
            make(made)
            files = {path.name: hash_file(path) for path in made.iterdir()}
            write_json(made / _NOTE, {**note, "files": files})
            _make_way(folder, made.with_name("damaged"), log)
            made.replace(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the files are there as they were made. The first versions noted no hashes."""
    if not (folder / _NOTE).is_file():
        return False
    try:
        note = read_json(folder / _NOTE)
    except BadFile:
        return False
    files = note.get("files", {}) if isinstance(note, dict) else None
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        return False
    if not all((folder / name).is_file() for name in files):
        return False
    stats = [(folder / name).stat() for name in files]
    return _have_hashes(folder, tuple(files.items()), tuple((s.st_mtime_ns, s.st_size) for s in stats))


@functools.cache
def _have_hashes(folder: Path, files: tuple[tuple[str, str], ...], stats: tuple[tuple[int, int], ...]) -> bool:
    """Whether the files have the noted hashes: looked at once a process, and again when they are others."""
    del stats
    return all(hash_file(folder / name) == digest for name, digest in files)


def _make_way(folder: Path, damaged: Path, log: Log) -> None:
    """Move away what stands in the place: a damaged folder to where it vanishes, anything else beside it."""
    if not folder.exists():
        return
    if (folder / _NOTE).exists():
        log(f"{folder.name} in the cache was damaged; it is replaced")
        folder.replace(damaged)
    else:
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-set-aside-"))
        log(f"{folder} was there already, without {_NOTE}; it is in {aside} now")
        folder.replace(aside / folder.name)
