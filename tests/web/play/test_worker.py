"""One thread, many clients: fair turns, stopping, errors, limits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from saeffect.errors import ConfigError, InUse
from saeffect.web.play.worker import Job, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(max_running=2, max_waiting=5, max_per_client=2)
    yield made
    made.close()


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.gate, self.begun = threading.Event(), threading.Event()

    def put(self, client: str) -> Callable[[dict[str, Any]], None]:
        return lambda event: self.events.append((client, event))

    def steps(self, n: int, closed: list[str] | None = None, *, gated: bool = False) -> Iterator[dict[str, Any]]:
        try:
            for i in range(n):
                self.begun.set()
                if gated and i == 0:
                    self.gate.wait(60)
                yield {"type": "tokens", "step": i}
            yield {"type": "done"}
        finally:
            if closed is not None:
                closed.append("closed")

    def order(self) -> list[str]:
        return [client for client, event in self.events if event["type"] == "tokens"]


def wait(*jobs: Job) -> None:
    assert all(job.finished.wait(60) for job in jobs)


def test_clients_take_turns(worker: Worker) -> None:
    heard = Recorder()
    jobs = [worker.submit("a", heard.steps(6, gated=True), heard.put("a"))]
    jobs += [worker.submit("a", heard.steps(6), heard.put("a")), worker.submit("b", heard.steps(6), heard.put("b"))]
    heard.gate.set()
    wait(*jobs)
    order = heard.order()
    # While both have something to do, neither gets two steps in a row (but for the first, before b had come).
    both = order[1 : 1 + 2 * 5]
    assert all(x != y for x, y in itertools.pairwise(both))
    assert order.count("a") == 12 and order.count("b") == 6


def test_further_clients_wait_in_the_order_of_arrival(worker: Worker) -> None:
    heard = Recorder()
    jobs = [worker.submit(client, heard.steps(3, gated=client == "a"), heard.put(client)) for client in "abcd"]
    queued = [(client, event["ahead"]) for client, event in heard.events if event["type"] == "queued"]
    heard.gate.set()
    wait(*jobs)
    assert queued == [("c", 1), ("d", 2)]
    first = [heard.order().index(client) for client in "abcd"]
    assert first == sorted(first)


def test_stopped_job_releases_its_work_while_waiting(worker: Worker) -> None:
    heard, closed = Recorder(), []
    running = worker.submit("a", heard.steps(1000, closed, gated=True), heard.put("a"))
    waiting = worker.submit("a", heard.steps(5), heard.put("a"))
    assert worker.find(waiting.id) is waiting and worker.find(running.id) is running
    assert heard.begun.wait(60)
    running.stop()
    waiting.stop()
    heard.gate.set()
    wait(running, waiting)
    assert [event["type"] for _, event in heard.events].count("stopped") == 2
    assert closed == ["closed"] and len(heard.order()) <= 1
    assert worker.find(running.id) is None


def test_an_error_ends_its_job_alone(worker: Worker) -> None:
    heard = Recorder()

    def failing(error: Exception) -> Iterator[dict[str, Any]]:
        yield {"type": "start"}
        raise error

    ours = worker.submit("a", failing(ConfigError("no such feature.", at="features", fix="choose.")), heard.put("a"))
    theirs = worker.submit("b", failing(ZeroDivisionError("x")), heard.put("b"))
    wait(ours, theirs)
    after = worker.submit("c", heard.steps(1), heard.put("c"))
    wait(after)
    errors = {client: event for client, event in heard.events if event["type"] == "error"}
    assert (errors["a"]["what"], errors["a"]["fix"]) == ("no such feature.", "choose.")
    assert errors["b"]["what"] == "ZeroDivisionError: x"
    assert heard.events[-1][1]["type"] == "done"


def test_a_listener_that_is_gone_stops_the_job(worker: Worker) -> None:
    closed: list[str] = []

    def gone(event: dict[str, Any]) -> None:
        raise RuntimeError("the loop is closed")

    job = worker.submit("a", Recorder().steps(10_000, closed), gone)
    wait(job)
    assert closed == ["closed"]


def test_too_many_requests_are_refused(worker: Worker) -> None:
    heard = Recorder()
    worker.submit("a", heard.steps(2, gated=True), heard.put("a"))
    with pytest.raises(InUse, match="2 requests waiting"):
        for _ in range(4):
            worker.submit("a", heard.steps(1), heard.put("a"))
    with pytest.raises(InUse, match="too many requests"):
        for client in "bcdefgh":
            worker.submit(client, heard.steps(1), heard.put(client))
    heard.gate.set()


def test_closing_ends_everything(worker: Worker) -> None:
    heard = Recorder()
    jobs = [worker.submit(client, heard.steps(10_000_000), heard.put(client)) for client in "abcd"]
    worker.close()
    assert all(job.finished.is_set() for job in jobs)
    with pytest.raises(ConfigError, match="stopping"):
        worker.submit("a", heard.steps(1), heard.put("a"))
