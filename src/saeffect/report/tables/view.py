"""Parts of a report table: columns, rows, and cells of finished text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from saeffect.report.words.numbers import amount, amount_interval, count, is_defined, undefined

__all__ = ["Cell", "Column", "Row", "TableView", "arm_columns", "difference_unit", "short_fact"]


class Cell(NamedTuple):
    """One cell: its text, a smaller second line, and a tone ("", "muted", "good", "warn") for the style sheet."""

    text: str
    sub: str = ""
    tone: str = ""
    is_text: bool = False

    @classmethod
    def words(cls, text: object, *, sub: str = "", tone: str = "") -> Cell:
        """A cell of text."""
        return cls(str(text), sub, tone, is_text=True)

    @classmethod
    def dash(cls) -> Cell:
        """A cell that has no number by design."""
        return cls("–", tone="muted")

    @classmethod
    def undefined(cls, reason: object = "") -> Cell:
        """A cell whose number is undefined: "undefined" and the reason."""
        return cls.words(undefined(str(reason)), tone="muted")

    @classmethod
    def value(cls, value: Any, unit: str = "", *, reason: object = "", sub: str = "", sign: bool = False) -> Cell:
        """A number in its unit, or why there is none."""
        return cls(amount(value, unit, sign=sign), sub=sub) if is_defined(value) else cls.undefined(reason)

    @classmethod
    def estimate(
        cls, value: Any, low: Any, high: Any, unit: str = "", *, reason: object = "", sign: bool = True
    ) -> Cell:
        """A number with its 95 % interval below; the reason replaces a missing one."""
        defined = is_defined(low) and is_defined(high)
        ends = amount_interval(low, high, unit) if defined else f"interval {undefined(str(reason))}"
        return cls.value(value, unit, reason=reason, sub=ends, sign=sign)


class Column(NamedTuple):
    """Heading of a column; `role` is the arm's role if the column is an arm."""

    label: str
    sub: str = ""
    role: str = ""
    is_text: bool = False


class Row(NamedTuple):
    """A row's heading and cells; `strong` rows carry the result. Adjacent rows of one `group` share a heading; `tag` is
    a mark beside it. A row with a `key` has the id `row-<table>-<key>`.
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
    """A table of the page.

    Attributes:
        name: Its id on the page; `[[table:name]]` in caption and note refers to another table.
        corner: Heading of the column of row headings.
        stacks: Whether rows become blocks on a narrow screen.
        paper: Its number in the paper, if it reproduces a table of the paper.
        terms: Glossary keys of the terms that it uses.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    corner: str = ""
    stacks: bool = True
    note: str = ""
    source: str = ""
    paper: str = ""
    terms: tuple[str, ...] = ()


def arm_columns(table: pd.DataFrame) -> tuple[Column, ...]:
    """One column per row of a table with the columns arm and role."""
    return tuple(
        Column(str(name), "" if name == role else str(role), role=str(role))
        for name, role in zip(table["arm"], table["role"], strict=True)
    )


def difference_unit(unit: str) -> str:
    """Unit of a difference of two values of `unit`: shares differ by percentage points.

    Example:
        >>> difference_unit("share"), difference_unit("nats")
        ('points', 'nats')
    """
    return unit.replace("share", "points") if unit in {"share", "share of tokens"} else unit


def short_fact(value: object) -> str:
    """A fact as a cell: hashes cut to twelve digits, whole numbers grouped, missing ones "unknown".

    Example:
        >>> short_fact("24576"), short_fact(None)
        ('24,576', 'unknown')
    """
    text = str(value)
    if text in ("", "nan", "None"):
        return "unknown"
    if len(text) >= 40 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12] + "…"
    return count(int(text)) if text.isdigit() and len(text) > 4 else text
