"""The sections on evidence: what chance gives, which feature became which, what goes with effects, what threatens."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.comparison.arms import Roles, roles_of
from saeffect.report.context import ReportContext
from saeffect.report.tables.evidence import calibration_verdict, coherence_sentence
from saeffect.report.tables.matching import cross_summary, fate_summary
from saeffect.report.threat_view import ThreatSummary, gravest, threat_summary
from saeffect.report.words.evidence import power_sentence

__all__ = ["Evidence", "evidence"]


@dataclass(frozen=True)
class Evidence:
    """What the sections say in words.

    Attributes:
        calibration: May the findings be believed?
        power: What could have been found; "" if unknown.
        fates: How many features have no counterpart beyond what seeds show; "" where that is unknown.
        cross: Which features fire more.
        stagewise: Why features were not followed through training on; "" if they were.
        regression: Does coherence go with the effect?
        threats: How many threats there are.
        gravest: Those to be quoted beside the answer.
        limits: What cannot be concluded and why, by section; "" where something can.
    """

    calibration: str
    power: str
    fates: str
    cross: str
    stagewise: str
    regression: str
    threats: ThreatSummary
    gravest: tuple[str, ...]
    limits: dict[str, str]


def evidence(comparison: Comparison, context: ReportContext) -> Evidence:
    """The words of the sections; every table that is missing is said to be, with the reason."""
    roles = _roles(comparison)
    return Evidence(
        calibration=calibration_verdict(comparison),
        power=power_sentence(comparison.power, roles),
        fates=fate_summary(comparison, context),
        cross=cross_summary(comparison, context),
        stagewise=_stagewise(comparison),
        regression=coherence_sentence(comparison),
        threats=threat_summary(comparison),
        gravest=tuple(gravest(comparison, list(comparison.answer["caveats"]))),
        limits=_limits(comparison),
    )


def _roles(comparison: Comparison) -> Roles:
    return roles_of(
        {str(name): str(role) for name, role in zip(comparison.table1["arm"], comparison.table1["role"], strict=True)}
    )


def _stagewise(comparison: Comparison) -> str:
    if len(comparison.matches.stagewise):
        return ""
    return (
        "Features were not followed through training: the treatment's SAE was not trained on from the control's, so "
        "their numbers do not correspond."
    )


def _was_tried(calibration: pd.DataFrame) -> bool:
    """Whether any declared test could be tried where there is nothing to find; any at all where none is declared."""
    if calibration.empty:
        return False
    declared = calibration[calibration["declared"].astype(bool)]
    return bool(((declared if len(declared) else calibration)["tests"] > 0).any())


def _limits(comparison: Comparison) -> dict[str, str]:
    """Sections that have nothing to show, and why."""
    limits = {"chance": "", "fates": "", "regression": ""}
    counts = comparison.matches.fate_counts
    if counts.empty:
        limits["fates"] = "Features were not matched in this study, so nothing is known about which became which."
    elif not counts["n_placebo"].notna().any():
        limits["fates"] = (
            f"No feature can be called kept, moved, gone or new: {counts['reason'].iloc[0]}. The similarity of each "
            "feature to its nearest is in comparison/fates_control.parquet."
        )
    if not _was_tried(comparison.calibration):
        limits["chance"] = calibration_verdict(comparison)
    regression = comparison.regression
    if regression.empty or not regression["estimate"].notna().any():
        limits["regression"] = coherence_sentence(comparison)
    return limits
