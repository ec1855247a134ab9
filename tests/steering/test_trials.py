from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from saeffect.errors import ShapeMismatch
from saeffect.steering import (
    TRIAL_COLUMNS,
    AddVectors,
    Intervention,
    NoiseCell,
    SteeringPlan,
    distinct_2,
    effects,
    generate,
    random_direction,
    run_trials,
    similarity,
)
from steering.tiny_model import D_MODEL, D_VOCAB, END, HOOK, OneHotWords, n_hooks, site, tiny_model

W_DEC = torch.randn(12, D_MODEL, generator=torch.Generator().manual_seed(6)) * 2
FEATURES = pd.DataFrame(
    {"feature": [7, 2, 5, 0, 11], "top_tokens": [[f"w{3 + 9 * i + j}" for j in range(9)] for i in range(5)]}
)
# Eight steered rows a feature beside two unsteered ones, so two features fill a batch: chunks (0, 2), (5, 7), (11).
PLAN = SteeringPlan(("one two", "three"), (0.5, 1.0), samples=2, max_new_tokens=6, top_p=0.9, batch_size=18, seed=3)


def run(lm, plan=PLAN, features=FEATURES, **kwargs):
    return run_trials(site(lm), W_DEC, features, plan, vectors=OneHotWords(), **kwargs)


@pytest.fixture(scope="module")
def trials(lm):
    return run(lm)


def test_one_row_per_feature_prompt_sample_condition_and_dose(trials):
    assert tuple(trials.columns) == TRIAL_COLUMNS
    keys = ["feature", "prompt", "sample", "condition", "dose"]
    assert not trials.duplicated(keys).any()
    assert len(trials) == 5 * 2 * 2 * (1 + 2 * 2)
    assert trials["feature"].dtype == np.int64
    assert trials["feature"].is_monotonic_increasing
    first = trials.iloc[:5]
    assert first["condition"].tolist() == ["unsteered", "steered", "steered", "random", "random"]
    assert first["dose"].tolist() == [0, 0.5, 1, 0.5, 1]


def test_rows_are_what_generate_gives(lm, trials):
    for row in trials[trials["feature"].isin([5, 11]) & (trials["sample"] == 1)].itertuples():
        unit = W_DEC[row.feature] / W_DEC[row.feature].norm()
        if row.condition == "random":
            unit = random_direction(D_MODEL, seed=3, feature=row.feature, draw=(row.prompt, 1))
        text = PLAN.prompts[row.prompt]
        ids = generate(
            lm,
            HOOK,
            lm.encode(text),
            [NoiseCell(3, text, 1)],
            PLAN.sampling,
            intervention=Intervention(AddVectors(row.dose * 4.0 * unit[None])),
        )[0]
        assert row.text == lm.decode(ids)
        assert row.distinct2 == distinct_2(ids)
        assert row.coefficient == pytest.approx(row.dose * 4.0 / W_DEC[row.feature].norm().item())
        reference = " ".join(FEATURES.set_index("feature")["top_tokens"][row.feature])
        assert row.similarity == similarity(row.text, reference, OneHotWords()).value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_dose_gives_the_unsteered_text(dtype):
    trials = run(tiny_model(dtype), dataclasses.replace(PLAN, doses=(0.0,)))
    texts = trials.pivot(index=["feature", "prompt", "sample"], columns="condition", values="text")
    assert (texts["steered"] == texts["unsteered"]).all()
    assert (texts["random"] == texts["unsteered"]).all()


def test_unsteered_texts_ride_in_the_batch_of_the_steered_ones(lm, monkeypatch):
    """So that rounding, which depends on the batch, is the same on both sides of a difference."""
    from saeffect.steering import trials as module

    batches = []

    def watched(lm, hook, prompt_ids, cells, sampling, *, intervention, batch_size, progress):
        rows = intervention.operator.vectors
        batches.append((len(cells), int((rows == 0).all(dim=1).sum())))
        assert len(cells) <= batch_size
        return generate(lm, hook, prompt_ids, cells, sampling, intervention=intervention, batch_size=batch_size)

    monkeypatch.setattr(module, "generate", watched)
    run(lm)
    assert batches == [(18, 2)] * 4 + [(10, 2)] * 2  # three chunks on two prompts, two unsteered samples in each


def test_texts_do_not_depend_on_the_other_features_or_their_order(lm, trials):
    alone = run(lm, features=FEATURES[FEATURES["feature"] == 5])
    assert_frame_equal(alone, trials[trials["feature"] == 5].reset_index(drop=True))
    assert_frame_equal(run(lm, features=FEATURES[::-1]), trials)


