"""What the command line shows: progress bars on a terminal, plain lines elsewhere, errors in one form.

All that reaches a terminal goes through here: names in files, and the files' own names, may hold escape sequences.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBar
from rich.text import Text

from saeffect.io import Log, Progress
from saeffect.lm.tokens import printable_text

__all__ = ["ConsoleProgress", "show", "show_error"]

# Between lines of progress where there is no terminal: so many seconds at least, and a tenth of the work or half as
# much time again. So there is a rate early on, and a day of work does not fill a log.
_LINE_EVERY, _WORK, _TIME = 10.0, 0.1, 1.5


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "")
        return Text(f"{task.speed:,.1f} {unit}/s" if task.speed else f"- {unit}/s", style="dim")


class ConsoleProgress(Log):
    """Shows lines and progress on standard error: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        super().__init__(self._print, self._move)
        self.console = Console(stderr=True, highlight=False)
        self._is_terminal = self.console.is_terminal
        self._bar = ProgressBar(
            TextColumn("  {task.description:<20}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._started = self._last = 0.0
        self._first = self._told = 0

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:  # else it ends with an empty line
            self._bar.stop()

    def _print(self, line: str) -> None:
        self._finish()
        self.console.print(escape(printable_text(line)), soft_wrap=True)

    def _move(self, progress: Progress) -> None:
        name, done, total, unit = printable_text(progress.what), progress.done, progress.total, progress.unit
        now = time.monotonic()
        if name != self._name:
            self._finish()
            self._name, self._started, self._last = name, now, now
            self._first = self._told = done
            if self._is_terminal:
                self._task = self._bar.add_task(name, total=total, completed=done, unit=unit)
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done > self._told and self._is_due(now, (done - self._told) / total):
            self._last, self._told = now, done
            rate = (done - self._first) / (now - self._started)
            left = (total - done) / rate
            self.console.print(f"  {name}: {done}/{total} {unit}, {rate:,.1f}/s, {left:.0f} s left")

    def _is_due(self, now: float, share: float) -> bool:
        """Whether a line is worth it, `share` of the work after the last one."""
        much = share >= _WORK or now - self._started >= _TIME * (self._last - self._started)
        return much and now - self._last >= _LINE_EVERY

    def _finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._name = None, ""


def show(line: str = "") -> None:
    """Print a line of the outcome to standard output. Nothing in it can act on the terminal."""
    typer.echo(printable_text(line))


def show_error(error: BaseException) -> None:
    """Print an error to standard error, without a traceback and without reading its text as markup."""
    console = Console(file=sys.stderr, stderr=False, highlight=False)
    console.print(Text(printable_text(str(error))), style="red" if console.is_terminal else None, soft_wrap=True)
