"""What holds for every source of activations: shards on disk, and a model that runs meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm import activations
from saeffect.lm.activations import ActivationSource, NormLimit, StreamedActivations, TokenRows, kept_positions
from saeffect.lm.harvest import harvest
from saeffect.lm.hooks import capture, edited
from saeffect.lm.language_model import LanguageModel

HOOK = "blocks.1.hook_resid_pre"


def _rows(seed: int = 0) -> TokenRows:
    ids = np.random.default_rng(seed).integers(1, 320, (13, 12)).astype(np.int32)
    return TokenRows(ids, np.zeros(13, dtype=np.int64), ("general",))


@pytest.fixture(params=["shards", "stream"])
def make(request: pytest.FixtureRequest, tiny_llama: LanguageModel, tmp_path: Path) -> Callable[..., ActivationSource]:
    def build(rows: TokenRows, hook: str = HOOK) -> ActivationSource:
        if request.param == "stream":
            return StreamedActivations.open(tiny_llama, hook, rows, pool_rows=4, rows_a_pass=3)
        out = tmp_path / (rows.identity()[:8] + hook)
        return harvest(tiny_llama, hook, rows, out, rows_per_shard=2, batch_size=3)

    return build


@pytest.fixture
def source(make: Callable[..., ActivationSource]) -> ActivationSource:
    return make(_rows())


def _batches(source: ActivationSource, size: int = 10, **options: Any) -> list[torch.Tensor]:
    return list(source.batches(size, **{"seed": 0, "epoch": 0} | options))


def test_it_is_one(source: ActivationSource) -> None:
    assert isinstance(source, ActivationSource)
    assert source.d_in == 32
    assert source.mean_norm == pytest.approx(float(source.sample(20_000).norm(dim=1).mean()))


def test_batches(source: ActivationSource) -> None:
    found = _batches(source)
    assert len(found) == source.n_batches(10) > 10
    for x in found:
        assert x.shape == (10, 32)
        assert x.dtype == torch.float32
        assert not x.is_inference(), "autograd cannot save inference tensors"
    everything = {tuple(row) for row in source.sample(10_000).tolist()}
    given = [tuple(row) for x in found for row in x.tolist()]
    assert set(given) <= everything
    assert len(set(given)) == len(given), "each token once"
    assert len(given) > 0.9 * len(everything)


def test_sample_begins_with_the_text(source: ActivationSource) -> None:
    assert torch.equal(source.sample(17), source.sample(100)[:17])
    assert source.sample(0).shape == (0, 32)


@pytest.mark.parametrize("size", [1, 7, 10, 60])
def test_any_batch_can_be_the_first(source: ActivationSource, size: int) -> None:
    whole = _batches(source, size, epoch=1)
    for start in range(len(whole) + 2):
        rest = _batches(source, size, epoch=1, start=start)
        assert len(rest) == max(0, len(whole) - start)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_order_depends_on_seed_and_epoch(source: ActivationSource) -> None:
    orders = {str(torch.stack(_batches(source, seed=s, epoch=e)).tolist()) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4
    assert str(torch.stack(_batches(source, seed=1, epoch=1)).tolist()) in orders


def test_a_batch_larger_than_everything(source: ActivationSource) -> None:
    assert source.n_batches(1000) == 0
    assert _batches(source, 1000) == []


def test_iteration_can_stop_early(source: ActivationSource) -> None:
    batches = source.batches(10, seed=0, epoch=0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(_batches(source)) > 1


def test_identity(make: Callable[..., ActivationSource]) -> None:
    assert make(_rows()).identity() == make(_rows()).identity()
    others = [make(_rows()), make(_rows(1)), make(_rows(), "blocks.2.hook_resid_pre")]
    assert len({source.identity() for source in others}) == 3


GIVEN_OUT = int(0.99 * 4 * 11)  # tokens of a whole pool of four rows


@pytest.fixture
def rows() -> TokenRows:
    ids = np.random.default_rng(0).integers(1, 320, (14, 12)).astype(np.int32)
    return TokenRows(ids, np.zeros(14, dtype=np.int64), ("general",))


@pytest.fixture
def stream(tiny_llama: LanguageModel, rows: TokenRows) -> StreamedActivations:
    return StreamedActivations.open(tiny_llama, HOOK, rows, pool_rows=4, rows_a_pass=3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward pass of a pool."""
    passes: list[int] = []
    real = activations.run_pass

    def run(lm: LanguageModel, hook: str, ids: NDArray[np.int32], limit: NormLimit) -> Any:
        passes.append(len(ids))
        return real(lm, hook, ids, limit)

    monkeypatch.setattr(activations, "run_pass", run)
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


