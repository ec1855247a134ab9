"""This process among those that `torchrun` started: who speaks, how all leave, and how they are stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from saeffect.cli.console import ConsoleProgress
from saeffect.errors import Interrupted
from saeffect.io import SILENT, Log

__all__ = ["let_others_speak", "processes"]

# Seconds. `torchrun` looks after its processes every tenth of a second.
_PATIENCE = 5.0


@contextmanager
def processes() -> Iterator[Log]:
    """While inside, this process is one of a run: the first one gets a log that is shown, the others a silent one.

    All leave together, also after an error, so that whoever waits for this process notices that it is gone.
    """
    from saeffect.parallel import is_first, leave, rank_and_world

    if rank_and_world()[1] > 1:
        _stop_at_first_signal()
    try:
        if is_first():
            with ConsoleProgress() as log:
                yield log
        else:
            yield SILENT
    finally:
        leave()


def let_others_speak(error: BaseException) -> None:
    """Among processes of `torchrun`: wait for the one to speak that has the most to say, whereupon all are ended.

    What is wrong for all is told by the first process, and what is wrong for one by that one: who merely finds
    another gone comes last. Whoever is still there after the wait tells its own.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PATIENCE)
    if isinstance(error, Interrupted) and error.by_another:
        time.sleep(2 * _PATIENCE)


def _stop_at_first_signal() -> None:
    """Ctrl-C arrives twice, from the terminal and from `torchrun`: the second must not break off the end."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, stop)
