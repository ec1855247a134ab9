"""Streams give the texts of `generate`, whatever runs between their steps."""

from __future__ import annotations

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.steering import Intervention, NoiseCell, Sampling, generate, stream
from saeffect.steering.operators import AddVectors
from steering.tiny_model import D_MODEL, END, HOOK, n_hooks, tiny_model

PROMPT = [5, 9, 40, 12]
SAMPLING = Sampling(max_new_tokens=10, top_p=0.9, temperature=1.3)


def cells(n: int) -> list[NoiseCell]:
    return [NoiseCell(0, "p", i) for i in range(n)]


def push(n: int, positions: str = "all") -> Intervention:
    vectors = torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(4)) * 3
    return Intervention(AddVectors(vectors), positions)  # type: ignore[arg-type]


def texts(steps: list[list[int | None]]) -> list[list[int]]:
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_two_streams_in_turn_are_what_each_is_alone(positions: str) -> None:
    lm = tiny_model(torch.float64)
    pushed = push(2, positions)
    first = stream(lm, HOOK, PROMPT, cells(2), SAMPLING, intervention=pushed)
    second = stream(lm, HOOK, PROMPT[::-1], cells(3), SAMPLING)
    seen: tuple[list, list] = ([], [])
    for _ in range(SAMPLING.max_new_tokens):
        for steps, found in zip((first, second), seen, strict=True):
            found.append(next(steps))
            assert n_hooks(lm) == 0
    assert next(first, None) is None and next(second, None) is None
    assert texts(seen[0]) == generate(lm, HOOK, PROMPT, cells(2), SAMPLING, intervention=pushed)
    assert texts(seen[1]) == generate(lm, HOOK, PROMPT[::-1], cells(3), SAMPLING)


def test_a_row_is_none_after_its_end() -> None:
    lm = tiny_model(torch.float64)
    sampling = Sampling(max_new_tokens=60, top_p=1.0, temperature=3.0, allow_end=True)
    steps = list(stream(lm, HOOK, PROMPT, cells(4), sampling))
    whole = generate(lm, HOOK, PROMPT, cells(4), sampling)
    assert texts(steps) == whole
    assert any(len(ids) < 60 for ids in whole) and all(END not in ids for ids in whole)


def test_a_closed_stream_leaves_the_model_as_it_was() -> None:
    lm = tiny_model(torch.float64)
    steps = stream(lm, HOOK, PROMPT, cells(2), SAMPLING, intervention=push(2))
    next(steps)
    steps.close()
    assert n_hooks(lm) == 0


def test_wrong_arguments_are_refused() -> None:
    lm = tiny_model(torch.float64)
    with pytest.raises(ShapeMismatch, match="3 rows to steer, but 2 noise cells"):
        next(stream(lm, HOOK, PROMPT, cells(2), SAMPLING, intervention=push(3)))
    with pytest.raises(ConfigError, match="no tokens"):
        next(stream(lm, HOOK, [], cells(2), SAMPLING))
