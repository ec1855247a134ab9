"""The SQLite file behind the verdicts: creating, opening and checking it, and its errors."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from saeffect.errors import BadFile, InUse, SaeffectError

__all__ = ["as_saeffect_error", "connect"]

_VERSION = 1
_APPLICATION = 0x5AEFFEC7
_TIMEOUT = 30.0  # seconds to wait for other writers
_SCHEMA = """
CREATE TABLE salt (value TEXT NOT NULL);
CREATE TABLE raters (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, folded TEXT NOT NULL UNIQUE, joined TEXT NOT NULL);
CREATE TABLE history (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  given TEXT NOT NULL,
  rater INTEGER NOT NULL REFERENCES raters (id),
  role TEXT NOT NULL CHECK (role IN ('rater', 'adjudicator')),
  kind TEXT NOT NULL CHECK (kind IN ('feature', 'shuffled')),
  arm TEXT NOT NULL,
  feature INTEGER NOT NULL,
  seen TEXT NOT NULL,
  verdict TEXT NOT NULL CHECK (verdict IN ('yes', 'no', 'unsure')),
  label TEXT NOT NULL,
  note TEXT NOT NULL,
  source TEXT NOT NULL,
  request TEXT UNIQUE);
CREATE INDEX of_rater ON history (rater, id);
CREATE TABLE undone (history INTEGER PRIMARY KEY REFERENCES history (id), at TEXT NOT NULL);
CREATE TRIGGER history_stays BEFORE UPDATE ON history BEGIN SELECT RAISE(ABORT, 'the history only grows'); END;
CREATE TRIGGER history_keeps BEFORE DELETE ON history BEGIN SELECT RAISE(ABORT, 'the history only grows'); END;
CREATE TRIGGER undone_stays BEFORE UPDATE ON undone BEGIN SELECT RAISE(ABORT, 'the history only grows'); END;
CREATE TRIGGER undone_keeps BEFORE DELETE ON undone BEGIN SELECT RAISE(ABORT, 'the history only grows'); END;
"""


# Raters who saw the verdicts of others before they had judged everything. Added after the other tables.
_LOOKED = """CREATE TABLE IF NOT EXISTS looked (
  rater INTEGER PRIMARY KEY REFERENCES raters (id), at TEXT NOT NULL)"""


def connect(path: Path) -> sqlite3.Connection:
    """Open a store, creating it on first use. Raises sqlite3.Error."""
    db = sqlite3.connect(path, timeout=_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            _require_empty(db, path)
            _create_tables(db, path)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version != _VERSION:
            raise BadFile(
                f"these verdicts were written by another version of saeffect (format {version}, not {_VERSION}).",
                at=str(path),
                fix="install that version, export them there, and import the CSV file here.",
            )
        check = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if check != "ok":
            raise sqlite3.DatabaseError(check)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        if not db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'looked'").fetchone()[0]:
            db.execute(_LOOKED)
    except BaseException:
        db.close()
        raise
    return db


def _require_empty(db: sqlite3.Connection, path: Path) -> None:
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    # Another process may have created the tables meanwhile.
    if tables and db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise BadFile("this is a database, but not of verdicts.", at=str(path), fix="move it elsewhere and try again.")


def _create_tables(db: sqlite3.Connection, path: Path) -> None:
    """Create the tables of a new file, unless another process has done so meanwhile."""
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("BEGIN EXCLUSIVE")
    try:
        if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            _require_empty(db, path)
            for statement in _statements(_SCHEMA):
                db.execute(statement)
            db.execute("INSERT INTO salt VALUES (?)", [secrets.token_hex(16)])
            db.execute(f"PRAGMA user_version = {_VERSION}")
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one: `executescript` would commit before it."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def as_saeffect_error(error: sqlite3.Error | OSError, path: Path) -> SaeffectError:
    """The user-facing error of a failed read or write of a store."""
    text, at = str(error), str(path)
    if "full" in text or "No space" in text:
        fix = "free some space and give the last verdict again; all before it are kept."
        return BadFile("this verdict was not saved: the disk is full.", at=at, fix=fix)
    if "locked" in text or "busy" in text:
        fix = "wait until it has ended, and try again."
        return InUse("another process has been writing to the verdicts for half a minute.", at=at, fix=fix)
    if "readonly" in text or "unable to open" in text or isinstance(error, OSError):
        fix = "change the permissions, or copy the run directory and serve the copy."
        return BadFile(f"verdicts cannot be written here: {text}.", at=at, fix=fix)
    fix = "move the file (and its -wal) elsewhere; `sqlite3 FILE .recover` reads what is whole. It was not changed."
    return BadFile(f"the verdicts cannot be read: {text}.", at=at, fix=fix)
