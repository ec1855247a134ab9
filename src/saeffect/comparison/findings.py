"""The result of a comparison: its tables, and the answer in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypedDict

import pandas as pd

from saeffect.comparison.judgement import Judgement, judgements_of

__all__ = ["Answer", "CitedNumber", "Comparison", "MatchTables"]


class CitedNumber(TypedDict):
    """Where a number of the paragraph comes from: the index of its first character, the table
    (`comparison/<table>.parquet`), and the values, by column, that select its row or rows.
    """

    start: int
    text: str
    table: str
    row: dict[str, Any]


class Answer(TypedDict):
    """The answer as plain text: what fine-tuning taught, tested against null fine-tunes ("" without them); what the two
    separately trained dictionaries show, in one sentence and in about ninety words; and the threats, gravest first.
    """

    learned: str
    headline: str
    paragraph: str
    traces: list[CitedNumber]
    sentences: list[str]
    caveats: list[str]


def _no_answer() -> Answer:
    return Answer(learned="", headline="", paragraph="", traces=[], sentences=[], caveats=[])


@dataclass(frozen=True, eq=False)
class MatchTables:
    """Which feature became which; a table that was not made has no columns.

    The fates are made by `saeffect.diffing.correspondence.measure`, cross_activity by `CrossActivity.result` (with
    `is_domain`), absorption and stagewise by the methods of these names; `further` are all others by name.
    """

    fates_control: pd.DataFrame = field(default_factory=pd.DataFrame)
    fates_treatment: pd.DataFrame = field(default_factory=pd.DataFrame)
    fate_counts: pd.DataFrame = field(default_factory=pd.DataFrame)
    fates_null: pd.DataFrame = field(default_factory=pd.DataFrame)
    cross_activity: pd.DataFrame = field(default_factory=pd.DataFrame)
    absorption: pd.DataFrame = field(default_factory=pd.DataFrame)
    stagewise: pd.DataFrame = field(default_factory=pd.DataFrame)
    further: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the tables but the further ones."""
        return tuple(table.name for table in fields(cls) if table.name != "further")


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """All results of the comparison; rows are ordered control, treatment, placebos.

    `table1` to `activity` are made by the functions of these names, `judgements` by `judgement_table`, `design` by
    `design_check`, `calibration` and `by_chance` by `saeffect.comparison.calibration`, `power` by `power_table`,
    `regression` and `partial_residuals` by `effect_regression`, `threats` by `saeffect.report.words.threats`. `answer`
    is empty until `saeffect.report.with_answer` writes it.
    """

    table1: pd.DataFrame
    table2: pd.DataFrame
    contrasts: pd.DataFrame
    judgements: pd.DataFrame
    match_counts: pd.DataFrame
    weights: pd.DataFrame
    activity: pd.DataFrame
    design: pd.DataFrame
    calibration: pd.DataFrame = field(default_factory=pd.DataFrame)
    power: pd.DataFrame = field(default_factory=pd.DataFrame)
    by_chance: pd.DataFrame = field(default_factory=pd.DataFrame)
    threats: pd.DataFrame = field(default_factory=pd.DataFrame)
    regression: pd.DataFrame = field(default_factory=pd.DataFrame)
    partial_residuals: pd.DataFrame = field(default_factory=pd.DataFrame)
    matches: MatchTables = field(default_factory=MatchTables)
    answer: Answer = field(default_factory=_no_answer)

    @cached_property
    def judged(self) -> dict[str, Judgement]:
        """The judgements with the differences behind them, by quantity."""
        return judgements_of(self.judgements, self.contrasts)

    def _repr_html_(self) -> str:
        """For notebooks: the two tables of the paper, and the declared contrasts."""
        declared = self.contrasts[self.contrasts["declared"].eq(True)]
        columns = ["label", "comparison", "estimate", "low", "high", "p", "unit"]
        parts = (("Table 1", self.table1.set_index("arm").T), ("Table 2", self.table2.set_index("arm").T),
                 ("Declared contrasts", declared[columns]))  # fmt: skip
        return "\n".join(f"<h4>{title}</h4>{table.to_html(border=0)}" for title, table in parts)

    @classmethod
    def table_names(cls) -> tuple[str, ...]:
        """Names of the tables, without those of `matches`."""
        return tuple(table.name for table in fields(cls) if table.name not in ("matches", "answer"))
