"""Progress where there is no terminal: an early rate, and no line a batch."""

from __future__ import annotations

import itertools

import pytest

from saeffect.cli import console


def test_a_log_gets_a_rate_early_and_few_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.ConsoleProgress() as log:
        for done in range(1_001):  # a batch of one in eleven seconds: three hours
            log.progress("dose control", done, 1000, "texts")
            clock[0] += 11
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  dose control: 1/1000 texts, 11 s each, 10989 s left"
    assert 15 <= len(lines) <= 25
    told = [int(line.split(": ")[1].split("/")[0]) for line in lines]
    assert max(b - a for a, b in itertools.pairwise(told)) <= 100


def test_quick_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(console.time, "monotonic", lambda: 5.0)
    with console.ConsoleProgress() as log:
        for done in range(10):
            log.progress("dose control", done, 10, "texts")
    assert not capsys.readouterr().err
