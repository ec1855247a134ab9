"""`saeffect serve`: where it listens, whom it lets in, and what it says when it cannot."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saeffect.cli import serve as command
from saeffect.errors import BadFile, ConfigError, InUse, NotFound
from saeffect.web.access import Raters


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the command would have served: (run, settings, address to open)."""
    calls: list[Any] = []

    def run(folder: Path, settings: Any, listening: socket.socket, to_open: str | None) -> None:
        listening.close()
        calls.append((folder, settings, to_open))

    monkeypatch.setattr(command, "_run", run)
    yield calls


def test_by_default_this_machine_only(started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command.serve(tmp_path, port=0)
    _, settings, to_open = started[0]
    assert settings.is_local and to_open == f"http://127.0.0.1:{settings.port}/"
    assert to_open in capsys.readouterr().out
    command.serve(tmp_path, port=0, no_open=True)
    assert started[1][2] is None


def test_a_run_is_a_folder(started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        with pytest.raises(NotFound, match="run directory"):
            command.serve(tmp_path / name)
    assert started == []


def test_a_port_that_is_taken(started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(InUse, match=str(taken)):
            command.serve(tmp_path, port=taken)
        monkeypatch.setattr(command, "_PORT", taken)
        command.serve(tmp_path)
    assert started[0][1].port > taken


def test_an_address_of_another_machine(started: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        command.serve(tmp_path, host="192.0.2.1", port=0, rater=["ada"])
    assert not (tmp_path / "raters.json").exists()


def test_others_need_a_token_which_is_shown_once(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="no rater has a token"):
        command.serve(tmp_path, host="0.0.0.0", port=0)
    command.serve(tmp_path, host="0.0.0.0", port=0, rater=["ada", "ben"])
    shown = capsys.readouterr().out
    tokens = re.findall(r"token of (\w+), shown only now: (\S+)", shown)
    assert [Raters(tmp_path).rater_of(token) for _, token in tokens] == ["ada", "ben"]
    assert f"enter#{tokens[0][1]}" in shown
    _, settings, to_open = started[0]
    assert not settings.is_local and settings.requests_per_second > 0 and to_open is None
    command.serve(tmp_path, host="0.0.0.0", port=0)
    assert "raters with a token: ada, ben" in (again := capsys.readouterr().out) and tokens[0][1] not in again


def test_a_named_proxy_needs_tokens_too(started: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rater has a token"):
        command.serve(tmp_path, port=0, name=["Features.example.org"])
    command.serve(tmp_path, port=0, name=["Features.example.org"], rater=["ada"])
    assert started[0][1].names == ("features.example.org",)


def test_tokens_are_of_no_use_on_this_machine(started: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on this machine"):
        command.serve(tmp_path, port=0, rater=["ada"])
    assert not (tmp_path / "raters.json").exists()


def test_a_directory_where_tokens_cannot_be_kept(started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "raters.json").mkdir()
    with pytest.raises(BadFile):
        command.serve(tmp_path, host="0.0.0.0", port=0, rater=["ada"])
    assert started == []
