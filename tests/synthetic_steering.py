"""Results of the steer stage for a synthetic study, for tests: every table, made by the functions that make real ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables
from saeffect.report import SteeringResults
from saeffect.steering import outcome_effects

DOSES = (0.2, 0.4, 0.8)


def synthetic_steering(arms: Mapping[str, ArmTables]) -> SteeringResults:
    """Outcomes against a random direction and the shuffled reference, baselines for two features, one set an arm."""
    outcomes, baselines, together = {}, {}, {}
    for name, arm in arms.items():
        trials = arm.interventions.assign(
            similarity_shuffled=arm.interventions["similarity"] * 0.5,
            off_list=np.where(arm.interventions["condition"] == "steered", 0.05, 0.02),
        )
        outcomes[name] = outcome_effects(
            trials, arm.direct_effects, declared=("similarity", "off_list"), placebos=("random",)
        )
        baselines[name] = _baselines(arm.effects["feature"].head(2).tolist())
        together[name] = _together(arm.effects)
    return SteeringResults(
        dose=0.4,
        best_doses={"control": 0.4, "treatment": 0.8},
        outcomes=("similarity", "off_list"),
        placebo="random",
        placebos=("random",),
        n_prompts=3,
        samples=2,
        outcome_effects=outcomes,
        baseline_effects=baselines,
        together_effects=together,
        dose_response=_dose_response(arms),
    )


def _baselines(features: list[int]) -> pd.DataFrame:
    """Steering is 0.1 behind the prompt on each feature, clearly so; the vector does not exist for the second."""
    rows = []
    for place, feature in enumerate(features):
        for baseline, effect, half in (("prompt", -0.1, 0.05), ("mean_difference", 0.02, 0.05)):
            missing = baseline == "mean_difference" and place == 1
            value = float("nan") if missing else effect
            rows.append(
                {
                    "feature": feature,
                    "outcome": "similarity",
                    "baseline": baseline,
                    "n_pairs": 0 if missing else 6,
                    "effect": value,
                    "low": value - half,
                    "high": value + half,
                    "p": 0.5,
                    "q": 0.5,
                    "reversed_share": 0.5,
                    "unsteered_mean": 0.3,
                    "steered_mean": 0.4,
                    "baseline_mean": 0.4 - value,
                    "alternative": "greater",
                    "unit": "cosine",
                    "declared": True,
                    "reason": "it never fired on general text" if missing else "",
                }
            )
    return pd.DataFrame(rows)


def _together(effects: pd.DataFrame) -> pd.DataFrame:
    members = effects["feature"].head(2).tolist()
    row = {**effects.iloc[0].to_dict(), "set": 0, "members": members, "outcome": "similarity", "placebo": "random"}
    return pd.DataFrame([{key: value for key, value in row.items() if key != "feature"}])


def _dose_response(arms: Mapping[str, ArmTables]) -> pd.DataFrame:
    """Gain grows and fluency falls with the dose; perplexity of feature i is 10^i at every dose.

    The placebo gains a tenth of what the feature does, and is like it in all else.
    """
    rows = []
    for name in arms:
        for place, condition in itertools.product(range(3), ("steered", "random")):
            for dose in DOSES:
                gain = dose * (1 + place) * (1.0 if condition == "steered" else 0.1)
                rows.append(
                    {
                        "arm": name,
                        "feature": place,
                        "condition": condition,
                        "dose": dose,
                        "n": 2,
                        "similarity": 0.3 + dose,
                        "gain": gain,
                        "distinct2": 1 - dose / 4,
                        "perplexity": 10.0**place,
                        "fluency": 1 - dose,
                        "score": gain * (1 - dose),
                        "direct_effect": 4 * dose,
                        "kl": dose,
                        "best": dose == 0.4 and condition == "steered",
                    }
                )
    return pd.DataFrame(rows)
