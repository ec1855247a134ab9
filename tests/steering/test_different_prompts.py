"""Rows of different prompts give what each gives alone."""

from __future__ import annotations

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.steering import NoiseCell, Sampling, continue_prompts, generate
from steering.tiny_model import END, HOOK, tiny_model

# In no order of length; two share one, one is a single token.
PROMPTS = [[5, 9, 40, 12], [33], [7, 8, 9, 10, 11, 12, 13, 14, 15], [60, 61, 62, 63], [44, 45]]
CELLS = [NoiseCell(0, "p", i % 3) for i in range(len(PROMPTS))]
SAMPLING = Sampling(max_new_tokens=11, top_p=0.9, temperature=1.3, frequency_penalty=0.7)


def alone(lm, sampling=SAMPLING, hook=HOOK):
    return [generate(lm, hook, prompt, [cell], sampling)[0] for prompt, cell in zip(PROMPTS, CELLS, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_equals_one_at_a_time(dtype, batch_size):
    lm = tiny_model(dtype)
    seen: list[tuple[int, int]] = []
    found = continue_prompts(lm, PROMPTS, CELLS, SAMPLING, batch_size=batch_size, progress=lambda *n: seen.append(n))
    assert found == alone(lm)
    assert seen[-1] == (5, 5)
    assert len(seen) == -(-5 // batch_size)


@pytest.mark.parametrize("sampling", [Sampling(5, temperature=0.0), Sampling(30, 1.0, 1.0, 0.0), Sampling(1)])
def test_whatever_the_sampling(lm, sampling):
    assert continue_prompts(lm, PROMPTS, CELLS, sampling) == alone(lm, sampling)


def test_texts_that_end_early(lm):
    sampling = Sampling(60, 5.0, 1.0, 1.0, allow_end=True)
    prompts, cells = PROMPTS * 8, [NoiseCell(0, "p", i) for i in range(40)]
    found = continue_prompts(lm, prompts, cells, sampling)
    assert found == [generate(lm, HOOK, ids, [cell], sampling)[0] for ids, cell in zip(prompts, cells, strict=True)]
    assert min(map(len, found)) < 60
    assert not any(END in ids for ids in found)


def test_bad_requests_and_none_at_all(lm):
    assert continue_prompts(lm, [], [], SAMPLING) == []
    with pytest.raises(ShapeMismatch, match="5 prompts, but 4"):
        continue_prompts(lm, PROMPTS, CELLS[:4], SAMPLING)
    with pytest.raises(ConfigError, match="no tokens"):
        continue_prompts(lm, [[1], []], CELLS[:2], SAMPLING)
    with pytest.raises(ConfigError, match="batch_size"):
        continue_prompts(lm, PROMPTS, CELLS, SAMPLING, batch_size=0)
