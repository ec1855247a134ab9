from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeffect.errors import BadFile, ConfigError, UnknownName
from saeffect.review.store import STORE, Verdict, VerdictStore


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with VerdictStore(tmp_path / STORE) as opened:
        yield opened


def yes(feature: int, **more: Any) -> Verdict:
    return Verdict("control", feature, "aa", "yes", **more)


def standing(store: VerdictStore) -> list[tuple[str, int, str]]:
    table = store.current()
    return list(zip(table["rater"], table["feature"], table["verdict"], strict=True))


def test_reading_makes_no_file(store: VerdictStore) -> None:
    assert store.current().empty and store.raters() == [] and store.judged("ann") == {} and store.secret() == b""
    assert not store.path.exists()


def test_new_verdict_replaces_the_old_one_in_current_only(store: VerdictStore) -> None:
    store.record("ann", yes(7, label="cancer"))
    store.record("ann", Verdict("control", 7, "aa", "no"))
    store.record("ben", yes(7))
    assert standing(store) == [("ann", 7, "no"), ("ben", 7, "yes")]
    assert store.history()["verdict"].tolist() == ["yes", "no", "yes"]
    assert store.judged("ann") == {("feature", "control", 7, "aa"): "no"}


def test_undo_restores_the_previous_verdict(store: VerdictStore) -> None:
    store.record("ann", yes(7))
    store.record("ben", yes(8))
    store.record("ann", Verdict("control", 7, "aa", "no"))
    assert store.undo("ann") == Verdict("control", 7, "aa", "no")
    assert standing(store) == [("ann", 7, "yes"), ("ben", 8, "yes")]
    assert store.undo("ann") == yes(7)
    assert store.undo("ann") is None
    assert standing(store) == [("ben", 8, "yes")]
    assert (store.history()["undone"] != "").tolist() == [True, False, True]


