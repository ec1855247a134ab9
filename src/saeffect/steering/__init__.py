"""Interventions: steer a model along features and along placebos, and measure the outcome.

Inputs are a model with an SAE's decoder at a hook (`Site`), a table of features, and a plan (`SteeringPlan`).
`run_trials` generates texts, `score_texts` measures further outcomes of them, `direct_effects` needs no sampling, and
`run_baselines` generates the texts of alternatives to steering. From their tables follow `effects` (one row a feature),
`outcome_effects` (one row per feature, outcome and control) and `best_dose`. `OUTCOMES` and `PLACEBOS` are the
registries of outcomes and of controls.
"""

from __future__ import annotations

from saeffect.steering.actions import obstacles
from saeffect.steering.baselines import MeanDifferences, run_baselines
from saeffect.steering.dose import RESPONSE_COLUMNS, best_dose, dose_response, score_doses
from saeffect.steering.effects import effects, outcome_effects
from saeffect.steering.generate import generate, stream
from saeffect.steering.operators import Intervention
from saeffect.steering.outcomes import (
    OUTCOMES,
    Outcome,
    RememberedVectors,
    TextVectors,
    load_text_vectors,
    outcome_named,
    score_texts,
)
from saeffect.steering.placebos import BASELINES, PLACEBOS, Placebo, matched_features
from saeffect.steering.plan import Site, SteeringPlan, check_names, features_together
from saeffect.steering.sampling import NoiseCell, Sampling
from saeffect.steering.trials import direct_effects, run_trials

__all__ = [
    "BASELINES",
    "OUTCOMES",
    "PLACEBOS",
    "RESPONSE_COLUMNS",
    "Intervention",
    "MeanDifferences",
    "NoiseCell",
    "Outcome",
    "Placebo",
    "RememberedVectors",
    "Sampling",
    "Site",
    "SteeringPlan",
    "TextVectors",
    "best_dose",
    "check_names",
    "direct_effects",
    "dose_response",
    "effects",
    "features_together",
    "generate",
    "load_text_vectors",
    "matched_features",
    "obstacles",
    "outcome_effects",
    "outcome_named",
    "run_baselines",
    "run_trials",
    "score_doses",
    "score_texts",
    "stream",
]
