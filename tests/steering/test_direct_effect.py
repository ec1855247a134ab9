from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.lm.hooks import edited
from saeffect.steering import SteeringPlan, direct_effects, random_direction
from steering.tiny_model import D_MODEL, HOOK, n_hooks, site, tiny_model

W_DEC = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(5)) * 2
FEATURES = pd.DataFrame({"feature": [4, 1], "top_token_ids": [[10, 11, 12], np.array([20])]})
PLAN = SteeringPlan(prompts=("one two three", "four five"), doses=(0.5, -1.0), batch_size=4, seed=9)


def plain_log_p(lm, ids, vector=None, first=0):
    def edit(x):
        out = x.clone()
        out[:, first:] += vector
        return out

    input_ids = torch.tensor([ids])
    with torch.no_grad():
        if vector is None:
            return lm.model(input_ids=input_ids).logits[0, -1].log_softmax(-1)
        with edited(lm, HOOK, edit):
            return lm.model(input_ids=input_ids).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize(("positions", "first"), [("all", 0), ("generated", -1)])
def test_equals_two_plain_forward_passes(positions, first):
    lm = tiny_model(torch.float64)
    plan = SteeringPlan(**{**PLAN.__dict__, "positions": positions})
    table = direct_effects(site(lm, 4.0), W_DEC, FEATURES, plan)
    assert len(table) == 2 * 2 * 2 * 2
    top = {4: [10, 11, 12], 1: [20]}
    for row in table.itertuples():
        unit = W_DEC[row.feature] / W_DEC[row.feature].norm()
        if row.condition == "random":
            unit = random_direction(D_MODEL, seed=9, feature=row.feature, draw=(row.prompt, 0))
        ids = lm.encode(plan.prompts[row.prompt])
        before = plain_log_p(lm, ids)
        after = plain_log_p(lm, ids, row.dose * 4.0 * unit.double(), first)
        change = np.mean([(after[i] - before[i]).item() for i in top[row.feature]])
        assert row.delta_logprob == pytest.approx(change, abs=1e-5)
        assert row.kl == pytest.approx((before.exp() * (before - after)).sum().item(), abs=1e-5)


def test_order_columns_and_zero_dose(lm):
    plan = SteeringPlan(prompts=("a b", "c"), doses=(0.0,), batch_size=3)
    seen = []
    table = direct_effects(site(lm), W_DEC, FEATURES, plan, progress=lambda *n: seen.append(n))
    assert table.columns.tolist() == ["feature", "prompt", "condition", "dose", "delta_logprob", "kl"]
    assert table["feature"].tolist() == [1] * 4 + [4] * 4
    assert table["prompt"].tolist() == [0, 0, 1, 1] * 2
    assert table["condition"].tolist() == ["steered", "random"] * 4
    assert (table[["delta_logprob", "kl"]] == 0).all(axis=None)
    assert seen[-1] == (8, 8)
    assert n_hooks(lm) == 0


def test_no_top_tokens_no_change_of_them(lm):
    features = pd.DataFrame({"feature": [0], "top_token_ids": [[]]})
    table = direct_effects(site(lm), W_DEC, features, SteeringPlan(("a",), (1.0,)))
    assert math.isnan(table["delta_logprob"][0])
    assert table["kl"][0] > 0
