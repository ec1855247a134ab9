from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from saeffect.steering import RESPONSE_COLUMNS, SteeringPlan, best_dose, dose_response, run_trials, score_doses
from steering.tiny_model import D_MODEL, OneHotWords, site

KEYS = {"feature": 0, "prompt": 0}


def row(sample, condition, dose, similarity, distinct2, perplexity):
    return {
        **KEYS,
        "sample": sample,
        "condition": condition,
        "dose": dose,
        "similarity": similarity,
        "distinct2": distinct2,
        "perplexity": perplexity,
    }


def test_score_by_hand():
    trials = pd.DataFrame(
        [
            row(0, "unsteered", 0.0, 0.2, 0.8, 4.0),
            row(1, "unsteered", 0.0, 0.4, 1.0, 4.0),
            row(0, "steered", 0.3, 0.4, 1.0, 2.0),  # gain 0.2, both ratios above 1: fluency 1
            row(1, "steered", 0.3, 0.5, 0.25, 4.0),  # gain 0.1, fluency sqrt(0.25 * 1) = 0.5
            row(0, "steered", 0.9, 1.0, 0.2, 16.0),  # gain 0.8, fluency sqrt(0.25 * 0.25) = 0.25
            row(1, "steered", 0.9, math.nan, 0.5, 16.0),
            row(0, "random", 0.3, 0.1, 1.0, 4.0),  # a loss of 0.1
            row(1, "random", 0.3, 0.4, 0.5, 8.0),  # no gain
            row(0, "matched", 0.9, 0.5, 0.8, 16.0),  # gain 0.3, fluency sqrt(1 * 0.25)
        ]
    )
    table = score_doses(trials)
    assert table[["condition", "dose"]].to_numpy().tolist() == [
        ["steered", 0.3],
        ["steered", 0.9],
        ["random", 0.3],
        ["matched", 0.9],
    ]
    assert table["n"].tolist() == [2, 2, 2, 1]
    assert table["n_undefined"].tolist() == [0, 1, 0, 0]
    assert table["score"].tolist()[2:] == pytest.approx([-0.05, 0.15])
    table = table[table["condition"] == "steered"].set_index("dose")
    # The text without a similarity is no gain: the other's 0.8 is halved, not taken for both.
    assert table["similarity"].to_dict() == pytest.approx({0.3: 0.45, 0.9: 1.0})
    assert table["gain"].to_dict() == pytest.approx({0.3: 0.15, 0.9: 0.4})
    assert table["fluency"].to_dict() == pytest.approx({0.3: 0.75, 0.9: (0.25 + math.sqrt(0.5 * 0.25)) / 2})
    assert table["score"].to_dict() == pytest.approx({0.3: 0.125, 0.9: 0.1})
    assert best_dose(score_doses(trials)) == 0.3


def test_destroyed_text_does_not_make_a_loss_smaller():
    """As measured on a real model: 0.6 lost less similarity than 0.3 and 0.9, and broke its texts most of all."""
    trials = pd.DataFrame(
        [
            row(0, "unsteered", 0.0, 0.5, 1.0, 4.0),
            row(0, "steered", 0.3, 0.374, 0.018, 4.0 / 0.018),
            row(0, "steered", 0.6, 0.402, 0.004, 4.0 / 0.004),
            row(0, "steered", 0.9, 0.3, 1.0, 4.0),
        ]
    )
    table = score_doses(trials)
    assert table["score"].tolist() == pytest.approx([-0.126, -0.098, -0.2])  # the losses themselves, in their order
    assert best_dose(table) is None


def test_texts_that_broke_do_not_drop_out():
    """Nine of ten texts of the larger dose have no known word; the tenth alone looks better than the smaller dose."""
    rows = [row(i, "unsteered", 0.0, 0.2, 1.0, 4.0) for i in range(10)]
    rows += [row(i, "steered", 0.3, 0.4, 1.0, 4.0) for i in range(10)]
    rows += [row(i, "steered", 0.9, 0.9 if i == 0 else math.nan, 1.0, 4.0) for i in range(10)]
    table = score_doses(pd.DataFrame(rows)).set_index("dose")
    assert table["score"].to_dict() == pytest.approx({0.3: 0.2, 0.9: 0.07})
    assert table["n_undefined"].to_dict() == {0.3: 0, 0.9: 9}
    assert best_dose(table.reset_index()) == 0.3


def test_arms_count_alike_and_ties_take_the_smaller():
    one = pd.DataFrame({"condition": "steered", "dose": [0.2, 0.4, 0.8], "score": [0.1, 0.1, -0.3]})
    other = one.assign(score=[0.0, 0.0, 0.6])
    assert best_dose(one) == 0.2
    assert best_dose(pd.concat([one, other])) == 0.8
    assert best_dose(one.assign(score=math.nan)) is None
    assert best_dose(one.assign(condition="random")) is None


