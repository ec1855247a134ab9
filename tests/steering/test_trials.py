"""Texts and direct effects of every feature, prompt, sample, condition and dose."""

from __future__ import annotations

import importlib
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from saeffect.errors import ShapeMismatch
from saeffect.lm.hooks import edited
from saeffect.steering import Intervention, NoiseCell, SteeringPlan, direct_effects, effects, generate, run_trials
from saeffect.steering.operators import AddVectors
from saeffect.steering.outcomes import distinct_2, similarity
from saeffect.steering.placebos import random_direction
from saeffect.steering.trials import TRIAL_COLUMNS, features_of_process
from steering.tiny_model import D_MODEL, D_VOCAB, END, HOOK, OneHotWords, changed, n_hooks, site, tiny_model

module = importlib.import_module("saeffect.steering.generate")
W_DEC = torch.randn(12, D_MODEL, generator=torch.Generator().manual_seed(6)) * 2
FEATURES = pd.DataFrame(
    {"feature": [7, 2, 5, 0, 11], "top_tokens": [[f"w{3 + 9 * i + j}" for j in range(9)] for i in range(5)]}
)
# Eight steered rows a feature beside two unsteered ones, so two features fill a batch: chunks (0, 2), (5, 7), (11).
PLAN = SteeringPlan(
    prompts=("one two", "three"), doses=(0.5, 1.0), samples=2, max_new_tokens=6, top_p=0.9, batch_size=18, seed=3
)


def run(lm, plan=PLAN, features=FEATURES, **kwargs):
    return run_trials(site(lm, W_DEC), features, plan, vectors=OneHotWords(), **kwargs)


@pytest.fixture(scope="module")
def trials(lm):
    return run(lm)


def test_rows_of_the_table(trials):
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
            PLAN,
            intervention=Intervention(AddVectors(row.dose * 4.0 * unit[None])),
        )[0]
        assert row.text == lm.decode(ids)
        assert row.distinct2 == distinct_2(ids)
        assert row.coefficient == pytest.approx(row.dose * 4.0 / W_DEC[row.feature].norm().item())
        reference = " ".join(FEATURES.set_index("feature")["top_tokens"][row.feature])
        assert row.similarity == similarity(row.text, reference, OneHotWords())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_dose_gives_the_unsteered_text(dtype):
    trials = run(tiny_model(dtype), changed(PLAN, doses=(0.0,)))
    texts = trials.pivot(index=["feature", "prompt", "sample"], columns="condition", values="text")
    assert (texts["steered"] == texts["unsteered"]).all()
    assert (texts["random"] == texts["unsteered"]).all()


def test_unsteered_texts_share_the_steered_batch(lm, monkeypatch):
    """So that rounding, which depends on the batch, is the same on both sides of a difference."""
    batches = []
    continued = module._continue

    def watched(lm, prompts, cells, sampling, start, edit, report):
        assert len(prompts) <= PLAN.batch_size
        is_unsteered = (edit.operator.vectors == 0).all(dim=1).tolist()
        rows = zip(map(tuple, prompts), is_unsteered, strict=True)
        batches.append(sorted(Counter(rows).items()))
        return continued(lm, prompts, cells, sampling, start, edit, report)

    monkeypatch.setattr(module, "_continue", watched)
    one, two = (tuple(lm.encode(text)) for text in reversed(PLAN.prompts))
    both = lambda n: [((ids, unsteered), 2 if unsteered else n) for ids in (two, one) for unsteered in (False, True)]  # noqa: E731
    run(lm)
    # Three chunks, two unsteered samples a prompt. Here each prompt fills a batch ...
    assert batches == [sorted(both(16)[i : i + 2]) for i in (2, 0)] * 2 + [sorted(both(8)[i : i + 2]) for i in (2, 0)]
    batches.clear()
    run(lm, changed(PLAN, doses=(0.5,)), FEATURES[:1])
    assert batches == [sorted(both(4))]  # ... and here both fit into one
    batches.clear()
    run(lm, changed(PLAN, doses=(0.5,), positions="generated"), FEATURES[:1])
    assert batches == [sorted(both(4)[i : i + 2]) for i in (0, 2)]


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_prompts_of_one_batch_give_the_texts_of_each_alone(positions):
    lm = tiny_model(torch.float64)
    prompts = ("one two", "three", "four five six seven", "eight nine")
    plan = changed(PLAN, prompts=prompts, doses=(1.0,), batch_size=64, positions=positions)
    keys = ["feature", "prompt", "sample", "condition"]
    together = run(lm, plan, FEATURES[:2])
    small = run(lm, changed(plan, batch_size=5), FEATURES[:2])  # one prompt a batch
    assert_frame_equal(together, small)
    assert together["text"].nunique() > len(together) // 2
    for number, prompt in enumerate(prompts):
        one = run(lm, changed(plan, prompts=(prompt,), placebos=()), FEATURES[:2]).assign(prompt=number)
        own = together[(together["prompt"] == number) & (together["condition"] != "random")].reset_index(drop=True)
        assert_frame_equal(one, own)
        assert not own.duplicated(keys).any()


