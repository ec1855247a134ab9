"""A study so small that every number in it can be worked out by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for synthetic_study, which other tests share

from saeffect.comparison import ArmFacts, ArmTables

NAN = float("nan")


def _tiny_arm(name: str = "base", role: str = "control", shift: float = 0.0) -> ArmTables:
    """Five features; 1, 3 and 4 are of the domain; 1 and 3 were tested, and 3 alone passed.

    `shift` is added to every coherence.
    """
    features = pd.DataFrame(
        {
            "feature": [0, 1, 2, 3, 4],
            "top_tokens": [
                [" a", " b"],
                [" insulin", " dose"],
                [" c", " d"],
                [" nurse", " pain"],
                [" e", "<b>"],
            ],
            "top_weights": [[9.0, 9.0], [3.0, 1.0], [9.0, 9.0], [4.0, 2.0], [5.0, 3.0]],
            "density": [0.5, 0.01, 0.5, 0.03, 0.0],
            "mean_activation": [1.0, 2.0, 1.0, 4.0, NAN],
            "max_activation": [1.0, 5.0, 1.0, 6.0, 0.0],
        }
    )
    coherence = pd.DataFrame(
        {
            "feature": [0, 1, 2, 3, 4],
            "coherence": [0.9, 0.2 + shift, 0.9, 0.4 + shift, NAN],
            "n_known": [2, 2, 2, 2, 1],
            "reason": ["", "", "", "", "fewer than two known tokens"],
        }
    )
    selection = pd.DataFrame(
        {
            "feature": [0, 1, 2, 3, 4],
            "matches": [0, 2, 2, 2, 2],
            "matches_dot": [0, 2, 0, 1, 0],
            "matches_cosine": [0, 2, 2, 2, 2],
            "in_vocabulary": [False, True, True, True, True],
            "is_domain": [False, True, False, True, True],
        }
    )
    trials = [
        (feature, prompt, 0, condition, 0.0 if condition == "unsteered" else 0.4, similarity)
        for feature, values in {
            1: {"unsteered": (0.1, 0.3), "steered": (0.2, 0.4), "random": (0.1, 0.5)},
            3: {"unsteered": (0.3, 0.5), "steered": (0.8, 0.6), "random": (0.3, 0.3)},
        }.items()
        for condition, pair in values.items()
        for prompt, similarity in enumerate(pair)
    ]
    effects = pd.DataFrame(
        {
            "feature": [1, 3, 4],
            "n_pairs": [2, 2, 0],
            "effect": [0.0, 0.4, NAN],
            "p": [0.5, 0.01, NAN],
            "passed": [False, True, False],
            "paper_pass": [True, True, None],
            "placebo": "random",
        }
    )
    direct = pd.DataFrame(
        [
            (feature, prompt, condition, value)
            for feature, steered in ((1, 1.0), (3, 2.0))
            for prompt in (0, 1)
            for condition, value in (("steered", steered + prompt), ("random", 0.5))
        ],
        columns=["feature", "prompt", "condition", "delta_logprob"],
    )
    return ArmTables(
        name=name,
        role=role,
        features=features,
        coherence=coherence,
        selection=selection,
        interventions=pd.DataFrame(trials, columns=["feature", "prompt", "sample", "condition", "dose", "similarity"]),
        direct_effects=direct,
        effects=effects,
        facts=ArmFacts(role=role, model="toy"),
        coverage_unique=0.75,
    )


@pytest.fixture
def tiny_arm() -> Callable[..., ArmTables]:
    return _tiny_arm
