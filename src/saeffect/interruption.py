"""Ctrl-C and SIGTERM, put off to the end of a step: a step that is half done cannot be saved."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While the block lasts, the first signal sets `asked`; a second one raises KeyboardInterrupt at once.

    A signal that the process was started to ignore (by nohup, or in the background of a script) stays ignored.
    In a thread that is not the main one signals cannot be caught, and stay as they are.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                # None: the handler is not Python's, and could not be put back.
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
