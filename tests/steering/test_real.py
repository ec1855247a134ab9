"""Steering the real base model along the unembedding of a word makes it talk about that."""

from __future__ import annotations

import pandas as pd
import pytest

from saeffect.lm.architectures import unembedding
from saeffect.steering import Site, SteeringPlan, direct_effects, run_trials
from saeffect.steering.outcomes import distinct_2

pytestmark = pytest.mark.real


class CancerWords:
    """Says whether a text names the topic: similarity is 1 or about 0."""

    def mean_vector(self, text: str):
        import numpy as np

        return np.array([1.0, 0.0]) if "cancer" in text.lower() else np.array([0.0, 1.0])


def test_steering_towards_cancer(real_model):
    W_dec = unembedding(real_model)[:, real_model.encode(" cancer")].T.contiguous()
    top = [" cancer", " Cancer"]
    ids = [real_model.encode(token)[0] for token in top]
    features = pd.DataFrame({"feature": [0], "top_tokens": [top], "top_token_ids": [ids]})
    site = Site(real_model, "blocks.26.hook_resid_pre", W_dec, 500.0)
    # Sixteen samples: the share that names the topic is 0.81 here, and of four samples two may well not.
    plan = SteeringPlan(prompts=("What topic is on your mind?",), doses=(0.3,), samples=16, max_new_tokens=20)
    trials = run_trials(site, features, plan, vectors=CancerWords())
    named = trials.groupby("condition")["similarity"].mean()
    assert named["steered"] >= 0.75
    assert named["unsteered"] <= 0.25
    assert named["random"] <= 0.25
    assert trials[trials["condition"] == "unsteered"]["perplexity"].median() < 20
    direct = direct_effects(site, features, plan).set_index("condition")
    assert direct.loc["steered", "delta_logprob"] > 2
    assert abs(direct.loc["random", "delta_logprob"]) < 1
    assert distinct_2(real_model.encode(trials["text"][0])) > 0.5
