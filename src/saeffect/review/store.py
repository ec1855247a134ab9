"""Verdicts of many people in one SQLite file beside the run: a history that only grows.

A verdict is acknowledged after it is on the disk (WAL, one transaction each, flushed), so neither a killed server nor a
full disk takes one back. Rows are never changed or deleted; undoing one adds a row to `undone`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd

from saeffect.errors import ConfigError, unknown_name
from saeffect.review.database import as_saeffect_error, connect
from saeffect.review.verdicts import VERDICTS

__all__ = ["NOT_BLIND", "STORE", "Verdict", "Rater", "VerdictStore"]

STORE = "verdicts.sqlite"
NOT_BLIND = "app, not blind"
"""Source of a verdict whose rater had seen the verdicts of others."""
_MAX_LENGTH = {"name": 60, "label": 120, "note": 2_000}
_HISTORY_QUERY = """
SELECT history.id, given, raters.name AS rater, role, kind, arm, feature, seen, verdict, label, note, source,
  undone.at AS undone
FROM history JOIN raters ON raters.id = history.rater LEFT JOIN undone ON undone.history = history.id
ORDER BY history.id
"""
_COLUMNS = (
    *("id", "given", "rater", "role", "kind", "arm", "feature", "seen", "verdict", "label", "note", "source"),
    "undone",
)


@dataclass(frozen=True)
class Rater:
    """A person who judges: `name` as first written, `known` whether the name had joined before."""

    name: str
    known: bool


@dataclass(frozen=True)
class Verdict:
    """One verdict of a person.

    Attributes:
        kind: "feature", or "shuffled" for a decoy that is no feature (`feature` then numbers the decoys).
        seen: `saeffect.review.queue.fingerprint_tokens`, so that a verdict never passes to another feature of this
            number.
        role: "rater", or "adjudicator" for a decision where raters differ.
        request: The browser's id of this submission, so that sending it again adds nothing; "" for none.
        source: "app", `NOT_BLIND`, or the file that it was imported from.
    """

    arm: str
    feature: int
    seen: str
    verdict: str
    label: str = ""
    note: str = ""
    kind: Literal["feature", "shuffled"] = "feature"
    role: Literal["rater", "adjudicator"] = "rater"
    request: str = ""
    source: str = "app"


class VerdictStore:
    """The verdicts of one run. The first rater creates the file; reading never does.

    One object serves all threads of a process; any number of processes may use the same file.

    Errors of all methods: BadFile if the file is damaged or cannot be written (a full disk, a read-only folder), InUse
    if another process holds it for half a minute. What was acknowledged before stays as it is.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened_id: tuple[int, int] | None = None
        self._scratch: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = self._opened_id = None
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def join(self, name: str) -> Rater:
        """The rater of this name, added if new. Names are equal that differ in case, spaces or Unicode form alone.

        ConfigError for a name that is empty, longer than 60 characters, or begins with a bracket.
        """
        name = _check_name(name)
        with self._writing() as db:
            return _add_rater(db, name)[1]

    def raters(self) -> list[str]:
        """Everybody who has joined, in order of joining."""
        return [name for (name,) in self._read("SELECT name FROM raters ORDER BY id")]

    def find(self, name: str) -> str | None:
        """The name of this rater as first written, or None; adds nobody."""
        rows = self._read("SELECT name FROM raters WHERE folded = ?", [_fold(name)])
        return str(rows[0][0]) if rows else None

    def record(self, rater: str, *verdicts: Verdict) -> list[int]:
        """Add verdicts, all or none, and return their ids once they are on the disk.

        A verdict whose `request` is already stored is not added again.
        """
        return self.record_many([(rater, verdict) for verdict in verdicts])

    def record_many(self, verdicts: Sequence[tuple[str, Verdict]]) -> list[int]:
        """`record` for verdicts of several raters, in one transaction."""
        rows = [(_check_name(rater), _check_verdict(verdict)) for rater, verdict in verdicts]
        with self._writing() as db:
            numbers = {name: _add_rater(db, name)[0] for name in dict.fromkeys(name for name, _ in rows)}
            return [_insert(db, numbers[name], row) for name, row in rows]

    def undo(self, rater: str) -> Verdict | None:
        """Undo the rater's latest verdict that is not undone, and return it; None if there is none."""
        latest = """SELECT history.id, arm, feature, seen, verdict, label, note, kind FROM history
            JOIN raters ON raters.id = history.rater
            WHERE folded = ? AND role = 'rater' AND history.id NOT IN (SELECT history FROM undone)
            ORDER BY history.id DESC LIMIT 1"""
        with self._writing() as db:
            row = db.execute(latest, [_fold(rater)]).fetchone()
            if row is None:
                return None
            db.execute("INSERT INTO undone VALUES (?, ?)", [row[0], _now()])
            return Verdict(*row[1:])

    def mark_not_blind(self, rater: str) -> None:
        """Record that a rater (added if new) has seen the verdicts of others."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO looked VALUES (?, ?)", [_add_rater(db, _check_name(rater))[0], _now()])

    def is_not_blind(self, rater: str) -> bool:
        """Whether a rater has seen the verdicts of others."""
        query = "SELECT 1 FROM looked JOIN raters ON raters.id = looked.rater WHERE folded = ?"
        return bool(self._read(query, [_fold(rater)]))

    def history(self) -> pd.DataFrame:
        """Every verdict ever given, in order: `_COLUMNS`, with times `given` and `undone` (or "") in UTC, ISO 8601."""
        table = pd.DataFrame(self._read(_HISTORY_QUERY), columns=list(_COLUMNS))
        return table.astype({"id": "int64", "feature": "int64"}).fillna({"undone": ""})

    def current(self) -> pd.DataFrame:
        """The verdicts in force, as `history`: the latest of each rater, or of any adjudicator, on what they saw."""
        table = self.history()
        table = table[table["undone"] == ""]
        person = table["rater"].where(table["role"] == "rater", "")
        keys = table[["role", "kind", "arm", "feature", "seen"]].assign(judge=person)
        return table[~keys.duplicated(keep="last")].reset_index(drop=True)

    def judged(self, rater: str) -> dict[tuple[str, str, int, str], str]:
        """The verdicts of a rater in force: (kind, arm, feature, seen) to yes, no or unsure."""
        query = """SELECT kind, arm, feature, seen, verdict FROM history JOIN raters ON raters.id = history.rater
            WHERE folded = ? AND role = 'rater' AND history.id NOT IN (SELECT history FROM undone)
            ORDER BY history.id"""
        return {(row[0], row[1], row[2], row[3]): row[4] for row in self._read(query, [_fold(rater)])}

    def labels(self, rater: str) -> list[str]:
        """All labels of a rater, the commonest first, at most 200."""
        query = """SELECT label FROM history JOIN raters ON raters.id = history.rater
            WHERE folded = ? AND label != '' GROUP BY label ORDER BY count(*) DESC, min(history.id) LIMIT 200"""
        return [label for (label,) in self._read(query, [_fold(rater)])]

    def secret(self) -> bytes:
        """Random bytes of this file, which order each rater's queue and name its items; b"" without a file."""
        rows = self._read("SELECT value FROM salt")
        return bytes.fromhex(rows[0][0]) if rows else b""

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._translate_errors():
            if not self.path.exists():
                self.close()
                return []
            return list(self._open(write=False).execute(query, values))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, on the disk once the block has ended."""
        with self._lock, self._translate_errors():
            db = self._open(write=True)
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise

    def _open(self, *, write: bool) -> sqlite3.Connection:
        """The connection; a new one if the file was replaced, or must be written where a copy was read."""
        file_id = _file_id(self.path)
        if self._connection is not None and (file_id != self._opened_id or (write and self._scratch is not None)):
            self.close()
        if self._connection is None:
            if not write and not os.access(self.path.parent, os.W_OK):
                self._connection = self._open_copy()
            else:
                self._connection = connect(self.path)
            self._opened_id = _file_id(self.path)
        return self._connection

    def _open_copy(self) -> sqlite3.Connection:
        """A copy in a scratch folder: SQLite cannot read a WAL file in a folder that it cannot write to."""
        self._scratch = Path(tempfile.mkdtemp(prefix="saeffect-verdicts-"))
        for end in ("", "-wal"):
            file = self.path.with_name(self.path.name + end)
            if file.exists():
                shutil.copyfile(file, self._scratch / file.name)
        return connect(self._scratch / self.path.name)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            # A failed write may leave half a transaction in memory: the next call opens a new connection.
            with contextlib.suppress(sqlite3.Error):
                self.close()
            raise as_saeffect_error(error, self.path) from error


def _add_rater(db: sqlite3.Connection, name: str) -> tuple[int, Rater]:
    row = db.execute("SELECT id, name FROM raters WHERE folded = ?", [_fold(name)]).fetchone()
    if row is not None:
        return int(row[0]), Rater(str(row[1]), known=True)
    added = db.execute("INSERT INTO raters (name, folded, joined) VALUES (?, ?, ?)", [name, _fold(name), _now()])
    return int(added.lastrowid or 0), Rater(name, known=False)


def _insert(db: sqlite3.Connection, rater: int, verdict: Verdict) -> int:
    if verdict.request:
        stored = db.execute("SELECT id FROM history WHERE request = ?", [verdict.request]).fetchone()
        if stored is not None:
            return int(stored[0])
    row = [_now(), rater, verdict.role, verdict.kind, verdict.arm, verdict.feature, verdict.seen, verdict.verdict]
    row += [verdict.label, verdict.note, verdict.source, verdict.request or None]
    added = db.execute(
        "INSERT INTO history (given, rater, role, kind, arm, feature, seen, verdict, label, note, source, request)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        row,
    )
    return int(added.lastrowid or 0)


def _check_name(name: str) -> str:
    name = _clean(name, "name")
    if not name or name.startswith(("(", "'")):
        raise ConfigError("a rater's name begins with a letter or digit.", at="name", fix="write a name.")
    return name


def _check_verdict(verdict: Verdict) -> Verdict:
    if verdict.verdict not in VERDICTS:
        raise unknown_name("verdict", verdict.verdict, VERDICTS)
    return replace(verdict, label=_clean(verdict.label, "label"), note=_clean(verdict.note, "note"))


def _clean(text: str, what: str) -> str:
    """Text without control and surrogate characters, and no longer than it may be; ConfigError if longer."""
    keep = "\n" if what == "note" else ""
    text = "".join(c if c in keep or unicodedata.category(c) not in ("Cc", "Cs") else " " for c in text)
    text = text.strip() if what == "note" else " ".join(text.split())
    if len(text) > _MAX_LENGTH[what]:
        raise ConfigError(f"a {what} has at most {_MAX_LENGTH[what]:,} characters. Got {len(text):,}.", at=what)
    return text


def _fold(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
