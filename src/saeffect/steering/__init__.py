"""Interventions: steer a model along features and along placebos, and measure what that does.

`run_trials` generates texts, `score_texts` reads more outcomes off them, and `effects` turns them into one line a
feature, `outcome_effects` into one a feature, outcome and control; `direct_effects` needs no sampling;
`best_dose` chooses how strongly to steer, from `score_doses`; `run_baselines` makes what steering must beat.
"""

from __future__ import annotations

from saeffect.steering.actions import ActionRow, Actions, actions_of, obstacles
from saeffect.steering.baselines import BASELINE_COLUMNS, BASELINES, naming_prompt, run_baselines
from saeffect.steering.different_prompts import continue_prompts
from saeffect.steering.direct_effect import direct_effects, kl_divergence, next_log_probabilities
from saeffect.steering.dose import RESPONSE_COLUMNS, best_dose, dose_response, score_doses
from saeffect.steering.effects import effects, outcome_effects
from saeffect.steering.feature_operators import SetFeatures, ablate, add_features, clamp
from saeffect.steering.generate import generate
from saeffect.steering.matched import matched_features, matched_lists
from saeffect.steering.mean_difference import MeanDifferences
from saeffect.steering.measures import OUTCOMES, OutcomeMeasure, outcome_named
from saeffect.steering.noise import NoiseCell, exponential_noise, exponential_noise_at
from saeffect.steering.operators import POSITIONS, AddVectors, Intervention, Operator, PositionedEdit
from saeffect.steering.outcomes import (
    RememberedVectors,
    Similarity,
    TextVectors,
    distinct_2,
    join_tokens,
    measure_texts,
    perplexity,
    similarity,
)
from saeffect.steering.paired import SHUFFLED, Obstacles, paired_values, summarise_pairs, tested_dose
from saeffect.steering.placebo import PLACEBOS, Directions, random_direction
from saeffect.steering.plan import OPERATORS, UNITS, Site, SteeringPlan, mean_residual_norm
from saeffect.steering.sampling import Sampling, next_tokens, penalise
from saeffect.steering.sharing import run_trials_shared
from saeffect.steering.text_encoders import MeanPooledEncoder, load_text_vectors
from saeffect.steering.text_scores import score_texts, shuffled_references
from saeffect.steering.together import features_together
from saeffect.steering.trials import TRIAL_COLUMNS, run_trials
from saeffect.steering.word_outcomes import keyword_score, off_list_score, text_words

__all__ = [
    "BASELINES",
    "BASELINE_COLUMNS",
    "OPERATORS",
    "OUTCOMES",
    "PLACEBOS",
    "POSITIONS",
    "RESPONSE_COLUMNS",
    "SHUFFLED",
    "TRIAL_COLUMNS",
    "UNITS",
    "ActionRow",
    "Actions",
    "AddVectors",
    "Directions",
    "Intervention",
    "MeanDifferences",
    "MeanPooledEncoder",
    "NoiseCell",
    "Obstacles",
    "Operator",
    "OutcomeMeasure",
    "PositionedEdit",
    "RememberedVectors",
    "Sampling",
    "SetFeatures",
    "Similarity",
    "Site",
    "SteeringPlan",
    "TextVectors",
    "ablate",
    "actions_of",
    "add_features",
    "best_dose",
    "clamp",
    "continue_prompts",
    "direct_effects",
    "distinct_2",
    "dose_response",
    "effects",
    "exponential_noise",
    "exponential_noise_at",
    "features_together",
    "generate",
    "join_tokens",
    "keyword_score",
    "kl_divergence",
    "load_text_vectors",
    "matched_features",
    "matched_lists",
    "mean_residual_norm",
    "measure_texts",
    "naming_prompt",
    "next_log_probabilities",
    "next_tokens",
    "obstacles",
    "off_list_score",
    "outcome_effects",
    "outcome_named",
    "paired_values",
    "penalise",
    "perplexity",
    "random_direction",
    "run_baselines",
    "run_trials",
    "run_trials_shared",
    "score_doses",
    "score_texts",
    "shuffled_references",
    "similarity",
    "summarise_pairs",
    "tested_dose",
    "text_words",
]