def test_progress_also_goes_on_while_texts_are_measured(lm):
    seen: list[int] = []
    run(lm, changed(PLAN, batch_size=64), progress=lambda done, _: seen.append(done))
    assert seen == sorted(seen)
    assert max(np.diff(seen)) <= 26  # of 100 texts: two prompts are measured, and nothing is a longer step than one


def test_texts_do_not_depend_on_other_features(lm, trials):
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
    other = changed(PLAN, doses=(0.5,))
    again: list[pd.DataFrame] = []
    run(lm, other, done=trials, on_chunk=again.append)
    assert sum(c["feature"].nunique() for c in again) == 5


def test_without_placebos_and_with_perplexity(lm):
    trials = run(lm, changed(PLAN, placebos=()), FEATURES[:2])
    assert set(trials["condition"]) == {"unsteered", "steered"}
    assert trials.columns[-1] == "perplexity"
    assert (trials["perplexity"] > 1).all()
    assert trials[trials["condition"] == "unsteered"].groupby(["prompt", "sample"])["perplexity"].nunique().max() == 1


def test_unknown_top_tokens_give_nan(lm):
    features = pd.DataFrame({"feature": [1], "top_tokens": [["?", "\u202e<script>"]]})
    assert run(lm, features=features)["similarity"].isna().all()


def test_empty_texts_have_no_numbers():
    lm = tiny_model()
    weight = torch.zeros(D_VOCAB)
    weight[END] = 1e3
    lm.model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + weight)
    plan = changed(PLAN, allow_end=True, doses=(1.0,))
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
    plan = changed(PLAN, placebos=("random", "matched"), doses=(0.5,))
    with pytest.raises(ShapeMismatch, match="matched"):
        run(lm, plan)
    features = FEATURES[FEATURES["feature"] < 11]
    trials = run(lm, plan, features.assign(matched=[[int(f) + 1] for f in features["feature"]]))
    assert set(trials["condition"]) == {"unsteered", "steered", "random", "matched"}
    # The placebo of a feature is that feature's neighbour, steered.
    neighbours = features.assign(feature=features["feature"] + 1)
    twins = run(lm, changed(plan, placebos=()), neighbours)
    texts = trials[trials["condition"] == "matched"]["text"].tolist()
    assert texts == twins[twins["condition"] == "steered"]["text"].tolist()


def test_a_process_that_is_alone(lm, trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    chunks: list[pd.DataFrame] = []
    table = run_trials(site(lm, W_DEC), FEATURES, PLAN, vectors=OneHotWords(), on_chunk=chunks.append)
    assert_frame_equal(table, trials, check_exact=True)
    assert len(chunks) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n_features", [1, 2, 5, 12])
def test_processes_share_whole_chunks(n_features: int, world: int) -> None:
    shares = [features_of_process(n_features, PLAN, rank, world) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(n_features))
    for share in shares:
        chunks = [share[i : i + 2] for i in range(0, len(share), 2)]
        assert all(chunk[0] % 2 == 0 and chunk == list(range(chunk[0], chunk[0] + len(chunk))) for chunk in chunks)


ROWS = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(5)) * 2
TOKENS = pd.DataFrame({"feature": [4, 1], "top_token_ids": [[10, 11, 12], np.array([20])]})
DIRECT = SteeringPlan(prompts=("one two three", "four five"), doses=(0.5, -1.0), batch_size=4, seed=9)


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
    plan = changed(DIRECT, positions=positions)
    table = direct_effects(site(lm, ROWS), TOKENS, plan)
    assert len(table) == 2 * 2 * 2 * 2
    top = {4: [10, 11, 12], 1: [20]}
    for row in table.itertuples():
        unit = ROWS[row.feature] / ROWS[row.feature].norm()
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
    table = direct_effects(site(lm, ROWS), TOKENS, plan, progress=lambda *n: seen.append(n))
    assert table.columns.tolist() == ["feature", "prompt", "condition", "dose", "delta_logprob", "kl"]
    assert table["feature"].tolist() == [1] * 4 + [4] * 4
    assert table["prompt"].tolist() == [0, 0, 1, 1] * 2
    assert table["condition"].tolist() == ["steered", "random"] * 4
    assert (table[["delta_logprob", "kl"]] == 0).all(axis=None)
    assert seen[-1] == (8, 8)
    assert n_hooks(lm) == 0


def test_no_top_tokens_no_change_of_them(lm):
    features = pd.DataFrame({"feature": [0], "top_token_ids": [[]]})
    table = direct_effects(site(lm, ROWS), features, SteeringPlan(prompts=("a",), doses=(1.0,)))
    assert math.isnan(table["delta_logprob"][0])
    assert table["kl"][0] > 0
