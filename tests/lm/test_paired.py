"""Both models on the same tokens, from shards and as they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from saeffect.errors import ConfigError
from saeffect.lm.activations import NormLimit, StreamedActivations, TokenRows
from saeffect.lm.harvest import ActivationStore, harvest, read_shard
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.paired import PairedStore, PairedStream, combined, refuse_unlike

HOOK = "blocks.1.hook_resid_post"
HOW: tuple[Literal["both", "difference"], ...] = ("both", "difference")


@pytest.fixture(scope="module")
def tuned(tiny_llama: LanguageModel, random_model: Callable[..., Any]) -> LanguageModel:
    """Weights a little off, and one token's residuals so long that they are outliers in this model alone."""
    model = random_model(tiny_llama.model.config)
    model.load_state_dict(tiny_llama.model.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        model.get_input_embeddings().weight[7] *= 100
    return dataclasses.replace(tiny_llama, model=model, name="tuned", identity="tuned")


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    ids = np.random.default_rng(0).integers(1, 60, (20, 16)).astype(np.int32)
    return TokenRows(ids, np.zeros(20, dtype=np.int64), ("a",))


@pytest.fixture(scope="module")
def stores(
    tiny_llama: LanguageModel, tuned: LanguageModel, rows: TokenRows, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ActivationStore, ActivationStore]:
    folder = tmp_path_factory.mktemp("stores")
    made = [harvest(lm, HOOK, rows, folder / lm.name, rows_per_shard=8) for lm in (tiny_llama, tuned)]
    return made[0], made[1]


def test_only_tokens_of_both_models_are_used(
    stores: tuple[ActivationStore, ActivationStore], tiny_llama: LanguageModel, tuned: LanguageModel, rows: TokenRows
) -> None:
    lengths = [sum(store.lengths()) for store in stores]
    both = PairedStore.open(*stores, "both")
    assert lengths[1] < lengths[0], "the outliers are left out"
    assert sum(both.lengths()) <= min(lengths)
    assert (both.d_in, both.n_batches(10)) == (64, sum(both.lengths()) // 10)
    ids = torch.from_numpy(rows.ids.astype(np.int64))
    whole = [capture(lm, HOOK, ids) for lm in (tiny_llama, tuned)]
    kept = torch.zeros(2, 20, 16, dtype=torch.bool)
    for which, store in enumerate(stores):
        for path in store.shards():
            shard = read_shard(path)
            kept[which, shard["row"].long(), shard["position"].long()] = True
    mask = kept.all(dim=0)
    expected = combined(whole[0][mask], whole[1][mask], "both")
    torch.testing.assert_close(both.sample(10_000), expected.float(), rtol=1e-4, atol=1e-4)
    difference = PairedStore.open(*stores, "difference")
    assert difference.d_in == 32
    torch.testing.assert_close(difference.sample(10_000), expected[:, 32:] - expected[:, :32], rtol=1e-3, atol=1e-3)
    assert both.identity() != difference.identity() != PairedStore.open(*stores[::-1], "difference").identity()


@pytest.mark.parametrize("how", HOW)
def test_batches_go_on_where_they_stopped(stores: tuple[ActivationStore, ActivationStore], how: Any) -> None:
    store = PairedStore.open(*stores, how)
    whole = list(store.batches(32, seed=1, epoch=0))
    assert len(whole) == store.n_batches(32) > 4
    rest = list(store.batches(32, seed=1, epoch=0, start=3))
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))
    assert not torch.equal(whole[0], next(iter(store.batches(32, seed=1, epoch=1))))


@pytest.mark.parametrize("how", HOW)
def test_streamed_they_are_the_same(
    stores: tuple[ActivationStore, ActivationStore],
    tiny_llama: LanguageModel,
    tuned: LanguageModel,
    rows: TokenRows,
    how: Any,
) -> None:
    streams = [
        dataclasses.replace(
            StreamedActivations.open(lm, HOOK, rows, pool_rows=8, rows_a_pass=4),
            limit=NormLimit(*store.norm_limit().__dict__.values()),
        )
        for lm, store in zip((tiny_llama, tuned), stores, strict=True)
    ]
    stream, store = PairedStream.from_streams(streams[0], streams[1], how), PairedStore.open(*stores, how)
    torch.testing.assert_close(stream.sample(10_000), store.sample(10_000), rtol=1e-3, atol=1e-3)
    assert stream.d_in == store.d_in
    whole = list(stream.batches(32, seed=1, epoch=0))
    assert len(whole) == stream.n_batches(32)
    assert torch.equal(whole[2], next(iter(stream.batches(32, seed=1, epoch=0, start=2))))
    assert stream.identity() != streams[0].identity()


def test_harvests_of_other_text_are_refused(
    stores: tuple[ActivationStore, ActivationStore],
    tuned: LanguageModel,
    rows: TokenRows,
    tmp_path: Path,
    complains: Callable[..., Any],
) -> None:
    other = harvest(tuned, HOOK, rows.head(10), tmp_path / "other", rows_per_shard=8)
    with complains(ConfigError, "differ in text", at=str(tmp_path / "other")):
        PairedStore.open(stores[0], other, "both")


def test_models_that_are_no_pair_are_refused(
    tiny_llama: LanguageModel, tiny_gpt2: LanguageModel, complains: Callable[..., Any]
) -> None:
    refuse_unlike(tiny_llama, tiny_gpt2)  # of one width and with one tokenizer

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"nurse": 1}

    with complains(ConfigError, "cannot read the same text", at="tuned"):
        refuse_unlike(tiny_llama, dataclasses.replace(tiny_gpt2, tokenizer=Other()))
