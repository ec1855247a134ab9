"""Progress where there is no terminal: an early rate, and no line a batch."""

from __future__ import annotations

import itertools
import re

import pytest

from saeffect.cli import console


def test_logs_show_a_rate_early_and_stay_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.ConsoleProgress() as log:
        for done in range(1_001):  # a batch of one in eleven seconds: three hours
            log.progress("dose control", done, 1000, "texts")
            clock[0] += 11
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  dose control: 1/1000 texts, 11 s each, 3 h 3 min left"
    assert 15 <= len(lines) <= 25
    told = [int(line.split(": ")[1].split("/")[0]) for line in lines]
    assert max(b - a for a, b in itertools.pairwise(told)) <= 100


def test_quick_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(console.time, "monotonic", lambda: 5.0)
    with console.ConsoleProgress() as log:
        for done in range(10):
            log.progress("dose control", done, 10, "texts")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_no_markup(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A model's folder may be called so; in rich's markup the first of these is an error."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    name = "put back into models[/b] [red]tuned" + " and more" * 20
    with console.ConsoleProgress() as log:
        assert log._is_terminal == terminal
        for done in range(3):
            log.progress(name, done, 2, "rows")
            clock[0] += 20
    err = capsys.readouterr().err
    assert terminal or f"  {name}: 1/2 rows" in err.splitlines()[0]


def test_a_bar_stays_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name, value in {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    with console.ConsoleProgress() as log:
        log.progress("features put back into organisation/a-model-of-7B", 10, 4_000_000, "texts")
        task = log._bar.tasks[0]
        monkeypatch.setattr(type(task), "speed", property(lambda _: 12_345.6))
        monkeypatch.setattr(type(task), "time_remaining", property(lambda _: 10_989.0))
        capsys.readouterr()
        log.console.print(log._bar.make_tasks_table([task]))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    lines = {line.strip() for line in re.split(r"[\r\n]+", shown) if "left" in line}
    assert len(lines) == 1, "every row that is drawn holds all of it"
    assert re.fullmatch(r"features pu… ━{20} 10/4000000 texts, 12,345\.6/s, 3 h 3 min left", lines.pop())
