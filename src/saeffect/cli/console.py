"""What the command line shows: progress bars on a terminal, plain lines elsewhere, errors in one form.

All that reaches a terminal goes through here: names in files, and the files' own names, may hold escape sequences.
Under `torchrun` the first process alone shows anything.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from saeffect.errors import BadFile, Interrupted
from saeffect.lm.tokens import printable_text
from saeffect.progress import SILENT, Log, Progress

__all__ = ["ConsoleProgress", "keys_option", "process_log", "show", "show_error", "wait_for_peer_error"]

# Between lines of progress where there is no terminal: so many seconds at least, and a tenth of the work or half as
# much time again. So there is a rate early on, and a day of work does not fill a log.
_LINE_EVERY, _WORK, _TIME = 10.0, 0.1, 1.5
_PEER_SECONDS = 5.0  # `torchrun` looks after its processes every tenth of a second


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
        self._first = self._shown = 0

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:  # else it ends with an empty line
            self._bar.stop()

    def _print(self, line: str) -> None:
        self._finish()
        with _still_writable(self.console.file, "standard error"):
            self.console.print(escape(printable_text(line)), soft_wrap=True)

    def _move(self, progress: Progress) -> None:
        name, done, total, unit = printable_text(progress.what), progress.done, progress.total, progress.unit
        now = time.monotonic()
        if name != self._name:
            self._finish()
            self._name, self._started, self._last = name, now, now
            self._first = self._shown = done
            if self._is_terminal:
                self._task = self._bar.add_task(name, total=total, completed=done, unit=unit)
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done > self._shown and self._is_due(now, (done - self._shown) / total):
            self._last, self._shown = now, done
            rate = (done - self._first) / (now - self._started)
            left = (total - done) / rate
            pace = f"{rate:,.1f}/s" if rate >= 0.1 else f"{1 / rate:,.0f} s each"
            with _still_writable(self.console.file, "standard error"):
                self.console.print(f"  {name}: {done}/{total} {unit}, {pace}, {left:.0f} s left")

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
    with _still_writable(sys.stdout, "standard output"):
        typer.echo(printable_text(line))


def keys_option(text: str, page: Callable[[], str]) -> Any:
    """The option --keys, which shows a page of keys and ends the command."""

    def show_page(wanted: bool) -> None:
        if wanted:
            show(page().rstrip("\n"))
            raise typer.Exit

    return typer.Option("--keys", help=text, callback=show_page, is_eager=True)


def show_error(text: str) -> None:
    """Print an error to standard error, without a traceback and without reading its text as markup."""
    console = Console(file=sys.stderr, stderr=False, highlight=False)
    with contextlib.suppress(BadFile), _still_writable(sys.stderr, "standard error"):
        console.print(Text(printable_text(text)), style="red" if console.is_terminal else None, soft_wrap=True)


@contextlib.contextmanager
def _still_writable(stream: IO[str], name: str) -> Iterator[None]:
    """Raise one error for a stream that takes no more, such as a log on a full disk, and write no more to it."""
    try:
        yield
    except OSError as error:
        # What waits in its buffer would be tried again at the end of the process, with a traceback.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise BadFile(
            f"{name} cannot be written: {error.strerror or error}.",
            at=name,
            fix="free some space, or let it go elsewhere; the same command goes on from what is finished.",
        ) from error


@contextlib.contextmanager
def process_log() -> Iterator[Log]:
    """While inside, this process may be one of many: the first one gets a log that is shown, the others a silent one.

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


def wait_for_peer_error(error: BaseException) -> None:
    """Among processes of `torchrun`, give the process whose error says most time to show it, which ends all others.

    What is wrong for all is shown by the first process, what is wrong for one by that one; who merely finds another
    gone comes last. A process that is still there after the wait shows its own.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PEER_SECONDS)
    if isinstance(error, Interrupted) and error.by_another:
        time.sleep(2 * _PEER_SECONDS)


def _stop_at_first_signal() -> None:
    """Ctrl-C arrives twice, from the terminal and from `torchrun`: the second must not break off the end."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, stop)
