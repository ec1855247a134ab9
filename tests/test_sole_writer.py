"""Two writers of one folder: the second is refused, and a dead one keeps nobody out."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeffect.errors import BadFile, InUse
from saeffect.io import sole_writer

HOLD = """
import sys, time
from saeffect.io import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_writer_is_refused(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    before = list((tmp_path / "run").iterdir())
    with pytest.raises(InUse, match="another process is writing") as refused, sole_writer(tmp_path / "run"):
        pytest.fail("two writers")
    assert refused.value.at == str(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == before
    assert holder.poll() is None


def test_killed_writer_leaves_no_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".saeffect-lock").is_file()
    with sole_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / ".saeffect-lock").exists()


def test_empty_folder_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), sole_writer(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_stays(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with sole_writer(tmp_path / "empty"):
        pass
    with sole_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "result").write_text("1")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a", "a/result", "empty"]


def test_locks_can_be_taken_in_turn(tmp_path: Path) -> None:
    for _ in range(3):
        with sole_writer(tmp_path):
            (tmp_path / "x").touch()


def test_where_a_file_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadFile, match="cannot be written"), sole_writer(tmp_path / "file" / "run"):
        pytest.fail("held a file")


def test_deleted_lock_file_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, the holder before deletes the file: the lock would be on a file without a name."""
    fcntl = pytest.importorskip("fcntl")
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        (tmp_path / ".saeffect-lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.suppress(InUse), sole_writer(tmp_path):  # newer releases of filelock try again, and hold a new one
        assert (tmp_path / ".saeffect-lock").is_file(), "held a deleted file"
    with sole_writer(tmp_path):
        assert (tmp_path / ".saeffect-lock").is_file()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.raises(BadFile, match="No space left") as told, sole_writer(tmp_path / "run"):
        pytest.fail("held")
    assert "free some space" in (told.value.fix or "")
    assert told.value.at == str(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
