"""Terminal output: progress bars on a terminal, plain lines elsewhere, errors in one form.

Escapes control sequences in text from files and file names. Under `torchrun` only the first process prints.
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO, Any, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TaskID
from rich.progress import Progress as ProgressBar
from rich.table import Column, Table
from rich.text import Text

from saeffect.errors import BadFile, Interrupted
from saeffect.lm.tokens import printable_text
from saeffect.progress import SILENT, Log, Progress, duration

__all__ = [
    "ConsoleProgress",
    "keys_option",
    "process_log",
    "show",
    "show_error",
    "show_table",
    "writing_to",
    "wait_for_peer_error",
]

# Without a terminal, a progress line needs this many seconds since the last one, and a tenth of the work or half the
# elapsed time: a rate shows early, and a day of work does not fill a log.
_MIN_SECONDS, _MIN_SHARE, _TIME_FACTOR = 10.0, 0.1, 1.5
_MAX_CHARACTERS = 2_000  # characters of an error's line
_BROKEN_PIPE = 141  # 128 and the number of the signal, as shells count
_PEER_SECONDS = 5.0  # `torchrun` looks after its processes every tenth of a second


class _Name(ProgressColumn):
    """The name of the work; this column is cut where the line would be too long."""

    def render(self, task: Task) -> Text:
        return Text(f"  {task.description:<20}", no_wrap=True, overflow="ellipsis")


class _Pace(ProgressColumn):
    """Counts, rate and time left, as in the lines of a log."""

    def render(self, task: Task) -> Text:
        counts = f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}"
        seconds = task.time_remaining
        return Text(counts if seconds is None or not task.speed else f"{counts}, {_pace(task.speed, seconds)}")


def _pace(rate: float, left: float) -> str:
    """
    Example:
        >>> _pace(17.25, 65), _pace(1 / 11, 10_989)
        ('17.2/s, 1 min left', '11 s each, 3 h 3 min left')
    """
    return f"{rate:,.1f}/s, {duration(left)} left" if rate >= 0.1 else f"{1 / rate:,.0f} s each, {duration(left)} left"


class ConsoleProgress(Log):
    """Lines and progress on standard error: a bar on a terminal, occasional lines elsewhere."""

    def __init__(self) -> None:
        super().__init__(self._write_line, self._update)
        self.console = Console(stderr=True, highlight=False)
        self._is_terminal = self.console.is_terminal
        self._bar = ProgressBar(
            _Name(),
            BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
            _Pace(table_column=Column(no_wrap=True)),
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
        if self._is_terminal:  # elsewhere stopping prints an empty line
            self._bar.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No bar while the block asks the user something."""
        self._finish()
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _write_line(self, line: str) -> None:
        self._finish()
        with writing_to(self.console.file, "standard error"):
            self.console.print(escape(printable_text(line)), soft_wrap=True)

    def _update(self, progress: Progress) -> None:
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
            with writing_to(self.console.file, "standard error"):
                line = f"  {name}: {done}/{total} {unit}, {_pace(rate, (total - done) / rate)}"
                self.console.print(escape(line), soft_wrap=True)

    def _is_due(self, now: float, share: float) -> bool:
        """Whether to print a line, `share` of the work after the last one."""
        enough = share >= _MIN_SHARE or now - self._started >= _TIME_FACTOR * (self._last - self._started)
        return enough and now - self._last >= _MIN_SECONDS

    def _finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._name = None, ""


def show(line: str = "") -> None:
    """Print a result line to standard output, with control sequences escaped."""
    with writing_to(sys.stdout, "standard output"):
        typer.echo(printable_text(line))


def show_table(table: Table) -> None:
    """Print a table of results to standard output."""
    with writing_to(sys.stdout, "standard output"):
        Console(highlight=False).print(table)


def keys_option(text: str, page: str) -> Any:
    """The option --keys: print the page of keys that a function gives ("module:function") and exit."""

    def show_page(wanted: bool) -> None:
        if wanted:
            show(pkgutil.resolve_name(page)().rstrip("\n"))
            raise typer.Exit

    return typer.Option("--keys", help=text, callback=show_page, is_eager=True)


def show_error(text: str) -> None:
    """Print an error to standard error, without a traceback or markup."""
    console = Console(file=sys.stderr, stderr=False, highlight=False)
    lines = [line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]}…" for line in text.split("\n")]
    text = "\n".join(lines)  # a name from a file may be of any length
    with contextlib.suppress(BadFile), writing_to(sys.stderr, "standard error"):
        console.print(Text(printable_text(text)), style="red" if console.is_terminal else None, soft_wrap=True)


@contextlib.contextmanager
def writing_to(stream: IO[str], name: str) -> Iterator[None]:
    """Raise BadFile if a stream cannot be written (a log on a full disk, say), and stop writing to it. Exit silently if
    its reader is gone (`head`), as SIGPIPE would.
    """
    try:
        yield
    except OSError as error:
        # Python would flush its buffer again at exit, with a traceback.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(_BROKEN_PIPE)
        raise BadFile(
            f"{name} cannot be written: {error.strerror or error}.",
            at=name,
            fix="free some space, or let it go elsewhere; the same command goes on from what is finished.",
        ) from error


@contextlib.contextmanager
def process_log() -> Iterator[Log]:
    """A log for the block: shown in the first process, silent in the others.

    Leaves the process group at the end, also after an error, so that processes that wait for this one notice.
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
    """Wait, so that the `torchrun` process with the most informative error shows it first, which ends the others.

    Order: the first process, the other processes, processes that stop because another one is gone.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PEER_SECONDS)
    if isinstance(error, Interrupted) and error.by_another:
        time.sleep(2 * _PEER_SECONDS)


def _stop_at_first_signal() -> None:
    """Ignore the second Ctrl-C, which comes from `torchrun` after the terminal's and would interrupt the shutdown."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, stop)