def test_the_values_are_the_models(stream: StreamedActivations, tiny_llama: LanguageModel, rows: TokenRows) -> None:
    x = capture(tiny_llama, HOOK, torch.from_numpy(rows.ids.astype(np.int64)))
    expected = x[kept_positions(x, stream.limit)]
    torch.testing.assert_close(stream.sample(10_000), expected)
    pool = torch.cat(list(stream.batches(GIVEN_OUT, seed=0, epoch=0)))[:GIVEN_OUT]
    nearest = (pool[:, None] - expected[: 4 * 11]).norm(dim=-1).min(1)
    assert nearest.values.max() < 1e-4, "the first pool is the first rows"
    assert len(set(nearest.indices.tolist())) == GIVEN_OUT
    assert nearest.indices.tolist() != sorted(nearest.indices.tolist()), "shuffled"


def test_only_the_needed_pool_is_run(stream: StreamedActivations, seen: list[int]) -> None:
    next(stream.batches(10, seed=0, epoch=0))
    assert seen == [3, 1]
    seen.clear()
    next(stream.batches(10, seed=0, epoch=0, start=9))  # begins at token 90 of pools of 43: in the third
    assert seen == [3, 1]
    seen.clear()
    list(stream.batches(10, seed=0, epoch=0, start=9))
    assert seen == [3, 1, 2], "the last pool is two rows"


def test_text_is_read_as_it_is_needed(tiny_llama: LanguageModel) -> None:
    text = Endless()
    stream = StreamedActivations.open(tiny_llama, HOOK, text, pool_rows=4, rows_a_pass=2)
    assert text.read == 4
    text.read = 0
    assert stream.n_batches(10) is None
    batches = stream.batches(10, seed=0, epoch=0)
    next(batches)
    assert text.read == 4
    for _ in range(4):
        next(batches)
    assert text.read == 8


def test_one_pool_in_memory_at_a_time(stream: StreamedActivations, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    before: list[int] = []
    real = activations.shuffled

    def made(activations: torch.Tensor, *seed: int) -> Any:
        before.append(len(alive))
        alive.add(activations)
        return real(activations, *seed)

    monkeypatch.setattr(activations, "shuffled", made)
    list(stream.batches(GIVEN_OUT, seed=0, epoch=0))
    assert before == [0, 0, 0, 0]


def test_outliers_are_replaced_by_repeated_tokens(tiny_llama: LanguageModel, rows: TokenRows) -> None:
    def grow(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 6:8] *= 1000.0
        return x

    with edited(tiny_llama, HOOK, grow):
        stream = StreamedActivations.open(tiny_llama, HOOK, rows, pool_rows=4, rows_a_pass=4)
        (pool, *_) = stream.batches(GIVEN_OUT, seed=0, epoch=0)
        kept = len(stream.sample(10_000)) / 14 * 4
    found, count = torch.unique(pool, dim=0, return_counts=True)
    assert len(found) == kept == 4 * 9
    assert sorted(count.tolist()) == [1] * (72 - GIVEN_OUT) + [2] * (GIVEN_OUT - 36)


def test_what_is_refused_at_the_start(
    tiny_llama: LanguageModel, rows: TokenRows, complains: Callable[..., Any]
) -> None:
    def start(rows: TokenRows = rows, hook: str = HOOK) -> None:
        StreamedActivations.open(tiny_llama, hook, rows)

    with complains(ConfigError, "needs block 9"):
        start(hook="blocks.9.hook_resid_pre")
    with complains(EmptySelection, "no rows"):
        start(rows.head(0))
    with complains(ConfigError, "129 tokens", at="context_size"):
        start(replace(rows, ids=np.ones((14, 129), dtype=np.int32)))


def test_nan_activations_are_refused(tiny_llama: LanguageModel, rows: TokenRows, complains: Callable[..., Any]) -> None:
    def broken(rows_of_pass: int) -> Any:
        return edited(tiny_llama, HOOK, lambda x: x / 0 if len(x) == rows_of_pass else x)

    with broken(6), complains(ConfigError, "not finite", at=HOOK):
        StreamedActivations.open(tiny_llama, HOOK, rows, rows_a_pass=3)
    stream = StreamedActivations.open(tiny_llama, HOOK, rows, pool_rows=4, rows_a_pass=3)
    with broken(1), complains(ConfigError, "not finite", at=HOOK):
        next(stream.batches(10, seed=0, epoch=0))


def test_nothing_but_outliers(stream: StreamedActivations, complains: Callable[..., Any]) -> None:
    with complains(EmptySelection, "every residual", at=HOOK):
        next(replace(stream, limit=NormLimit(1.0, 1e-9)).batches(10, seed=0, epoch=0))


def test_identity_holds_the_size_of_a_pool(stream: StreamedActivations) -> None:
    assert replace(stream, pool_rows=5).identity() != stream.identity()
    assert replace(stream, rows_a_pass=5).identity() == stream.identity()
