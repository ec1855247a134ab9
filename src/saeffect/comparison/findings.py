"""The result of a comparison: its tables, and the answer in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypedDict

import pandas as pd

from saeffect.comparison.judgement import Judgement, judgements_of

__all__ = ["Answer", "Comparison", "MatchTables", "CitedNumber"]


class CitedNumber(TypedDict):
    """Where a number of the paragraph comes from.

    Attributes:
        start: Index of its first character in the paragraph.
        table: Name of the table: a file `comparison/<table>.parquet`.
        row: The values, by column, that select the row or rows.
    """

    start: int
    text: str
    table: str
    row: dict[str, Any]


class Answer(TypedDict):
    """The answer as plain text without markup.

    Attributes:
        learned: What fine-tuning taught, against null fine-tunes; "" without them.
        headline: What two dictionaries trained apart show.
        paragraph: The answer with its numbers in about ninety words, complete in itself.
        caveats: The threats to it, gravest first (column `threat` of `Comparison.threats`).
    """

    learned: str
    headline: str
    paragraph: str
    traces: list[CitedNumber]
    sentences: list[str]
    caveats: list[str]


def _none() -> pd.DataFrame:
    return pd.DataFrame()


def _no_answer() -> Answer:
    return Answer(learned="", headline="", paragraph="", traces=[], sentences=[], caveats=[])


@dataclass(frozen=True, eq=False)
class MatchTables:
    """Which feature became which; a table without columns was not made.

    Attributes:
        fates_control: What became of each feature of the control, by each measure; as `fates_treatment`, `fate_counts`
            and `fates_null` made by `saeffect.diffing.correspondence.measure`.
        fate_counts: Kept, moved, gone, absorbed and new features beside those between seeds.
        fates_null: Calls where an SAE of the control's model replaces the treatment's.
        cross_activity: The control's SAE on both models (`CrossActivity.result`), with `is_domain`.
        absorption: Parents of features that seemed gone (`saeffect.diffing.absorption`).
        stagewise: How far each feature turned, where the treatment's SAE was trained on from the control's
            (`saeffect.diffing.stagewise`).
        further: Tables of other registered diffing methods, by name.
    """

    fates_control: pd.DataFrame = field(default_factory=_none)
    fates_treatment: pd.DataFrame = field(default_factory=_none)
    fate_counts: pd.DataFrame = field(default_factory=_none)
    fates_null: pd.DataFrame = field(default_factory=_none)
    cross_activity: pd.DataFrame = field(default_factory=_none)
    absorption: pd.DataFrame = field(default_factory=_none)
    stagewise: pd.DataFrame = field(default_factory=_none)
    further: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the tables but the further ones."""
        return tuple(table.name for table in fields(cls) if table.name != "further")


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """All that the comparison found; rows are ordered control, treatment, placebos.

    Attributes:
        table1: One row an arm: domain features, passing, similarities (`tables.table1`).
        table2: One row an arm: coherence of domain features (`tables.table2`).
        contrasts: One row per quantity and pair of arms (`contrasts.contrasts`, `seeds.seed_contrasts`).
        judgements: What may be credited to fine-tuning, one row a quantity (`judgement.judgement_table`).
        match_counts: Features by number of top tokens in the vocabulary (Figure 1).
        weights: Top-token weights of domain features (Figure 2).
        design: How the arms differ besides the model (`design.design_check`).
        calibration: Alarms where there is nothing to find (`calibration.calibration_table`).
        power: What could have been found (`power.power_table`).
        by_chance: Findings beside how many chance would give (`calibration.chance_table`).
        threats: What threatens the answer, and what to do about it (`saeffect.report.words.threats`).
        regression: What goes with a strong effect (`effect_regression.EffectRegression.terms`).
        answer: In plain sentences; empty until `saeffect.report.with_answer` writes it.
    """

    table1: pd.DataFrame
    table2: pd.DataFrame
    contrasts: pd.DataFrame
    judgements: pd.DataFrame
    match_counts: pd.DataFrame
    weights: pd.DataFrame
    activity: pd.DataFrame
    design: pd.DataFrame
    calibration: pd.DataFrame = field(default_factory=_none)
    power: pd.DataFrame = field(default_factory=_none)
    by_chance: pd.DataFrame = field(default_factory=_none)
    threats: pd.DataFrame = field(default_factory=_none)
    regression: pd.DataFrame = field(default_factory=_none)
    partial_residuals: pd.DataFrame = field(default_factory=_none)
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
