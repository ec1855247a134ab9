"""What the steer stage wrote, read back for the report."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from saeffect.io import read_json
from saeffect.report import SteeringResults
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.steering_plan import chosen_dose

__all__ = ["steering_results"]


def steering_results(run: RunFolder) -> SteeringResults | None:
    """The steer stage's tables and settings; None for a study that does not steer.

    Raises:
        NotFound: The stage has not run.
    """
    config = run.study.config.steering
    if config is None:
        return None
    found = read_json(run.path("steering", "dose.json"))
    dose, note = chosen_dose(run)
    response = run.table_or_none(run.path("steering", "dose_response.parquet"))
    return SteeringResults(
        operator=config.operator,
        unit=config.unit,
        dose=dose,
        dose_note=note,
        best_doses=found.get("best") or {},
        outcomes=config.outcomes,
        placebo=config.primary_placebo,
        placebos=config.placebos,
        n_prompts=len(config.prompts),
        samples=config.samples,
        outcome_effects=_tables(run, "outcome_effects"),
        baseline_effects=_tables(run, "baseline_effects"),
        together_effects=_tables(run, "together_effects"),
        dose_response=response if response is not None and len(response) else None,
    )


def _tables(run: RunFolder, name: str) -> Mapping[str, pd.DataFrame]:
    found = {arm: run.table_or_none(run.arm(arm, f"{name}.parquet")) for arm in run.study.config.arms}
    return {arm: table for arm, table in found.items() if table is not None and len(table)}
