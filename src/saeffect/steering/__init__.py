"""Interventions: steer a model along features and along placebos, and measure what that does.

`run_trials` generates texts and `effects` turns them into one line a feature; `direct_effects` needs no
sampling; `choose_dose` finds how strongly to steer.
"""

from __future__ import annotations

from saeffect.steering.direct_effect import direct_effects, kl_divergence, next_log_probabilities
from saeffect.steering.dose import DoseChoice, choose_dose, score_doses
from saeffect.steering.effects import effects
from saeffect.steering.feature_operators import SetFeatures, ablate, add_features, clamp
from saeffect.steering.generate import generate
from saeffect.steering.matched import matched_features
from saeffect.steering.noise import NoiseCell, exponential_noise, exponential_noise_at
from saeffect.steering.operators import POSITIONS, AddVectors, Intervention, Operator, PositionedEdit
from saeffect.steering.outcomes import Similarity, TextVectors, distinct_2, join_tokens, perplexity, similarity
from saeffect.steering.placebo import PLACEBOS, Directions, random_direction
from saeffect.steering.plan import Site, SteeringPlan, mean_residual_norm
from saeffect.steering.sampling import Sampling, next_tokens, penalise
from saeffect.steering.sharing import run_trials_shared
from saeffect.steering.trials import TRIAL_COLUMNS, run_trials

__all__ = [
    "PLACEBOS",
    "POSITIONS",
    "TRIAL_COLUMNS",
    "AddVectors",
    "Directions",
    "DoseChoice",
    "Intervention",
    "NoiseCell",
    "Operator",
    "PositionedEdit",
    "Sampling",
    "SetFeatures",
    "Similarity",
    "Site",
    "SteeringPlan",
    "TextVectors",
    "ablate",
    "add_features",
    "choose_dose",
    "clamp",
    "direct_effects",
    "distinct_2",
    "effects",
    "exponential_noise",
    "exponential_noise_at",
    "generate",
    "join_tokens",
    "kl_divergence",
    "matched_features",
    "mean_residual_norm",
    "next_log_probabilities",
    "next_tokens",
    "penalise",
    "perplexity",
    "random_direction",
    "run_trials",
    "run_trials_shared",
    "score_doses",
    "similarity",
]
