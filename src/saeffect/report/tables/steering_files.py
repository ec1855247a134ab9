"""The tables on steering that are written beside the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from saeffect.report.context import ReportContext
from saeffect.report.outcome_summary import baseline_summary, dose_summary, outcome_summary

__all__ = ["steering_tables"]


def steering_tables(context: ReportContext, order: Sequence[str]) -> dict[str, pd.DataFrame]:
    """What the report says about steering, as tables.

    Args:
        context: The study; without steering results there is nothing.
        order: The arms, in the order of the rows.

    Returns:
        By name, those that the study has: steering_outcomes (see `outcome_summary`), outcome_effects,
        baseline_effects and together_effects (every arm's rows, with a column arm), steering_baselines (see
        `baseline_summary`), dose_response (one row per arm, feature and dose) and dose_response_by_arm
        (see `dose_summary`).
    """
    results = context.steering
    if results is None:
        return {}
    found = {
        "steering_outcomes": outcome_summary(results, order, alpha=context.alpha),
        "outcome_effects": _every_arm(results.outcome_effects, order),
        "steering_baselines": baseline_summary(results, order),
        "baseline_effects": _every_arm(results.baseline_effects, order),
        "together_effects": _every_arm(results.together_effects, order),
    }
    if results.dose_response is not None:
        found["dose_response"] = results.dose_response
        found["dose_response_by_arm"] = dose_summary(results.dose_response, order)
    return {name: table for name, table in found.items() if len(table)}


def _every_arm(tables: Mapping[str, pd.DataFrame], order: Sequence[str]) -> pd.DataFrame:
    shown = []
    for arm in order:
        if arm in tables and len(tables[arm]):
            table = tables[arm].copy()
            table.insert(0, "arm", arm)
            shown.append(table)
    return pd.concat(shown, ignore_index=True) if shown else pd.DataFrame()
