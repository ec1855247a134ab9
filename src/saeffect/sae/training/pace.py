"""How fast a training goes, and how long it still takes."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

__all__ = ["Pace", "duration"]

_WINDOW = 60.0  # seconds that the rate is taken over
_MARKS = 6  # but at least five intervals, so that their median means something
_STALL = 10.0  # so many times slower than the median interval: the machine slept, or another process had it


class Pace:
    """How fast steps go, lately, and how long the rest takes.

    The rate leaves out pauses that are announced, and intervals in which the machine plainly stood still. The
    time that is left counts announced pauses in the share they had so far, since there are more to come.

    Args:
        total: Steps of the whole training.
        first: Steps that were done before.
        now: A clock in seconds.

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
        """Begin to count now."""
        self._started, self._paused = self._now(), 0.0
        self._marks = deque([(self._first, 0.0)])

    def seconds(self) -> float:
        """Since the start, pauses included."""
        return self._now() - self._started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out of the rate."""
        begun = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - begun

    def mark(self, done: int) -> None:
        """So many steps are done."""
        active = self.seconds() - self._paused
        if done <= self._marks[-1][0]:
            return
        self._marks.append((done, active))
        while len(self._marks) > _MARKS and self._marks[1][1] < active - _WINDOW:
            self._marks.popleft()

    def steps_per_second(self) -> float:
        """Over about the last minute; NaN as long as it is not known."""
        marks = list(self._marks)
        intervals = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
        if not intervals:
            return math.nan
        usual = statistics.median(seconds / steps for steps, seconds in intervals)
        intervals = [(steps, seconds) for steps, seconds in intervals if seconds <= _STALL * usual * steps]
        seconds = sum(seconds for _, seconds in intervals)
        return sum(steps for steps, _ in intervals) / seconds if seconds > 0 else math.nan

    def seconds_left(self) -> float:
        """Until the last step; NaN as long as it is not known."""
        done = self._marks[-1][0]
        rate = self.steps_per_second()
        if not rate > 0:
            return math.nan
        return (self._total - done) * (1 / rate + self._paused / max(1, done - self._first))


def duration(seconds: float) -> str:
    """A stretch of time in the units that people use.

    Example:
        >>> [duration(s) for s in (45, 59.6, 720, 12000, 7200, 300_000)]
        ['45 s', '1 min', '12 min', '3 h 20 min', '2 h', '3 d 11 h']
    """
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min".removesuffix(" 0 min")
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h".removesuffix(" 0 h")
