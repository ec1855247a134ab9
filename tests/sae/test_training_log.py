from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeffect.errors import BadFile
from saeffect.progress import Log
from saeffect.sae.training import log as training_log
from saeffect.sae.training.log import Pace, TrainingLog, progress_line, read_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training_log, "Pace", lambda total, first: Pace(total, first, now=clock))
    return clock


def open_log(folder: Path, said: list[str] | None = None, **changes: Any) -> TrainingLog:
    settings: dict[str, Any] = {
        "total_steps": 30_000,
        "batch_size": 2048,
        "first_step": 0,
        "config": {"k": 32, "where": Path("x")},
        "log": Log(None if said is None else said.append),
    }
    return TrainingLog(folder, **settings | changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


ROW = {"loss": 12.3, "mse": 10.1, "l1": 2.2, "l0": 54.3, "explained_variance": 0.812, "dead": 12}


# The file


def test_a_row_is_on_disk_when_the_call_returns(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path / "new" / "sae") as log:
        clock.now = 1.5
        log.metrics(29, ROW)
        assert lines(tmp_path / "new" / "sae") == [
            {"step": 29, "tokens": 30 * 2048, "kind": "train", "seconds": 1.5, **ROW}
        ]
        log.metrics(29, {"ce_loss_score": 0.9}, kind="evaluation")
        log.event(29, "resampled", n_features=7)
    assert [row["kind"] for row in lines(tmp_path / "new" / "sae")] == ["train", "evaluation", "event"]
    assert lines(tmp_path / "new" / "sae")[2] == {
        "step": 29, "tokens": 30 * 2048, "kind": "event", "seconds": 1.5, "event": "resampled", "n_features": 7,
    }  # fmt: skip


def test_numbers_of_any_library_and_those_that_json_lacks(tmp_path: Path) -> None:
    said: list[str] = []
    with open_log(tmp_path, said) as log:
        log.metrics(0, {"mse": float("nan"), "l0": math.inf, "loss": np.float32(2.5), "dead": torch.tensor(3)})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (row["mse"], row["l0"], row["loss"], row["dead"]) == (None, None, 2.5, 3)
    assert "mse nan" in said[0]


def test_a_new_training_begins_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff garbage\nmore\n")
    with open_log(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_resumed_training_keeps_what_was_before_its_checkpoint(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as log:
        for step in (99, 199, 299, 399):
            clock.now += 10
            log.metrics(step, {"mse": step})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(before + b'{"step": 499, "mse"')  # killed while it wrote
    with open_log(tmp_path, first_step=300) as log:
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
        clock.now += 5
        log.metrics(399, {"mse": 399})
    assert [row["step"] for row in lines(tmp_path)] == [99, 199, 299, 399]
    assert lines(tmp_path)[-1]["seconds"] == 35  # 30 before the stop, the lost 10 left out
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_step_equal_to_the_first_is_done_again(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.metrics(299, {"mse": 1})
        log.metrics(300, {"mse": 2})
    with open_log(tmp_path, first_step=300):
        assert [row["step"] for row in lines(tmp_path)] == [299]


@pytest.mark.parametrize("bad", [b"{torn\n", b"[1, 2]\n", b'{"mse": 1}\n', b"\xff\xfe\n", b'{"step": "5"}\n', b"7\n"])
def test_damaged_metrics_are_refused_with_line(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 3}\n')
    with pytest.raises(BadFile, match="line 2"), open_log(tmp_path, first_step=2):
        pass
    assert path.read_bytes() == b'{"step": 1}\n' + bad + b'{"step": 3}\n'


def test_zeros_at_the_end_after_a_power_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + b"\0" * 300)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_lost_file_does_not_stop_the_training(tmp_path: Path) -> None:
    with open_log(tmp_path, first_step=300) as log:
        log.metrics(300, {"mse": 1})
    assert [row["step"] for row in lines(tmp_path)] == [300]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadFile, match="cannot be written"), open_log(tmp_path / "file" / "sae"):
        pass
    (tmp_path / "sae" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(BadFile, match="cannot be"), open_log(tmp_path / "sae"):
        pass
    with pytest.raises(BadFile, match="cannot be"), open_log(tmp_path / "sae", first_step=5):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in (tmp_path / "sae").iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadFile, match="Permission"), open_log(tmp_path):
        pass


@pytest.fixture
def no_room() -> Iterator[Any]:
    """Lets a file grow to so many bytes only, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 20])
def test_full_disk_keeps_earlier_rows(tmp_path: Path, no_room: Any, room: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(BadFile, match="cannot be written"), open_log(tmp_path) as log:
        log.metrics(0, {"mse": 1.0})
        no_room(path.stat().st_size + room)
        log.metrics(1, {"mse": 2.0})
    no_room(resource.RLIM_INFINITY)
    assert len(path.read_bytes().splitlines()) == (2 if room else 1)  # the second is torn
    assert [row["step"] for row in read_metrics(path)] == [0]


# What a person reads


def test_the_line_of_progress(tmp_path: Path, clock: Clock) -> None:
    said: list[str] = []
    with open_log(tmp_path, said) as log:
        clock.now = 300.0
        log.metrics(1199, ROW)
        log.metrics(1199, {"explained_variance": 0.8, "ce_loss_score": 0.95, "dead": 3}, kind="evaluation")
        log.event(1199, "resampled", n_features=1234)
        clock.now = 7325.0
        log.metrics(29_999, {"mse": 0.00123, "auxiliary": 4})
    assert said == [
        "step 1,200/30,000  loss 12.3 (mse 10.1, l1 2.2)  l0 54.3  explained variance 0.812  dead 12"
        "  8,192 tokens/s  2 h left",
        "held-out text after step 1,200/30,000  explained variance 0.800  CE loss score 0.950  dead 3",
        "step 1,200/30,000  resampled 1,234 features",
        "step 30,000/30,000  mse 0.00123  auxiliary 4  8,388 tokens/s  done in 2 h 2 min",
    ]


def test_parts_that_only_one_architecture_has() -> None:
    assert progress_line("x", {"loss": 3, "mse": 1, "inner_mse_8": 2}) == "x  loss 3 (mse 1, mse of 8 2)"
    assert progress_line("x", {}) == "x"


def test_evaluations_do_not_slow_the_rate_but_the_end() -> None:
    clock = Clock()
    pace = Pace(1000, 0, now=clock)
    for done in range(10, 110, 10):
        clock.now += 5
        pace.mark(done)
        with pace.pause():
            clock.now += 15
    assert pace.steps_per_second() == pytest.approx(2)
    assert pace.seconds_left() == pytest.approx(900 * (0.5 + 1.5))


def test_the_rate_is_that_of_lately() -> None:
    clock = Clock()
    pace = Pace(10_000, 500, now=clock)
    assert math.isnan(pace.steps_per_second()) and math.isnan(pace.seconds_left())
    for index in range(40):
        clock.now += 10 if index < 20 else 5
        pace.mark(510 + 10 * index)
    assert pace.steps_per_second() == pytest.approx(2)


def test_a_clock_that_stands_still() -> None:
    pace = Pace(10, 0, now=lambda: 0.0)
    pace.mark(5)
    pace.mark(5)
    assert math.isnan(pace.steps_per_second()) and math.isnan(pace.seconds_left())


class Broken:
    def __init__(self) -> None:
        self.closed: list[bool] = []

    def log(self, row: Any) -> None:
        raise ConnectionError("no route")

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)
        raise ConnectionError("still none")


def test_a_logger_that_fails_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken()
    monkeypatch.setattr(training_log, "open_logger", lambda *_: broken)
    said: list[str] = []
    with open_log(tmp_path, said) as log:
        log.metrics(0, {"mse": 1})
        log.metrics(1, {"mse": 1})
    assert [row["step"] for row in lines(tmp_path)] == [0, 1]
    assert broken.closed == [True]
    assert [line for line in said if "no route" in line] == [said[0]]
