"""The log of a training: lines of progress, and metrics.jsonl."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from saeffect.errors import BadFile, NotFound
from saeffect.io import atomic_path, writing
from saeffect.progress import Log, duration
from saeffect.sae.base import ARCHITECTURES
from saeffect.sae.training.loggers import LoggerName, MetricsLogger, TrainingRun, check_logger, open_logger

__all__ = ["METRICS_FILE", "Pace", "TrainingLog", "loss_parts", "progress_line", "read_metrics"]

METRICS_FILE = "metrics.jsonl"

# Metrics in a line of progress besides the loss: name in metrics.jsonl, label, format.
_PROGRESS_METRICS = (
    ("l0", "l0", ",.1f"),
    ("explained_variance", "explained variance", ".3f"),
    ("ce_loss_score", "CE loss score", ".3f"),
    ("l2_ratio", "l2 ratio", ".3f"),
    ("mean_log10_density", "mean log10 density", ".2f"),
    ("dead", "dead", ",.0f"),
)

_WINDOW = 60.0  # seconds over which the rate is measured
_MIN_MARKS = 6  # so at least five intervals


class TrainingLog:
    """metrics.jsonl, lines of progress and, if wanted, Weights & Biases or TensorBoard. A context manager.

    Each line of metrics.jsonl is an object: "step" (the finished step, from 0), "tokens" (seen by then), "kind"
    ("train", "evaluation" or "event"), "seconds" (of training and evaluation, over all restarts) and the metrics; a
    metric that is not finite is null. Lines are on disk when a method returns. Rows from `first_step` on, left by a
    stopped run, are dropped; `batch_size` is over all processes. UnknownName: no such logger. NotFound: it is not
    installed. ConfigError: it refuses to start. BadFile: the folder cannot be written, or its metrics.jsonl is damaged
    before its last line.

    Example:
        >>> import tempfile; from saeffect.progress import SILENT; folder = Path(tempfile.mkdtemp())
        >>> with TrainingLog(folder, total_steps=2, batch_size=8, first_step=0, config={}, log=SILENT) as log:
        ...     log.metrics(0, {"mse": 2.5})
        >>> read_metrics(folder)[0]["tokens"]
        8
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        total_steps: int,
        batch_size: int,
        first_step: int,
        config: Mapping[str, Any],
        log: Log,
        logger: LoggerName = "none",
    ) -> None:
        check_logger(logger)
        self._folder = Path(folder)
        self._total, self._batch_size, self._first, self._log = total_steps, batch_size, first_step, log
        self._config, self._logger_name = config, logger
        self._logger: MetricsLogger | None = None
        self._file: io.FileIO | None = None
        self._pace = Pace(total_steps, first_step)
        self._seconds_before = 0.0

    def __enter__(self) -> TrainingLog:
        path = self._folder / METRICS_FILE
        earlier: list[dict[str, Any]] = []
        try:
            with writing(path):
                self._folder.mkdir(parents=True, exist_ok=True)
                if self._first and path.exists():
                    earlier = [row for row in read_metrics(path) if row["step"] < self._first]
                run = TrainingRun(self._folder, self._config, self._first, earlier)
                self._logger = open_logger(self._logger_name, run, self._log)
                with atomic_path(path) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in earlier), encoding="utf-8")
                self._file = io.FileIO(path, "a")
        except BaseException:
            self._close_logger(failed=True)
            raise
        self._seconds_before = max((row.get("seconds") or 0.0 for row in earlier), default=0.0)
        self._pace.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close file and logger; a logger's failure to close is reported, not raised."""
        if self._file is not None:
            self._file.close()
        self._close_logger(failed=kind is not None)

    def metrics(self, step: int, row: Mapping[str, float], *, kind: Literal["train", "evaluation"] = "train") -> None:
        """Record metrics after a step; lines of progress show "loss", its parts, and those of `_PROGRESS_METRICS`."""
        if kind == "train":
            self._pace.mark(step + 1)
        seconds = self._record(step, kind, row)
        head = f"step {step + 1:,}/{self._total:,}"
        if kind == "evaluation":
            self._log(progress_line(f"held-out text after {head}", row))
        else:
            self._log(progress_line(head, row, self._time_words(step + 1, seconds)))

    def event(self, step: int, event: str, **numbers: float) -> None:
        """Record and report an event after a step: `event(999, "resampled", n_features=12)`."""
        self._record(step, "event", numbers, event=event)
        words = [
            f"{_three_digits(value)} {name[2:]}" if name.startswith("n_") else f"{name} {_three_digits(value)}"
            for name, value in numbers.items()
        ]
        self._log(f"step {step + 1:,}/{self._total:,}  {event} {', '.join(words)}".rstrip())

    def pause(self) -> AbstractContextManager[None]:
        """While the block runs, time does not count for tokens/s: `with log.pause(): evaluate()`."""
        return self._pace.pause()

    def _record(self, step: int, kind: str, numbers: Mapping[str, Any], **labels: str) -> float:
        seconds = self._seconds_before + self._pace.seconds()
        row: dict[str, Any] = {"step": step, "tokens": (step + 1) * self._batch_size, "kind": kind}
        row |= {"seconds": round(seconds, 3), **labels} | {name: _json_number(value) for name, value in numbers.items()}
        self._write(json.dumps(row, allow_nan=False) + "\n")
        if self._logger is not None:
            try:
                self._logger.log(row)
            except Exception as error:  # a logger's failure must not end a training
                self._log(f"{self._logger_name} takes no more metrics ({error}); {METRICS_FILE} goes on")
                self._close_logger(failed=True)
        return seconds

    def _write(self, line: str) -> None:
        assert self._file is not None
        data = line.encode()
        with writing(self._folder / METRICS_FILE):
            # One unbuffered write, so that a kill or a full disk can only damage the last line.
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _time_words(self, n_done: int, seconds: float) -> list[str]:
        rate = self._pace.steps_per_second() * self._batch_size
        words = [f"{rate:,.0f} tokens/s"] if math.isfinite(rate) else []
        seconds_left = self._pace.seconds_left()
        if n_done >= self._total:
            words.append(f"done in {duration(seconds)}")
        elif math.isfinite(seconds_left):
            words.append(f"{duration(seconds_left)} left")
        return words

    def _close_logger(self, *, failed: bool) -> None:
        logger, self._logger = self._logger, None
        if logger is None:
            return
        try:
            logger.close(failed=failed)
        except Exception as error:
            self._log(f"{self._logger_name} did not close well: {error}")


