from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.hooks import edited
from saeffect.sae.base import SaeConfig
from saeffect.sae.standard import StandardSae
from saeffect.steering import Intervention, NoiseCell, Sampling, generate
from saeffect.steering.generate import continue_prompts
from saeffect.steering.operators import AddVectors, SetFeatures
from saeffect.steering.prompt_pass import last_logits
from saeffect.steering.sampling import next_tokens, penalise
from steering.tiny_model import D_MODEL, D_VOCAB, END, HOOK, WordTokenizer, n_hooks, tiny_model

# The package has a function of that name.
module = importlib.import_module("saeffect.steering.generate")

PROMPT = [5, 9, 40, 12]
SAMPLING = Sampling(max_new_tokens=12, top_p=0.9, temperature=1.3)


def cells(n: int) -> list[NoiseCell]:
    return [NoiseCell(0, "p", i % 3) for i in range(n)]


def vectors(n: int, size: float = 3.0) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(4)) * size


def without_cache(lm, prompt, cell, sampling, change, positions):
    """The same, one row, every pass over the whole text again, positions counted by hand."""
    ids = list(prompt)
    for step in range(sampling.max_new_tokens):

        def edit(x, n=len(ids)):
            where = {
                "all": range(n),
                "prompt": range(len(prompt) - 1),
                "generated": range(len(prompt) - 1, n),
            }
            out = x.clone()
            out[:, list(where[positions])] = change(x[:, list(where[positions])])
            return out

        with torch.no_grad(), edited(lm, HOOK, edit):
            logits = lm.model(input_ids=torch.tensor([ids])).logits[:, -1]
        penalise(logits, torch.tensor([ids[len(prompt) :]], dtype=torch.int64), sampling.frequency_penalty)
        logits[:, [0, 1, END, D_VOCAB - 2, D_VOCAB - 1]] = -torch.inf
        ids.append(next_tokens(logits, [cell], step, sampling).item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_equals_generation_without_cache_or_batch(positions):
    lm = tiny_model(torch.float64)
    intervention = Intervention(AddVectors(vectors(4)), positions)
    got = generate(lm, HOOK, PROMPT, cells(4), SAMPLING, intervention=intervention)
    for row in range(4):
        vector = intervention.operator.vectors[row].double()
        assert got[row] == without_cache(lm, PROMPT, cells(4)[row], SAMPLING, lambda x, v=vector: x + v, positions)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("what", ["clamp", "ablate", "several"])
def test_setting_features_equals_generation_without_cache_or_batch(positions, what):
    """With x + (target - activation) · decoder row written out for each position."""
    lm = tiny_model(torch.float64)
    sae = StandardSae(SaeConfig("standard", D_MODEL, 12, apply_b_dec_to_input=False))
    for i, parameter in enumerate(sae.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    sae.requires_grad_(False)
    rows = {"clamp": {3: 9.0}, "ablate": {3: 0.0}, "several": {3: 0.0, 5: 9.0}}[what]
    features, targets = torch.tensor([list(rows)] * 4), torch.tensor([list(rows.values())] * 4)
    steer = Intervention(SetFeatures(sae, features, targets), positions)

    def change(x):
        acts = sae.encode(x)
        return x + sum((value - acts[..., [f]]).double() * sae.W_dec[f].double() for f, value in rows.items())

    got = generate(lm, HOOK, PROMPT, cells(4), SAMPLING, intervention=steer)
    assert got == [without_cache(lm, PROMPT, cell, SAMPLING, change, positions) for cell in cells(4)]
    assert got != generate(lm, HOOK, PROMPT, cells(4), SAMPLING)
    assert n_hooks(lm) == 0


def test_zero_vectors_equal_no_intervention_exactly(lm):
    plain = generate(lm, HOOK, PROMPT, cells(6), SAMPLING)
    zero = Intervention(AddVectors(torch.zeros(6, D_MODEL)))
    assert generate(lm, HOOK, PROMPT, cells(6), SAMPLING, intervention=zero) == plain
    assert plain[0] == plain[3]  # equal cells, equal luck
    assert plain[0] != plain[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_make_no_difference(dtype):
    lm = tiny_model(dtype)
    intervention = Intervention(AddVectors(vectors(7)))
    seen: list[tuple[int, int]] = []
    whole = generate(lm, HOOK, PROMPT, cells(7), SAMPLING, intervention=intervention)
    for batch_size in (1, 3):
        parts = generate(
            lm,
            HOOK,
            PROMPT,
            cells(7),
            SAMPLING,
            intervention=intervention,
            batch_size=batch_size,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert parts == whole
    # Every token counts, over all rows, so that a batch of hours is seen to go on.
    n = SAMPLING.max_new_tokens
    each_row = [(i, 7 * n) for i in range(1, 7 * n + 1)]
    threes = [(3 * n * batch + rows * i, 7 * n) for batch, rows in enumerate((3, 3, 1)) for i in range(1, n + 1)]
    assert seen == each_row + threes


def test_full_length_without_special_tokens(lm):
    outputs = generate(lm, HOOK, PROMPT, cells(3), Sampling(max_new_tokens=40, top_p=1.0, temperature=5.0))
    assert {len(ids) for ids in outputs} == {40}
    used = {i for ids in outputs for i in ids}
    assert min(used) > END
    assert max(used) < D_VOCAB - 2


def test_rows_stop_at_end_of_text():
    lm = tiny_model()
    sampling = Sampling(max_new_tokens=60, top_p=1.0, temperature=5.0, allow_end=True)
    many = [NoiseCell(0, "p", i) for i in range(20)]
    outputs = generate(lm, HOOK, PROMPT, many, sampling)
    assert not any(END in ids for ids in outputs)
    lengths = {len(ids) for ids in outputs}
    assert min(lengths) < 60  # 20 rows of 60 nearly uniform draws from 93 tokens
    longer = generate(lm, HOOK, PROMPT, many, Sampling(max_new_tokens=61, temperature=5.0, top_p=1.0, allow_end=True))
    stopped = [(a, b) for a, b in zip(outputs, longer, strict=True) if len(a) < 60]
    assert all(a == b for a, b in stopped)


def test_greedy_with_a_frequency_penalty_does_not_loop(lm):
    free = generate(lm, HOOK, PROMPT, cells(1), Sampling(max_new_tokens=30, temperature=0, frequency_penalty=0))[0]
    held = generate(lm, HOOK, PROMPT, cells(1), Sampling(max_new_tokens=30, temperature=0, frequency_penalty=1e6))[0]
    assert len(set(held)) == 30
    assert free[0] == held[0]


def test_no_hook_stays_also_after_an_exception(lm):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    intervention = Intervention(AddVectors(vectors(2)))
    with pytest.raises(KeyboardInterrupt):
        generate(lm, HOOK, PROMPT, cells(2), SAMPLING, intervention=intervention, progress=stop)
    assert n_hooks(lm) == 0
    broken = Intervention(AddVectors(torch.ones(2, D_MODEL + 1)))
    with pytest.raises(ShapeMismatch):
        generate(lm, HOOK, PROMPT, cells(2), SAMPLING, intervention=broken)
    assert n_hooks(lm) == 0


def test_last_logits_are_those_of_the_whole_pass(lm):
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.no_grad():
        logits, _ = last_logits(lm, ids)
        assert torch.allclose(logits, lm.model(input_ids=ids).logits[:, -1], atol=1e-5)


def test_bad_input(lm):
    with pytest.raises(ConfigError, match="no tokens"):
        generate(lm, HOOK, [], cells(1), SAMPLING)
    with pytest.raises(ShapeMismatch, match="2 rows to steer"):
        generate(lm, HOOK, PROMPT, cells(1), SAMPLING, intervention=Intervention(AddVectors(vectors(2))))
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        generate(lm, HOOK, PROMPT, cells(1), SAMPLING, batch_size=0)


# In no order of length; two share one, one is a single token.
PROMPTS = [[5, 9, 40, 12], [33], [7, 8, 9, 10, 11, 12, 13, 14, 15], [60, 61, 62, 63], [44, 45]]
CELLS_OF_EACH = [NoiseCell(0, "p", i % 3) for i in range(len(PROMPTS))]
SHORT = Sampling(max_new_tokens=5, temperature=0.0)
UNCUT = Sampling(max_new_tokens=30, top_p=1.0, frequency_penalty=0.0)
ALSO = Sampling(max_new_tokens=11, top_p=0.9, temperature=1.3, frequency_penalty=0.7)


def alone(lm, sampling=ALSO):
    return [
        generate(lm, HOOK, prompt, [cell], sampling)[0] for prompt, cell in zip(PROMPTS, CELLS_OF_EACH, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_equals_one_at_a_time(dtype, batch_size):
    lm = tiny_model(dtype)
    seen: list[tuple[int, int]] = []
    found = continue_prompts(
        lm, PROMPTS, CELLS_OF_EACH, ALSO, batch_size=batch_size, progress=lambda *n: seen.append(n)
    )
    assert found == alone(lm)
    # One report a pass: while the longest prompt of a batch is read, the shortest already generates.
    lengths = sorted(map(len, PROMPTS))
    batches = [lengths[i : i + batch_size] for i in range(0, 5, batch_size)]
    assert len(seen) == sum(batch[-1] - batch[0] + 11 for batch in batches)
    assert seen == sorted(seen)
    assert seen[-1] == (55, 55)


@pytest.mark.parametrize("sampling", [SHORT, UNCUT, Sampling(max_new_tokens=1)])
def test_whatever_the_sampling(lm, sampling):
    assert continue_prompts(lm, PROMPTS, CELLS_OF_EACH, sampling) == alone(lm, sampling)


def test_texts_that_end_early(lm):
    sampling = Sampling(max_new_tokens=60, temperature=5.0, top_p=1.0, allow_end=True)
    prompts, cells = PROMPTS * 3, [NoiseCell(0, "p", i) for i in range(15)]
    found = continue_prompts(lm, prompts, cells, sampling)
    assert found == [generate(lm, HOOK, ids, [cell], sampling)[0] for ids, cell in zip(prompts, cells, strict=True)]
    assert min(map(len, found)) < 60
    assert not any(END in ids for ids in found)


def test_bad_requests_and_none_at_all(lm):
    assert continue_prompts(lm, [], [], ALSO) == []
    with pytest.raises(ConfigError, match="no tokens"):
        continue_prompts(lm, [[1], []], CELLS_OF_EACH[:2], ALSO)


ROWS = [0, 1, 2, 3, 4, 0, 2, 3, 0]  # the prompt of each row, in no order


def steered_rows(positions="all", of=ROWS):
    cells = [NoiseCell(0, "p", i % 3) for i in range(len(of))]
    return [PROMPTS[i] for i in of], cells, Intervention(AddVectors(vectors(len(of))), positions)


def each_alone(lm, prompts, cells, steer, sampling=ALSO):
    return [
        generate(lm, HOOK, ids, [cell], sampling, intervention=steer.take([row]))[0]
        for row, (ids, cell) in enumerate(zip(prompts, cells, strict=True))
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
@pytest.mark.parametrize("positions", ["all", "generated", "prompt"])
def test_steered_prompts_in_one_batch_equal_one_row_at_a_time(positions, batch_size):
    lm = tiny_model(torch.float64)
    # Positions "prompt" leave out a prompt's last token, so a single token cannot be steered.
    prompts, cells, steer = steered_rows(positions, [i for i in ROWS if positions != "prompt" or i != 1])
    seen: list[tuple[int, int]] = []
    found = continue_prompts(
        lm,
        prompts,
        cells,
        ALSO,
        hook=HOOK,
        intervention=steer,
        batch_size=batch_size,
        progress=lambda *n: seen.append(n),
    )
    assert found == each_alone(lm, prompts, cells, steer)
    assert found != continue_prompts(lm, prompts, cells, ALSO)
    assert seen == sorted(seen)
    assert seen[-1] == (11 * len(prompts), 11 * len(prompts))
    assert n_hooks(lm) == 0


def test_features_set_in_several_prompts_equal_one_row_at_a_time():
    lm = tiny_model(torch.float64)
    sae = StandardSae(SaeConfig("standard", D_MODEL, 12, apply_b_dec_to_input=False))
    for i, parameter in enumerate(sae.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    sae.requires_grad_(False)
    prompts, cells, _ = steered_rows()
    features = torch.arange(len(prompts))[:, None]
    along = torch.randn(len(prompts), 1, D_MODEL, generator=torch.Generator().manual_seed(9))
    steer = Intervention(SetFeatures(sae, features, torch.full(features.shape, 9.0), along))
    found = continue_prompts(lm, prompts, cells, ALSO, hook=HOOK, intervention=steer)
    assert found == each_alone(lm, prompts, cells, steer)
    assert found != continue_prompts(lm, prompts, cells, ALSO)


@pytest.mark.parametrize(("prepend_bos", "n_batches"), [(None, 1), (True, 2)])
def test_a_bos_token_that_some_prompts_begin_with_is_left_alone(prepend_bos, n_batches, monkeypatch):
    lm = replace(tiny_model(torch.float64), prepend_bos=prepend_bos)
    monkeypatch.setattr(WordTokenizer, "bos_token_id", 1, raising=False)
    assert lm.bos_id == (1 if prepend_bos else None)
    prompts, cells, steer = steered_rows()
    prompts = [[1, *ids] if ids[0] == 5 else ids for ids in prompts]
    batches = watch_batches(monkeypatch)
    found = continue_prompts(lm, prompts, cells, ALSO, hook=HOOK, intervention=steer)
    assert len(batches) == n_batches
    assert found == each_alone(lm, prompts, cells, steer)
    assert (found == each_alone(replace(lm, prepend_bos=False), prompts, cells, steer)) == (not prepend_bos)


def watch_batches(monkeypatch):
    batches: list[list[list[int]]] = []
    continued = module._continue

    def watch(lm, prompts, *rest):
        batches.append(prompts)
        return continued(lm, prompts, *rest)

    monkeypatch.setattr(module, "_continue", watch)
    return batches


@pytest.mark.parametrize(
    ("positions", "batch_size", "expected"),
    [
        ("all", 64, [[1, 4, 0, 0, 0, 3, 3, 2, 2]]),
        ("all", 5, [[1, 4, 0, 0, 0], [3, 3, 2, 2]]),
        ("all", 4, [[1, 4], [0, 0, 0], [3, 3, 2, 2]]),
        ("all", 2, [[1, 4], [0, 0], [0], [3, 3], [2, 2]]),
        ("generated", 64, [[0, 0, 0], [2, 2], [1], [4], [3, 3]]),
    ],
)
def test_rows_of_a_prompt_share_a_batch(lm, positions, batch_size, expected, monkeypatch):
    prompts, cells, steer = steered_rows(positions)
    batches = watch_batches(monkeypatch)
    continue_prompts(lm, prompts, cells, ALSO, hook=HOOK, intervention=steer, batch_size=batch_size)
    assert [[PROMPTS.index(ids) for ids in batch] for batch in batches] == expected
