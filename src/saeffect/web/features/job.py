"""Reading the text with both models, in a process of its own: pages stay fast, and its memory is given back.

As a program (`python -m saeffect.web.features.job RUN`) it reads, and writes what happens as lines of JSON.
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

__all__ = ["Reading", "main", "reading"]


class Reading:
    """At most one reading of a run at a time; `state` may be asked at any moment, from any thread."""

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
        """Begin to read; InUse while a reading is running."""
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
        """End a running reading; arms that it has finished stay."""
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
                found = json.loads(line)
                if isinstance(found, dict) and "state" in found:
                    self._state = found
        code = process.wait()
        if self._state["state"] == "running":
            why = "it was stopped" if code < 0 else f"it ended with status {code}"
            self._state = {"state": "failed", "error": f"the models were not read to the end: {why}.", "fix": None}


def reading(site: Site) -> Reading:
    """The reading of a site; it ends with the server."""

    def make() -> Reading:
        made = Reading(site.folder)
        site.on_close(made.stop)
        return made

    return site.cached("reading of both models", [], make)


def main(arguments: Sequence[str]) -> int:
    """Read, and say so on standard output."""
    from saeffect.study.both_models import read_both_models

    def say(**found: Any) -> None:
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()

    def show(progress: Progress) -> None:
        say(state="running", what=progress.what, done=progress.done, total=progress.total)

    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)  # pages come first
    try:
        read_both_models(arguments[0], Log(show=show))
    except SaeffectError as error:
        say(state="failed", error=error.message, fix=error.fix)
        return 1
    except Exception as error:  # libraries raise many kinds, and pages must say what
        say(state="failed", error=f"the models could not be read: {first_line(error)}.", fix=None)
        return 1
    say(state="done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