def loss_parts(names: Iterable[str]) -> dict[str, str]:
    """The names that are parts of the loss (they add up to it), and their labels.

    Example:
        >>> loss_parts(["l0", "auxiliary", "mse", "loss", "inner_mse_64"])
        {'mse': 'mse', 'auxiliary': 'auxiliary', 'inner_mse_64': 'mse of 64'}
    """
    labels = dict([("mse", "mse"), *(part for kind in ARCHITECTURES.values() for part in kind.loss_parts)])
    names = list(names)
    parts: dict[str, str] = {}
    for part, label in labels.items():
        if part.endswith("_"):
            parts |= {name: label + name.removeprefix(part) for name in names if name.startswith(part)}
        elif part in names:
            parts[part] = label
    return parts


def progress_line(head: str, row: Mapping[str, float], tail: Iterable[str] = ()) -> str:
    """One line of progress.

    Example:
        >>> progress_line("step 30/90", {"loss": 12.3, "mse": 10.1, "l1": 2.2, "l0": 54.31, "dead": 12}, ["9 s left"])
        'step 30/90  loss 12.3 (mse 10.1, l1 2.2)  l0 54.3  dead 12  9 s left'
    """
    pieces = [head]
    parts = [f"{label} {_three_digits(row[name])}" for name, label in loss_parts(row).items()]
    if "loss" in row:
        pieces.append(f"loss {_three_digits(row['loss'])}" + (f" ({', '.join(parts)})" if parts else ""))
    else:
        pieces += parts
    for name, label, spec in _PROGRESS_METRICS:
        if name in row:
            pieces.append(f"{label} {float(row[name]):{spec}}")
    return "  ".join([*pieces, *tail])


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or of the one in a folder, without an incomplete last line. NotFound if there is
    none; BadFile if it cannot be read, or a line before the last is damaged.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() and path.name != METRICS_FILE else path
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise NotFound(f"there is no {METRICS_FILE}.", at=str(path), fix="train an SAE into this folder.") from error
    except OSError as error:
        raise BadFile(f"this file cannot be read: {error.strerror}.", at=str(path)) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise BadFile(
                f"line {number} is no row of metrics.",
                at=str(path),
                fix="delete the line; weights and checkpoints do not depend on it.",
            ) from error
        row.setdefault("kind", "train")
        rows.append(row)
    return rows


def _json_number(value: Any) -> float | int | None:
    """A number of any library as Python's int or float; None if it is not finite."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _three_digits(value: float) -> str:
    """A number with three significant digits; from 100 on, all digits before the point.

    Example:
        >>> [_three_digits(v) for v in (12345.6, 12.34, 0.00123, 0.0, 1e-7)]
        ['12,346', '12.3', '0.00123', '0', '1e-07']
    """
    value = float(value)
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.3g}"


class Pace:
    """The recent rate of steps, and the time left until step `total`; the first `first` steps were done before.

    The rate leaves out pauses; the time left includes pauses at their share of the time so far.

    Example:
        >>> clock = iter([0.0, 10.0]); pace = Pace(100, 0, now=lambda: next(clock)); pace.mark(20)
        >>> pace.steps_per_second(), pace.seconds_left()
        (2.0, 40.0)
    """

    def __init__(self, total: int, first: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._total, self._first, self._now = total, first, now
        self._paused = 0.0
        self._marks: deque[tuple[int, float]] = deque()  # steps done, seconds without pauses
        self.start()

    def start(self) -> None:
        self._started, self._paused = self._now(), 0.0
        self._marks = deque([(self._first, 0.0)])

    def seconds(self) -> float:
        """Since the start, pauses included."""
        return self._now() - self._started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out of the rate."""
        started = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - started

    def mark(self, n_done: int) -> None:
        active = self.seconds() - self._paused
        if n_done <= self._marks[-1][0]:
            return
        self._marks.append((n_done, active))
        while len(self._marks) > _MIN_MARKS and self._marks[1][1] < active - _WINDOW:
            self._marks.popleft()

    def steps_per_second(self) -> float:
        """Over about the last minute; NaN while unknown."""
        (first, first_time), (last, last_time) = self._marks[0], self._marks[-1]
        return (last - first) / (last_time - first_time) if last_time > first_time else math.nan

    def seconds_left(self) -> float:
        """Until the last step; NaN while unknown."""
        n_done = self._marks[-1][0]
        rate = self.steps_per_second()
        if not rate > 0:
            return math.nan
        return (self._total - n_done) * (1 / rate + self._paused / max(1, n_done - self._first))
