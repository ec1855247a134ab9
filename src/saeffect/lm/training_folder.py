"""The folder that a training writes to: whose it is, its checkpoints, and whether what it made is still whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saeffect.errors import BadFile, ConfigError, SaeffectError
from saeffect.io import hash_file, read_json, remove_leftovers, sole_writer, write_json
from saeffect.lm.checkpoint import Checkpoint

__all__ = ["FINISHED", "TrainingFolder"]

FINISHED = "finished.json"
_ANOTHER_FOLDER = "choose another output folder, or move away what is there."


class TrainingFolder:
    """One training's folder: one writer at a time, checkpoints on the way, and a note of what was made at the end.

    What somebody else put there stays: the folder is refused if it is in the way.

    Args:
        path: The folder; it need not be there.
        made_by: Fingerprint of everything that decides what is made, contents of files included.
        leaves: Names of the files that such a training leaves.
        keep: How many of the newest checkpoints stay.
    """

    def __init__(self, path: Path, made_by: str, leaves: Sequence[str], *, keep: int = 1) -> None:
        self.path, self._made_by, self._leaves = path, made_by, (*leaves, FINISHED)
        self.checkpoint = Checkpoint(path / "checkpoint", made_by, keep=keep)

    def refuse_strangers(self) -> None:
        """Refuse a folder with files under our names that no training of ours put there. `made_by` plays no part.

        Raises:
            ConfigError: There are some.
            BadFile: The note of a finished training is damaged.
        """
        if self.checkpoint.owner() is not None or self.note() is not None:
            return
        there = [name for name in (*self._leaves, self.checkpoint.folder.name) if os.path.lexists(self.path / name)]
        if there:
            raise ConfigError(
                f"this folder holds {', '.join(there)}, and nothing says that a training wrote it here.",
                at=str(self.path),
                fix=_ANOTHER_FOLDER,
            )

    def refuse_others(self) -> None:
        """Refuse a folder of somebody else, or of another training, before anything heavy starts.

        Raises:
            ConfigError: It is; or as `refuse_strangers`.
            BadFile: As `refuse_strangers`.
        """
        self.refuse_strangers()
        note, owner = self.note(), self.checkpoint.owner()
        if note is not None and note["made_by"] != self._made_by:
            raise ConfigError(
                "this folder holds what another recipe made, or this one from another model or text.",
                at=str(self.path),
                fix=_ANOTHER_FOLDER,
            )
        if owner not in (None, self._made_by):
            raise self.checkpoint.of_another_run()

    def damaged(self) -> list[str] | None:
        """Names of files that are not as this training left them; None where it did not finish.

        Raises:
            BadFile: The note of a finished training is damaged.
        """
        note = self.note()
        if note is None or note["made_by"] != self._made_by:
            return None
        return [name for name, digest in note["files"].items() if not _is(self.path / name, digest)]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep others out while the block runs; what a kill left half-written is cleared away.

        Raises:
            InUse: Another process trains into this folder.
            ConfigError: As `refuse_others`.
            BadFile: As `refuse_others`; or the folder cannot be written to.
        """
        with sole_writer(self.path):
            self.refuse_others()
            remove_leftovers(self.path)
            yield

    def finish(self, files: Iterable[str], **also: Any) -> None:
        """Note that the training is finished, and the hashes of files that only training again could make.

        Args:
            files: Their names.
            also: Kept in the note too.
        """
        hashes = {name: hash_file(self.path / name) for name in files}
        write_json(self.path / FINISHED, {"made_by": self._made_by, "files": hashes, **also})

    def note(self) -> dict[str, Any] | None:
        """What a finished training noted; None without a note.

        Raises:
            BadFile: It is damaged, so nobody can tell what made the files.
        """
        path = self.path / FINISHED
        if not path.is_file():
            return None
        with contextlib.suppress(SaeffectError):
            note = read_json(path)
            if isinstance(note, dict) and isinstance(note.get("made_by"), str) and _are_hashes(note.get("files")):
                return note
        raise BadFile(
            f"{FINISHED} is damaged, so nothing says which recipe made the files beside it.",
            at=str(self.path),
            fix=f"restore it; or delete the folder, and the same command makes it again. {_ANOTHER_FOLDER}",
        )


def _are_hashes(files: object) -> bool:
    return isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and hash_file(path) == digest