@pytest.mark.parametrize("n_kept", [0, 1, 2, 3])
def test_a_resumed_run_ends_with_the_same_table(lm, trials, n_kept):
    chunks: list[pd.DataFrame] = []
    run(lm, on_chunk=chunks.append)
    assert [sorted(set(c["feature"])) for c in chunks] == [[0, 2], [5, 7], [11]]
    assert_frame_equal(pd.concat(chunks, ignore_index=True), trials)
    again: list[pd.DataFrame] = []
    seen: list[tuple[int, int]] = []
    # Later chunks first: what is finished need not be a prefix.
    done = pd.concat([*chunks[::-1][:n_kept], trials[:0]], ignore_index=True)
    resumed = run(lm, done=done, on_chunk=again.append, progress=lambda *n: seen.append(n))
    assert_frame_equal(resumed, trials)
    assert len(again) == 3 - n_kept
    assert [done for done in seen if done in {(40, 100), (80, 100)}]
    assert seen == sorted(seen)
    assert seen[-1] == (100, 100)
    assert (len(seen) == 3) == (n_kept == 3)  # what is made tells more than that it is there


def test_a_half_written_chunk_is_done_again(lm, trials):
    again: list[pd.DataFrame] = []
    done = trials[trials["feature"] != 5].drop(index=0)  # 5 is missing whole, 0 by one row
    assert_frame_equal(run(lm, done=done, on_chunk=again.append), trials)
    assert [sorted(set(c["feature"])) for c in again] == [[0, 2], [5, 7]]


def test_rows_of_another_plan_are_not_taken(lm, trials):
    other = dataclasses.replace(PLAN, doses=(0.5,))
    again: list[pd.DataFrame] = []
    run(lm, other, done=trials, on_chunk=again.append)
    assert sum(c["feature"].nunique() for c in again) == 5


def test_without_placebos_and_with_perplexity(lm):
    trials = run(lm, dataclasses.replace(PLAN, placebos=(), perplexity=True), FEATURES[:2])
    assert set(trials["condition"]) == {"unsteered", "steered"}
    assert trials.columns[-1] == "perplexity"
    assert (trials["perplexity"] > 1).all()
    assert trials[trials["condition"] == "unsteered"].groupby(["prompt", "sample"])["perplexity"].nunique().max() == 1


def test_unknown_top_tokens_give_nan(lm):
    features = pd.DataFrame({"feature": [1], "top_tokens": [["?", "\u202e<script>"]]})
    assert run(lm, features=features)["similarity"].isna().all()


def test_texts_that_end_at_once_are_empty_and_without_numbers():
    lm = tiny_model()
    weight = torch.zeros(D_VOCAB)
    weight[END] = 1e3
    lm.model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + weight)
    plan = dataclasses.replace(PLAN, allow_end=True, perplexity=True, doses=(1.0,))
    trials = run(lm, plan, FEATURES[:2])
    assert (trials["text"] == "").all()
    assert trials[["similarity", "distinct2", "perplexity"]].isna().all(axis=None)
    table = effects(trials)
    assert table[["effect", "p", "q"]].isna().all(axis=None)
    assert (table["reason"] != "").all()
    assert not table["passed"].any()


def test_hooks_are_gone_and_bad_done_is_refused(lm, trials):
    assert n_hooks(lm) == 0
    with pytest.raises(ShapeMismatch, match="text"):
        run(lm, done=trials.drop(columns="text"))


def test_matched_placebos_come_from_the_feature_table(lm):
    plan = dataclasses.replace(PLAN, placebos=("random", "matched"), doses=(0.5,))
    with pytest.raises(ShapeMismatch, match="matched"):
        run(lm, plan)
    features = FEATURES[FEATURES["feature"] < 11]
    trials = run(lm, plan, features.assign(matched=[[int(f) + 1] for f in features["feature"]]))
    assert set(trials["condition"]) == {"unsteered", "steered", "random", "matched"}
    # The placebo of a feature is that feature's neighbour, steered.
    neighbours = features.assign(feature=features["feature"] + 1)
    twins = run(lm, dataclasses.replace(plan, placebos=()), neighbours)
    texts = trials[trials["condition"] == "matched"]["text"].tolist()
    assert texts == twins[twins["condition"] == "steered"]["text"].tolist()
