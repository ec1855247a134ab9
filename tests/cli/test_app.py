"""How commands end."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import typer

from saeffect.cli import app as command_line


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException | None]]:
    """A command that raises what is put into the list."""
    raised: list[BaseException | None] = []

    def command() -> None:
        if raised[0] is not None:
            raise raised[0]

    app = typer.Typer()
    app.command("first")(command)
    app.command("second")(command)
    monkeypatch.setattr(command_line, "app", app)
    monkeypatch.setattr(sys, "argv", ["saeffect", "first"])
    yield raised


def test_ctrl_c_is_told_and_has_its_exit_code(ends: list[BaseException | None], capsys: pytest.CaptureFixture) -> None:
    ends.append(KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip().startswith("Interrupted: stopped. What is finished is kept")


def test_of_many_processes_the_first_alone_tells_of_ctrl_c(
    ends: list[BaseException | None], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    ends.append(KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip() == ""


def test_other_ends(ends: list[BaseException | None]) -> None:
    ends.append(None)
    command_line.main()
    ends[0] = typer.Exit(3)
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 3
