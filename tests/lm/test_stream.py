from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import saeffect.lm.activations as stream_module
from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm.activations import NormLimit, StreamedActivations, TokenRows, kept_positions
from saeffect.lm.hooks import capture, edited
from saeffect.lm.language_model import LanguageModel

HOOK = "blocks.1.hook_resid_pre"
GIVEN_OUT = int(0.99 * 4 * 11)  # tokens of a whole pool of four rows


@pytest.fixture
def rows() -> TokenRows:
    ids = np.random.default_rng(0).integers(1, 320, (14, 12)).astype(np.int32)
    return TokenRows(ids, np.zeros(14, dtype=np.int64), ("general",))


@pytest.fixture
def source(tiny_llama: LanguageModel, rows: TokenRows) -> StreamedActivations:
    return StreamedActivations.open(tiny_llama, HOOK, rows, pool_rows=4, rows_a_pass=3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward pass of a pool."""
    passes: list[int] = []
    real = stream_module.run_pass

    def run(lm: LanguageModel, hook: str, ids: NDArray[np.int32], limit: NormLimit) -> Any:
        passes.append(len(ids))
        return real(lm, hook, ids, limit)

    monkeypatch.setattr(stream_module, "run_pass", run)
    return passes


class Endless:
    """Rows without an end, counted."""

    context_size = 12
    n_rows = None

    def __init__(self) -> None:
        self.read = 0

    def identity(self) -> str:
        return "endless"

    def rows(self) -> Iterator[NDArray[np.int32]]:
        generator = np.random.default_rng(0)
        while True:
            self.read += 1
            yield generator.integers(1, 320, 12).astype(np.int32)


def test_the_values_are_the_models(source: StreamedActivations, tiny_llama: LanguageModel, rows: TokenRows) -> None:
    x = capture(tiny_llama, HOOK, torch.from_numpy(rows.ids.astype(np.int64)))
    expected = x[kept_positions(x, source.limit)]
    torch.testing.assert_close(source.sample(10_000), expected)
    pool = torch.cat(list(source.batches(GIVEN_OUT, seed=0, epoch=0)))[:GIVEN_OUT]
    nearest = (pool[:, None] - expected[: 4 * 11]).norm(dim=-1).min(1)
    assert nearest.values.max() < 1e-4, "the first pool is the first rows"
    assert len(set(nearest.indices.tolist())) == GIVEN_OUT
    assert nearest.indices.tolist() != sorted(nearest.indices.tolist()), "shuffled"


def test_only_the_pool_that_is_needed_is_run(source: StreamedActivations, seen: list[int]) -> None:
    next(source.batches(10, seed=0, epoch=0))
    assert seen == [3, 1]
    seen.clear()
    next(source.batches(10, seed=0, epoch=0, start=9))  # begins at token 90 of pools of 43: in the third
    assert seen == [3, 1]
    seen.clear()
    list(source.batches(10, seed=0, epoch=0, start=9))
    assert seen == [3, 1, 2], "the last pool is two rows"


def test_text_is_read_as_it_is_needed(tiny_llama: LanguageModel) -> None:
    text = Endless()
    source = StreamedActivations.open(tiny_llama, HOOK, text, pool_rows=4, rows_a_pass=2)
    assert text.read == 4
    text.read = 0
    assert source.n_batches(10) is None
    batches = source.batches(10, seed=0, epoch=0)
    next(batches)
    assert text.read == 4
    for _ in range(4):
        next(batches)
    assert text.read == 8


def test_a_pool_is_gone_before_the_next_is_made(source: StreamedActivations, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    before: list[int] = []
    real = stream_module.shuffled

    def made(activations: torch.Tensor, *seed: int) -> Any:
        before.append(len(alive))
        alive.add(activations)
        return real(activations, *seed)

    monkeypatch.setattr(stream_module, "shuffled", made)
    list(source.batches(GIVEN_OUT, seed=0, epoch=0))
    assert before == [0, 0, 0, 0]


def test_where_outliers_leave_too_few_some_are_given_twice(tiny_llama: LanguageModel, rows: TokenRows) -> None:
    def grow(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 6:8] *= 1000.0
        return x

    with edited(tiny_llama, HOOK, grow):
        source = StreamedActivations.open(tiny_llama, HOOK, rows, pool_rows=4, rows_a_pass=4)
        (pool, *_) = source.batches(GIVEN_OUT, seed=0, epoch=0)
        kept = len(source.sample(10_000)) / 14 * 4
    found, count = torch.unique(pool, dim=0, return_counts=True)
    assert len(found) == kept == 4 * 9
    assert sorted(count.tolist()) == [1] * (72 - GIVEN_OUT) + [2] * (GIVEN_OUT - 36)


def test_what_is_refused_at_the_start(
    tiny_llama: LanguageModel, rows: TokenRows, complains: Callable[..., Any]
) -> None:
    def start(rows: TokenRows = rows, hook: str = HOOK, **sizes: int) -> None:
        StreamedActivations.open(tiny_llama, hook, rows, **sizes)

    with complains(ConfigError, "needs block 9"):
        start(hook="blocks.9.hook_resid_pre")
    with complains(EmptySelection, "no rows"):
        start(rows.head(0))
    with complains(ConfigError, "129 tokens", at="context_size"):
        start(replace(rows, ids=np.ones((14, 129), dtype=np.int32)))
    with complains(ConfigError, "pool_rows is 0", at="pool_rows"):
        start(pool_rows=0)
    with complains(ConfigError, "at least 1"):
        start(rows_a_pass=0)


def test_activations_that_are_no_numbers(
    tiny_llama: LanguageModel, rows: TokenRows, complains: Callable[..., Any]
) -> None:
    def broken(rows_of_pass: int) -> Any:
        return edited(tiny_llama, HOOK, lambda x: x / 0 if len(x) == rows_of_pass else x)

    with broken(6), complains(ConfigError, "not finite", at=HOOK):
        StreamedActivations.open(tiny_llama, HOOK, rows, rows_a_pass=3)
    source = StreamedActivations.open(tiny_llama, HOOK, rows, pool_rows=4, rows_a_pass=3)
    with broken(1), complains(ConfigError, "not finite", at=HOOK):
        next(source.batches(10, seed=0, epoch=0))


def test_nothing_but_outliers(source: StreamedActivations, complains: Callable[..., Any]) -> None:
    with complains(EmptySelection, "every residual", at=HOOK):
        next(replace(source, limit=NormLimit(1.0, 1e-9)).batches(10, seed=0, epoch=0))


def test_identity_holds_the_size_of_a_pool(source: StreamedActivations) -> None:
    assert replace(source, pool_rows=5).identity() != source.identity()
    assert replace(source, rows_a_pass=5).identity() == source.identity()
