"""One thread that runs all requests of the playground, one step of each client at a time."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

from saeffect.errors import ConfigError, InUse, SaeffectError, first_line

__all__ = ["Event", "Job", "Worker", "error_fields"]

Event = dict[str, Any]
"""A JSON-able message with a `type`: queued, working, start, prompt, tokens, done, stopped, error."""

_FINAL = ("done", "stopped", "error")
_LOG = logging.getLogger(__name__)


def error_fields(error: BaseException) -> dict[str, str]:
    """An error as a page shows it: what, at, fix."""
    if isinstance(error, SaeffectError):
        return {"what": error.message, "at": error.at or "", "fix": error.fix or ""}
    return {"what": f"{type(error).__name__}: {first_line(error)}", "at": "", "fix": "see the server's log."}


class Job:
    """One request: its events go to `put`, from the worker's thread; the last one is done, stopped or error."""

    def __init__(self, client: str, work: Iterator[Event], put: Callable[[Event], object]) -> None:
        self.id, self.client = secrets.token_urlsafe(9), client
        self.finished = threading.Event()
        self._work, self._put = work, put
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Request a stop; a "stopped" event follows after the current step."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def send(self, event: Event) -> None:
        """Send an event; if the listener fails, the job stops."""
        try:
            self._put(event | {"job": self.id})
        except Exception:
            self.stop()

    def step(self) -> bool:
        """Do one step of the work; False if there is none left."""
        try:
            event = None if self.is_stopped else next(self._work, None)
        except Exception as error:
            if not isinstance(error, SaeffectError):
                _LOG.exception("the playground failed")
            event = {"type": "error", **error_fields(error)}
        event = event or {"type": "stopped"}
        self.send(event)
        if event["type"] not in _FINAL:
            return True
        self.close()
        self.finished.set()
        return False

    def close(self) -> None:
        """Release models and caches."""
        close = getattr(self._work, "close", None)
        if close is not None:
            close()


class Worker:
    """Runs jobs in a thread of its own, which starts with the first one.

    Up to `max_running` clients take turns, a step each; further ones wait in order of arrival. Each client has one
    running job, so many or long requests of one do not block the others.
    """

    def __init__(self, *, max_running: int = 4, max_waiting: int = 32, max_per_client: int = 3) -> None:
        self._max_running, self._max_waiting, self._max_per_client = max_running, max_waiting, max_per_client
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._running: deque[Job] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, client: str, work: Iterator[Event], put: Callable[[Event], object]) -> Job:
        """Queue the steps of a job: an iterator of events, run in the worker's thread.

        InUse if too many are waiting, of this client or in all; ConfigError after `close`.
        """
        job = Job(client, work, put)
        with self._wake:
            if self._closed:
                raise ConfigError("the server is stopping.", at="the playground")
            waiting = self._waiting.get(client, ())
            if len(waiting) >= self._max_per_client:
                raise InUse(
                    f"this page has {len(waiting)} requests waiting.", at="the playground", fix="stop one of them."
                )
            if sum(map(len, self._waiting.values())) >= self._max_waiting:
                raise InUse("too many requests are waiting.", at="the playground", fix="try again in a minute.")
            ahead = self._ahead(client)
            self._waiting.setdefault(client, deque()).append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="playground", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        if ahead:
            job.send({"type": "queued", "ahead": ahead})
        return job

    def _ahead(self, client: str) -> int:
        """Jobs that end before a new one of this client starts, if all take equally long; 0 if it starts at once."""
        n_own = sum(job.client == client for job in self._running) + len(self._waiting.get(client, ()))
        others = {job.client for job in self._running} | set(self._waiting)
        free = self._max_running - len(others - {client})
        return n_own if free > 0 else n_own + 1 - free

    def find(self, job_id: str) -> Job | None:
        """A job that is waiting or running."""
        with self._wake:
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            return next((job for job in (*self._running, *waiting) if job.id == job_id), None)

    def close(self, timeout: float = 10.0) -> None:
        """Stop all jobs and the thread."""
        with self._wake:
            self._closed = True
            for job in (*self._running, *(job for jobs in self._waiting.values() for job in jobs)):
                job.stop()
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._admit()
                while not self._running:
                    if self._closed:
                        return
                    self._wake.wait()
                    self._admit()
                job = self._running[0]
            unfinished = job.step()
            with self._wake:
                self._running.popleft()
                if unfinished:
                    self._running.append(job)

    def _admit(self) -> None:
        """Start jobs of waiting clients, and end stopped ones in the queue."""
        busy = {job.client for job in self._running}
        for client in list(self._waiting):
            jobs = self._waiting[client]
            for job in [job for job in jobs if job.is_stopped]:
                jobs.remove(job)
                job.step()
            if jobs and client not in busy and len(self._running) < self._max_running:
                self._running.append(jobs.popleft())
                if jobs:
                    self._waiting.move_to_end(client)
            if not jobs:
                del self._waiting[client]
