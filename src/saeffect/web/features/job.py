"""Reading the text with both models in a separate process: pages stay fast, and its memory is freed at the end.

As a program (`python -m saeffect.web.features.job RUN`) it writes its state as lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeffect.errors import InUse, SaeffectError, first_line
from saeffect.progress import Log, Progress
from saeffect.web.site import Site

__all__ = ["ReadingJob", "main", "reading_job"]


class ReadingJob:
    """At most one reading of a run at a time; thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"state": "idle"}

    @property
    def state(self) -> dict[str, Any]:
        """`state`: "idle", "running" (with what, done, total), "done", or "failed" (with error and fix)."""
        return dict(self._state)

    def start(self) -> None:
        """Start reading; InUse while it runs already."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                raise InUse("both models are being read already.", fix="wait until they have been.")
            self._state = {"state": "running", "what": "loading the models", "done": 0, "total": 0}
            command = [sys.executable, "-m", "saeffect.web.features.job", str(self._folder)]
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
            )
        threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()

    def stop(self) -> None:
        """Stop reading; finished arms are kept."""
        with self._lock:
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # a line that a library printed
                state = json.loads(line)
                if isinstance(state, dict) and "state" in state:
                    self._state = state
        code = process.wait()
        if self._state["state"] == "running":
            reason = "it was stopped" if code < 0 else f"it ended with status {code}"
            self._state = {"state": "failed", "error": f"the models were not read to the end: {reason}.", "fix": None}


def reading_job(site: Site) -> ReadingJob:
    """The reading job of a site; it stops with the server."""

    def make() -> ReadingJob:
        job = ReadingJob(site.folder)
        site.on_close(job.stop)
        return job

    return site.cached("reading of both models", [], make)


def main(arguments: Sequence[str]) -> int:
    """Read, and write the state to standard output."""
    from saeffect.study.both_models import read_both_models

    def send(**message: Any) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    def report(progress: Progress) -> None:
        send(state="running", what=progress.what, done=progress.done, total=progress.total)

    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)  # pages come first
    try:
        read_both_models(arguments[0], Log(show=report))
    except SaeffectError as error:
        send(state="failed", error=error.message, fix=error.fix)
        return 1
    except Exception as error:  # libraries raise many kinds, and the page shows the message
        send(state="failed", error=f"the models could not be read: {first_line(error)}.", fix=None)
        return 1
    send(state="done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
