"""All tables of a comparison, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import pandas as pd

from saeffect.comparison.judgement import Judgement, judgements_of

__all__ = ["Findings", "MatchTables"]


def _none() -> pd.DataFrame:
    return pd.DataFrame()


@dataclass(frozen=True, eq=False)
class MatchTables:
    """Which feature became which; a table without columns was not made.

    Attributes:
        fates_control: What became of each feature of the control, by each measure (`Correspondence.control`).
        fates_treatment: The same of the treatment's features (`Correspondence.treatment`).
        fate_counts: Kept, moved, gone, absorbed and new features beside what seeds show (`Correspondence.counts`).
        fates_null: Calls where an SAE of the control's model stands in for the treatment (`Correspondence.null`).
        cross_activity: The control's SAE on both models (`CrossActivity.result`), with `is_domain`.
        absorption: Parents of features that seemed gone (`saeffect.diffing.absorption`).
        stagewise: How far each feature turned, where the treatment's SAE was trained on from the control's
            (`saeffect.diffing.stagewise`).
    """

    fates_control: pd.DataFrame = field(default_factory=_none)
    fates_treatment: pd.DataFrame = field(default_factory=_none)
    fate_counts: pd.DataFrame = field(default_factory=_none)
    fates_null: pd.DataFrame = field(default_factory=_none)
    cross_activity: pd.DataFrame = field(default_factory=_none)
    absorption: pd.DataFrame = field(default_factory=_none)
    stagewise: pd.DataFrame = field(default_factory=_none)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the tables."""
        return tuple(one.name for one in fields(cls))


@dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """Everything that the comparison found; rows are ordered control, treatment, placebos.

    Attributes:
        table1: One row an arm: domain features, passing, similarities (`tables.table1`).
        table2: One row an arm: coherence of domain features (`tables.table2`).
        contrasts: One row per quantity and pair of arms (`contrasts.contrasts`, `seeds.seed_contrasts`).
        judgements: What may be credited to fine-tuning, one row a quantity (`judgement.judgement_table`).
        match_counts: Features by number of top tokens in the vocabulary (Figure 1).
        weights: Top-token weights of domain features (Figure 2).
        activity: Density and activation of domain features.
        design: How the arms differ besides the model (`design.design_check`).
        calibration: Alarms where there is nothing to find (`calibration.calibration_table`).
        power: What could have been found (`power.power_table`).
        by_chance: Findings beside how many chance would give (`by_chance.chance_table`).
        threats: What threatens the answer, and what to do about it (`threats.threats`).
        regression: What goes with a strong effect (`effect_regression.EffectRegression.terms`).
        partial_residuals: The same to plot (`EffectRegression.partial_residuals`).
        matches: Which feature became which.
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

    @property
    def judged(self) -> dict[str, Judgement]:
        """The judgements with the differences behind them, by quantity."""
        return judgements_of(self.judgements, self.contrasts)

    @classmethod
    def table_names(cls) -> tuple[str, ...]:
        """Names of the tables, those of `matches` apart."""
        return tuple(one.name for one in fields(Findings) if one.name != "matches")
