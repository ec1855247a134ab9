"""What holds for every source of activations: shards on disk, and a model that runs meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeffect.lm.activations import ActivationSource, StreamedActivations, TokenRows
from saeffect.lm.harvest import ActivationStore, harvest
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
        return ActivationStore.open(harvest(tiny_llama, hook, rows, out, rows_per_shard=2, batch_size=3))

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


def test_a_sample_is_the_text_from_its_start(source: ActivationSource) -> None:
    assert torch.equal(source.sample(17), source.sample(100)[:17])
    assert source.sample(0).shape == (0, 32)


@pytest.mark.parametrize("size", [1, 7, 10, 60])
def test_any_batch_can_be_the_first(source: ActivationSource, size: int) -> None:
    whole = _batches(source, size, epoch=1)
    for start in range(len(whole) + 2):
        rest = _batches(source, size, epoch=1, start=start)
        assert len(rest) == max(0, len(whole) - start)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_the_order_depends_on_seed_and_epoch_alone(source: ActivationSource) -> None:
    orders = {str(torch.stack(_batches(source, seed=s, epoch=e)).tolist()) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4
    assert str(torch.stack(_batches(source, seed=1, epoch=1)).tolist()) in orders


def test_a_batch_larger_than_everything(source: ActivationSource) -> None:
    assert source.n_batches(1000) == 0
    assert _batches(source, 1000) == []


def test_it_can_be_left_in_the_middle(source: ActivationSource) -> None:
    batches = source.batches(10, seed=0, epoch=0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(_batches(source)) > 1


def test_identity(make: Callable[..., ActivationSource]) -> None:
    assert make(_rows()).identity() == make(_rows()).identity()
    others = [make(_rows()), make(_rows(1)), make(_rows(), "blocks.2.hook_resid_pre")]
    assert len({source.identity() for source in others}) == 3
