"""Log lines and progress of a computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Log", "Progress", "SILENT", "duration"]


@dataclass(frozen=True)
class Progress:
    """Progress of a piece of work: `done` of `total` units."""

    what: str
    done: int
    total: int
    unit: str

    def __str__(self) -> str:
        return f"{self.what}: {self.done}/{self.total} {self.unit}"


class Log:
    """Receiver of log lines (`write`) and progress (`show`, often many times a second); None drops them.

    Example:
        >>> log = Log(print, show=print)
        >>> log("reading text"); log.progress("features control", 16, 64, "rows")
        reading text
        features control: 16/64 rows
    """

    def __init__(
        self, write: Callable[[str], object] | None = None, show: Callable[[Progress], object] | None = None
    ) -> None:
        self._write, self._show = write, show

    def __call__(self, line: str) -> None:
        if self._write is not None:
            self._write(line)

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        """Report progress of a piece of work; a new name ends the previous piece."""
        if self._show is not None:
            self._show(Progress(what, done, total, unit))

    def named(self, name: str) -> Log:
        """The same log with a name before each line."""
        return Log(lambda line: self(f"{name}: {line}"), self._show)


SILENT = Log()
"""The default log: nothing is shown."""


def duration(seconds: float) -> str:
    """A time in the units that people use.

    Example:
        >>> [duration(s) for s in (0.24, 45, 59.6, 720, 12000, 7200, 300_000)]
        ['0.2 s', '45 s', '1 min', '12 min', '3 h 20 min', '2 h', '3 d 11 h']
    """
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if 0.05 <= seconds < 0.95 else f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min".removesuffix(" 0 min")
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h".removesuffix(" 0 h")
