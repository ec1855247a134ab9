"""What a table of the report is made of: columns, rows, and cells of finished text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from saeffect.report.words.numbers import amount, count, is_defined, undefined

__all__ = ["Cell", "Column", "Row", "TableView", "arm_columns", "difference_unit", "short_fact", "value_cell"]


@dataclass(frozen=True)
class Cell:
    """One cell: the value, a second smaller line, and a tone ("", "muted", "good", "warn") for the style sheet."""

    text: str
    sub: str = ""
    tone: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Column:
    """Heading of a column; `role` is an arm's role where the column is an arm."""

    label: str
    sub: str = ""
    role: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Row:
    """A row's heading and cells; `strong` rows carry the result, others support it.

    Rows with the same `group` follow each other under one heading, with `tag` as a mark beside it. A row with a `key`
    can be linked to, as `#row-<table>-<key>`.
    """

    label: str
    cells: tuple[Cell, ...]
    sub: str = ""
    strong: bool = False
    group: str = ""
    tag: str = ""
    key: str = ""


@dataclass(frozen=True)
class TableView:
    """A whole table.

    `stacks` tables turn into blocks on a narrow screen; `source` names the files it was made from; `paper` is its
    number in the paper, where it reproduces a table of it. `[[table:name]]` in caption and note refers to another.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    corner: str = ""
    stacks: bool = False
    note: str = ""
    source: str = ""
    paper: str = ""


def value_cell(value: Any, unit: str = "", *, sub: str = "", reason: str = "", sign: bool = False) -> Cell:
    """A number in its unit, or "undefined" with the reason below it."""
    if not is_defined(value):
        return Cell(undefined(reason), tone="muted", is_text=True)
    return Cell(amount(value, unit, sign=sign), sub=sub)


def arm_columns(table: pd.DataFrame) -> tuple[Column, ...]:
    return tuple(
        Column(str(name), _role_note(str(name), str(role)), role=str(role))
        for name, role in zip(table["arm"], table["role"], strict=True)
    )


def _role_note(name: str, role: str) -> str:
    return "" if name == role else role


def difference_unit(unit: str) -> str:
    """Unit of a difference of two values of `unit`: shares differ by percentage points.

    Example:
        >>> difference_unit("share"), difference_unit("nats")
        ('points', 'nats')
    """
    return unit.replace("share", "points") if unit in {"share", "share of tokens"} else unit


def short_fact(value: object) -> str:
    """A fact as a cell: hashes cut to twelve digits, whole numbers grouped, unknown said so."""
    text = str(value)
    if text in ("", "nan", "None"):
        return "unknown"
    if len(text) >= 40 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12] + "…"
    return count(int(text)) if text.isdigit() and len(text) > 4 else text
