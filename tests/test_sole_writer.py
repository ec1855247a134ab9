"""Two writers of one folder: the second is refused, and a dead one keeps nobody out."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeffect.errors import BadFile, InUse
from saeffect.sole_writer import sole_writer

HOLD = """
import sys, time
from saeffect.sole_writer import sole_writer
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


def test_a_second_process_is_refused_and_changes_nothing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    before = list((tmp_path / "run").iterdir())
    with pytest.raises(InUse, match="another process is writing") as refused, sole_writer(tmp_path / "run"):
        pytest.fail("two writers")
    assert refused.value.at == str(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == before
    assert holder.poll() is None


def test_what_a_killed_process_leaves_keeps_nobody_out(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    with sole_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_in_which_nothing_was_written_is_gone_again(tmp_path: Path) -> None:
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


def test_a_folder_can_be_held_one_after_the_other(tmp_path: Path) -> None:
    for _ in range(3):
        with sole_writer(tmp_path):
            (tmp_path / "x").touch()


def test_where_a_file_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadFile, match="cannot be written to"), sole_writer(tmp_path / "file" / "run"):
        pytest.fail("held a file")
