"""`progress.json` in a run directory: what a running study is doing, for other programs.

It exists only while a run writes there; a killed run leaves it behind, which its process number reveals.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from saeffect.errors import SaeffectError
from saeffect.io import read_json, write_json
from saeffect.progress import Log, Progress

__all__ = ["ProgressFile", "RunProgress", "read_progress"]

_NAME = "progress.json"
_EVERY = 1.0  # seconds between two writings within a stage


@dataclass(frozen=True)
class RunProgress:
    """What a run is doing: keys of all its stages, such as "steer control"; the current stage ("" before the first) and
    its progress, `done` of `total` `unit` of `what` ("" if it reports none). `started` (of the stage) and `updated` are
    in seconds since 1970; the process is `pid` on the machine `host`.
    """

    study: str
    title: str
    stages: tuple[str, ...]
    stage: str = ""
    what: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    started: float = 0.0
    updated: float = 0.0
    pid: int = 0
    host: str = ""

    def is_alive(self) -> bool:
        """Whether the process still exists; True if it is on another machine, which cannot be checked."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):  # somebody else's process
            return True
        return True


class ProgressFile:
    """Writes the file during the block and removes it at the end. Leaves a foreign file of this name alone, and ignores
    errors of writing.
    """

    def __init__(
        self, folder: Path, study: str, title: str, stages: Sequence[str], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self._clock, self._written = folder / _NAME, clock, 0.0
        self._is_ours = not os.path.lexists(self._path) or read_progress(folder) is not None
        self._now: dict[str, Any] = {"stage": "", "started": clock()}
        self._fixed = {
            "study": study,
            "title": title,
            "stages": tuple(stages),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }

    def __enter__(self) -> ProgressFile:
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def begin(self, stage: str) -> None:
        """Note that a stage begins."""
        self._now = {"stage": stage, "started": self._clock()}
        self._write()

    def following(self, log: Log) -> Log:
        """A log that passes everything on to `log` and writes the progress to the file."""
        return Log(log, lambda progress: self._show(progress, log))

    def _show(self, progress: Progress, log: Log) -> None:
        log.progress(progress.what, progress.done, progress.total, progress.unit)
        if self._clock() - self._written >= _EVERY:
            self._now |= asdict(progress)
            self._write()

    def _write(self) -> None:
        self._written = self._clock()
        if not self._is_ours:
            return
        with contextlib.suppress(SaeffectError, OSError):
            write_json(self._path, {**self._fixed, **self._now, "updated": self._written})


def read_progress(folder: Path) -> RunProgress | None:
    """What a run in the directory is doing; None without a run, or if the file is something else."""
    try:
        return TypeAdapter(RunProgress).validate_python(read_json(folder / _NAME))
    except (SaeffectError, OSError, ValidationError):
        return None