def test_the_history_cannot_be_changed_or_deleted(store: VerdictStore) -> None:
    store.record("ann", yes(7))
    store.undo("ann")
    other = sqlite3.connect(store.path)
    for statement in (
        "UPDATE history SET verdict = 'no'",
        "DELETE FROM history",
        "DELETE FROM undone",
        "UPDATE undone SET at = ''",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            other.execute(statement)
    other.close()


def test_names_are_one_person_whatever_their_case_and_spaces(store: VerdictStore) -> None:
    assert store.join(" Ann  Bee ") == store.join("Ann Bee").__class__("Ann Bee", known=False)
    assert store.join("ANN\u00a0bee").known
    assert store.join("Ａnn Bee").name == "Ann Bee"  # a full-width A
    assert store.raters() == ["Ann Bee"]
    assert store.find("ann bee") == "Ann Bee" and store.find("ben") is None


@pytest.mark.parametrize("name", ["", "  ", "\x00", "(adjudication)", "'ann", "a" * 61])
def test_invalid_names_write_nothing(store: VerdictStore, name: str) -> None:
    with pytest.raises(ConfigError):
        store.join(name)
    with pytest.raises(ConfigError):
        store.record(name, yes(1))
    assert store.raters() == []


def test_sending_the_same_request_again_adds_nothing(store: VerdictStore) -> None:
    first = store.record("ann", yes(7, request="r1"))
    assert store.record("ann", yes(7, request="r1")) == first
    assert len(store.history()) == 1


def test_several_verdicts_are_added_together_or_not_at_all(store: VerdictStore) -> None:
    store.join("ann")
    with pytest.raises(UnknownName):
        store.record("ann", yes(1), Verdict("control", 2, "aa", "maybe"))
    with pytest.raises(ConfigError, match="label has at most"):
        store.record("ann", yes(1), yes(2, label="x" * 121))
    assert store.history().empty


def test_text_is_kept_as_written_without_control_characters(store: VerdictStore) -> None:
    store.record("ann", yes(7, label="a\x1b[31m\tb", note=" =1+1\nsecond \ud800 "))
    row = store.history().iloc[0]
    assert (row["label"], row["note"]) == ("a [31m b", "=1+1\nsecond")


def test_adjudications_stand_apart_and_the_last_decides(store: VerdictStore) -> None:
    store.record("ann", yes(7))
    store.record("ben", Verdict("control", 7, "aa", "no", role="adjudicator"))
    store.record("cy", yes(7, role="adjudicator"))
    table = store.current()
    assert table[["rater", "role", "verdict"]].to_numpy().tolist() == [
        ["ann", "rater", "yes"],
        ["cy", "adjudicator", "yes"],
    ]
    assert store.undo("cy") is None  # the key for undo is for the queue


def test_a_full_disk_takes_back_nothing_and_says_so(store: VerdictStore) -> None:
    store.record("ann", yes(0))
    limited = store._open(write=True)
    (pages,) = limited.execute("PRAGMA page_count").fetchone()
    limited.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(BadFile, match="not saved: the disk is full"):
        for feature in range(1, 100):
            store.record("ann", yes(feature, note="x" * 1000))
    saved = len(store.history())
    assert 1 <= saved < 100
    assert standing(store)[:1] == [("ann", 0, "yes")]
    store.record("ann", yes(200))
    assert len(store.history()) == saved + 1


@pytest.mark.parametrize("damage", ["scrap", "header", "page"])
def test_damaged_file_is_reported_and_unchanged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / STORE
    with VerdictStore(path) as store:
        store.record("ann", *(yes(i, note="x" * 500) for i in range(50)))
    content = bytearray(path.read_bytes())
    if damage == "scrap":
        content[:] = b"not a database at all, but long enough to be one" * 40
    elif damage == "header":
        content[:16] = b"\0" * 16
    else:
        content[4096 * 3 : 4096 * 5] = os.urandom(4096 * 2)
    path.write_bytes(content)
    for act in (lambda s: s.current(), lambda s: s.record("ann", yes(1))):
        with VerdictStore(path) as store, pytest.raises(BadFile, match="cannot be read"):
            act(store)
    assert path.read_bytes() == bytes(content)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / STORE
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs (x)")
    other.commit()
    other.close()
    before = path.read_bytes()
    with VerdictStore(path) as store, pytest.raises(BadFile, match="not of verdicts"):
        store.record("ann", yes(1))
    assert path.read_bytes() == before


def test_a_file_that_was_taken_away_is_noticed(store: VerdictStore, tmp_path: Path) -> None:
    store.record("ann", yes(1))
    store.close()
    shutil.move(store.path, tmp_path / "kept")
    assert store.current().empty and not store.path.exists()
    store.record("ann", yes(2))
    assert standing(store) == [("ann", 2, "yes")]
    store.close()
    shutil.move(tmp_path / "kept", store.path)
    assert standing(store) == [("ann", 1, "yes")]


def as_nobody(work: Callable[[], None]) -> int:
    """Run something in a child without the rights of root; its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_read_only_run_can_be_read_but_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    writer = VerdictStore(folder / STORE)
    writer.record("ann", yes(1))  # still open: what it holds lies in the WAL
    for place in (*tmp_path.parents, tmp_path):
        if place.stat().st_uid == os.geteuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o055)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)

    def read_and_try() -> None:
        with VerdictStore(folder / STORE) as store:
            assert standing(store) == [("ann", 1, "yes")]
            with pytest.raises(BadFile, match="cannot be written here"):
                store.record("ann", yes(2))
            assert standing(store) == [("ann", 1, "yes")]

    assert as_nobody(read_and_try) == 0
    folder.chmod(0o755)
    writer.close()


def test_many_threads_and_two_stores_lose_nothing(tmp_path: Path) -> None:
    stores = [VerdictStore(tmp_path / STORE) for _ in range(2)]

    def rate(number: int) -> None:
        for feature in range(5):
            stores[number % 2].record(f"rater {number}", yes(feature))

    threads = [threading.Thread(target=rate, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        assert len(standing(store)) == 40
        store.close()


WRITER = textwrap.dedent("""
    import sys, threading
    from saeffect.review.store import Verdict, VerdictStore
    store = VerdictStore(sys.argv[1])
    def rate(name):
        for feature in range(100_000):
            (number,) = store.record(name, Verdict("control", feature, "aa", "yes"))
            sys.stdout.write(f"{number} {name} {feature}\\n"); sys.stdout.flush()
    for n in range(4):
        threading.Thread(target=rate, args=(f"rater{n}",)).start()
""")


def test_what_a_killed_process_acknowledged_is_there(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / STORE)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.read().splitlines(keepends=True)
    process.wait()
    acknowledged = {tuple(line.split()) for line in lines if line.endswith("\n")}
    assert len(acknowledged) >= 40
    with VerdictStore(tmp_path / STORE) as store:
        table = store.history()
        kept = set(zip(table["id"].astype(str), table["rater"], table["feature"].astype(str), strict=True))
        assert acknowledged <= kept
        assert len(kept - acknowledged) <= 4  # one in the hand of each thread