def test_response_by_feature_and_dose():
    one = [
        row(0, "unsteered", 0.0, 0.2, 1.0, 4.0),
        row(0, "steered", 0.3, 0.4, 1.0, 4.0),
        row(0, "steered", 0.9, 0.9, 0.25, 16.0),  # gain 0.7, fluency 0.25
        row(0, "steered", 1.8, 0.4, 1.0, 4.0),  # equals the first
    ]
    one.append(row(0, "random", 0.9, 1.0, 1.0, 4.0))  # gain 0.8, fluency 1: better than the feature ever is
    unknown = [{**r, "feature": 6, "similarity": math.nan} for r in one[:3]]
    direct = pd.DataFrame(
        {
            "feature": 0,
            "prompt": [0, 1, 0, 0],
            "condition": ["steered", "steered", "steered", "random"],
            "dose": [0.3, 0.3, 0.9, 0.9],
            "delta_logprob": [1.0, 2.0, 5.0, 77.0],
            "kl": [0.1, 0.3, 2.0, 77.0],
        }
    )
    table = dose_response(pd.DataFrame(one + unknown), direct)
    assert tuple(table.columns) == RESPONSE_COLUMNS
    assert table["feature"].tolist() == [0, 0, 0, 0, 6, 6]
    assert table["condition"].tolist() == ["steered"] * 3 + ["random"] + ["steered"] * 2
    assert table["dose"].tolist() == [0.3, 0.9, 1.8, 0.9, 0.3, 0.9]
    assert table["score"].tolist()[:4] == pytest.approx([0.2, 0.175, 0.2, 0.8])
    assert table["best"].tolist() == [True] + [False] * 5
    assert table["n"].tolist() == [1] * 6
    assert table["n_undefined"].tolist() == [0, 0, 0, 0, 1, 1]
    assert table["direct_effect"].tolist()[:2] == [1.5, 5.0]
    assert table["direct_effect"][3] == 77.0
    assert table["kl"].tolist()[:2] == pytest.approx([0.2, 2.0])
    assert math.isnan(table["direct_effect"][2])
    assert table.loc[4:, ["similarity", "gain", "fluency", "score", "direct_effect"]].isna().all(axis=None)


def test_nothing_steered_has_no_response():
    assert dose_response(pd.DataFrame([row(0, "unsteered", 0.0, 0.2, 1.0, 4.0)])).empty


@pytest.fixture
def planted(lm):
    """A feature whose direction is the unembedding of "w30"."""
    W_dec = lm.model.get_output_embeddings().weight[30:31].detach().float()
    return W_dec, pd.DataFrame({"feature": [0], "top_tokens": [["w30", "w31", "w32"]]})


def search(**change):
    settings = {"prompts": ("one two", "three"), "doses": (0.0, 1.0, 3.0), "samples": 2, "max_new_tokens": 10}
    return SteeringPlan(**{**settings, "frequency_penalty": 0.2, **change})


def searched(lm, W_dec, features, plan):
    trials = run_trials(site(lm, W_dec), features, plan, vectors=OneHotWords())
    return score_doses(trials)


def test_the_best_score_wins(lm, planted):
    table = searched(lm, *planted, search(placebos=()))
    assert table["dose"].tolist() == [0.0, 1.0, 3.0]
    assert table["n"].tolist() == [4, 4, 4]
    assert table.loc[0, "gain"] == 0
    assert table.loc[0, "fluency"] == pytest.approx(1)
    assert best_dose(table) == table.loc[table["score"].idxmax(), "dose"] > 0
    assert table["score"].max() > 0


def test_placebos_do_not_choose_the_dose(lm, planted):
    """The placebo of feature 0 is the planted feature, feature 0 itself says nothing."""
    W_dec = torch.cat([-planted[0], planted[0]])
    features = planted[1].assign(matched=[[1]])
    doses = (0.5, 1.0, 3.0)
    table = searched(lm, W_dec, features, search(placebos=("matched",), doses=doses))
    assert table["condition"].tolist() == ["steered"] * 3 + ["matched"] * 3
    assert table["dose"].tolist() == [0.5, 1.0, 3.0] * 2
    assert table["n"].tolist() == [4] * 6
    assert best_dose(table) is None  # though the placebo's scores are high
    assert table["score"].max() > 0
    # What the feature's rows say does not change for the placebo beside them.
    alone = searched(lm, W_dec, features, search(placebos=(), doses=doses))
    pd.testing.assert_frame_equal(alone, table[table["condition"] == "steered"], check_exact=False, rtol=1e-5)


def test_unknown_top_tokens_have_no_score(lm):
    features = pd.DataFrame({"feature": [0], "top_tokens": [["?"]]})
    table = searched(lm, torch.ones(1, D_MODEL), features, search(placebos=()))
    assert table[["similarity", "gain", "fluency", "score"]].isna().all(axis=None)
    assert table["n_undefined"].tolist() == table["n"].tolist() == [4, 4, 4]
    assert best_dose(table) is None
