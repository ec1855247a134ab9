from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import saeffect.lm.harvest as shards_module
from saeffect.checksums import save_tensors
from saeffect.errors import BadFile, EmptySelection, NotFound
from saeffect.io import write_json
from saeffect.lm.harvest import ActivationStore, read_shard, shard_name


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """Five shards of ten tokens; the token's number is its activation."""
    write_json(tmp_path / "harvest.json", {"made_by": {"model": "x"}})
    for i in range(5):
        x = torch.arange(10 * i, 10 * i + 10, dtype=torch.bfloat16)[:, None].expand(10, 2)
        save_tensors(tmp_path / shard_name(i), {"activations": x})
    return ActivationStore.open(tmp_path)


def _order(store: ActivationStore, **options: Any) -> list[int]:
    return [int(t) for x in store.batches(**{"batch_size": 4, "seed": 0, "epoch": 0, **options}) for t in x[:, 0]]


def test_a_pass_visits_every_token_at_most_once(store: ActivationStore) -> None:
    order = _order(store)
    assert len(order) == len(set(order)) == 48  # 12 batches of 4; two tokens are left over
    assert order != sorted(order)
    assert len(_order(store, batch_size=10)) == 50


def test_the_order_depends_on_seed_and_epoch_alone(store: ActivationStore) -> None:
    assert _order(store) == _order(store)
    assert len({tuple(_order(store, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_tokens_mix_within_a_pool_only(store: ActivationStore) -> None:
    order = _order(store, batch_size=5, pool_shards=1)
    for start in range(0, 50, 10):
        assert len({t // 10 for t in order[start : start + 10]}) == 1
    assert len({t // 10 for t in _order(store)[:10]}) > 1


@pytest.mark.parametrize("size", [1, 4, 10, 13, 25])
def test_any_batch_can_be_the_first_in_any_pool(store: ActivationStore, size: int) -> None:
    whole = _order(store, batch_size=size, pool_shards=2, epoch=1)
    assert len(whole) == 50 // size * size == store.n_batches(size) * size
    for start in range(50 // size + 2):
        assert _order(store, batch_size=size, pool_shards=2, epoch=1, start=start) == whole[start * size :]


def test_pools_before_the_start_are_not_read(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = shards_module.read_shard
    monkeypatch.setattr(shards_module, "read_shard", lambda path: read.append(path) or real(path))
    whole = _order(store, pool_shards=1, batch_size=5)
    assert len(set(read)) == 5
    read.clear()
    assert _order(store, pool_shards=1, batch_size=5, start=7) == whole[35:]
    assert len(set(read)) == 2


def test_memory_holds_two_pools(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]
    real = shards_module.shuffled

    def made(*args: Any) -> Any:
        pool = real(*args)
        alive.add(pool)
        most[0] = max(most[0], len(alive))
        return pool

    monkeypatch.setattr(shards_module, "shuffled", made)
    for _ in store.batches(5, seed=0, epoch=0, pool_shards=1):
        time.sleep(0.002)  # the reader is ahead as far as it may
    assert most == [2]


def test_batches_are_float32(store: ActivationStore) -> None:
    batch = next(store.batches(4, seed=0, epoch=0))
    assert batch.dtype == torch.float32
    assert batch.shape == (4, 2)


def test_sample_takes_the_first_tokens(store: ActivationStore) -> None:
    assert store.sample(13)[:, 0].tolist() == list(range(13))
    assert store.sample(13).dtype == torch.float32
    assert len(store.sample(999)) == 50


def test_files_half_written_are_not_shards(store: ActivationStore) -> None:
    (store.folder / ".shard-00009.x1.safetensors").write_bytes(b"half")
    assert len(store.shards()) == 5


def test_no_harvest(tmp_path: Path, complains: Callable[..., Any]) -> None:
    with complains(NotFound, "no harvest.json", at=str(tmp_path)):
        ActivationStore.open(tmp_path)
    for other in ([], {}, {"made_by": "me"}, 3):
        write_json(tmp_path / "harvest.json", other)
        with complains(BadFile, "is not what a harvest writes", at=str(tmp_path)):
            ActivationStore.open(tmp_path)
    write_json(tmp_path / "harvest.json", {"made_by": {}})
    with complains(EmptySelection, "no shards", at=str(tmp_path)):
        ActivationStore.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 50])
def test_truncated_shards(store: ActivationStore, complains: Callable[..., Any], keep: int) -> None:
    path = store.shards()[2]
    path.write_bytes(path.read_bytes()[:keep])
    with complains(BadFile, "this shard cannot be read", "delete it", at=path.name):
        read_shard(path)


def test_a_truncated_shard_among_batches_is_named(store: ActivationStore, complains: Callable[..., Any]) -> None:
    path = store.shards()[3]
    path.write_bytes(path.read_bytes()[:-8])
    with complains(BadFile, "this shard cannot be read", at=path.name):
        list(store.batches(4, seed=0, epoch=0))
    with complains(BadFile, at=path.name):
        store.n_batches(4)
