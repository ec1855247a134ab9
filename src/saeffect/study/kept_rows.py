"""Finished pieces of a stage's work, kept until the manifest knows the files that the stage makes of them."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from saeffect.checksums import add_sealed, is_sealed
from saeffect.io import SILENT, Log

__all__ = ["KeptRows", "drop_kept_rows"]

_PIECE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.parquet")


class KeptRows:
    """Pieces of a table, one file each, whose names hold what they were made with and the hash of their content.

    Every process reads the pieces of all, so that a run may go on with another number of processes.

    Args:
        folder: Where they lie, with those of other settings.
        made_with: Fingerprint of everything that the rows depend on.
    """

    def __init__(self, folder: Path, made_with: str) -> None:
        self._folder, self._made_with = folder, made_with[:16]

    def read(self, log: Log = SILENT) -> pd.DataFrame | None:
        """All pieces that are as they were written; None if there are none. A damaged one is as good as none."""
        found = list(self.pieces(log))
        return pd.concat(found, ignore_index=True) if found else None

    def pieces(self, log: Log = SILENT) -> Iterator[pd.DataFrame]:
        """The same one by one, where they are not of one table."""
        for file in sorted(self._folder.glob(f"{self._made_with}-*.parquet")):
            if is_sealed(file):
                yield pd.read_parquet(file)
            else:
                log(f"  {file.name} is damaged, so what it holds is made again")

    def add(self, rows: pd.DataFrame) -> None:
        """Keep a piece.

        Raises:
            BadFile: It cannot be written.
        """
        content = io.BytesIO()
        rows.to_parquet(content, index=False)
        add_sealed(self._folder, self._made_with, ".parquet", content.getvalue())


def drop_kept_rows(folder: Path) -> None:
    """Delete the pieces in a folder, of whatever settings, and the folder if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for file in folder.iterdir():
        if _PIECE.fullmatch(file.name) and not file.is_dir():
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
