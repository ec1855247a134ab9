from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeffect.checksums import save_tensors
from saeffect.errors import BadFile, ConfigError, EmptySelection, Interrupted, InUse, NotFound
from saeffect.io import atomic_path, read_json, sole_writer, write_json
from saeffect.lm import harvest as harvest_module
from saeffect.lm.activations import NormLimit, TokenRows, first_limit, kept_positions, measure_norm_limit
from saeffect.lm.harvest import ActivationStore, check_disk_space, harvest, harvest_bytes, read_shard, shard_name
from saeffect.lm.hooks import capture, edited
from saeffect.lm.language_model import LanguageModel
from saeffect.progress import Log

HOOK = "blocks.1.hook_resid_pre"
SIZES = {"rows_per_shard": 4, "batch_size": 3}


@pytest.fixture
def rows() -> TokenRows:
    """Ten rows of eight tokens, by turns from two sources."""
    ids = np.random.default_rng(0).integers(1, 320, (10, 8)).astype(np.int32)
    return TokenRows(ids, np.arange(10) % 2, ("general", "medical"))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def _grown(places: list[tuple[int, int]], factor: float) -> Callable[[Tensor], Tensor]:
    """Makes the residual at (row of the pass, position) longer."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        for row, position in places:
            x[row, position] *= factor
        return x

    return edit


def test_shards_hold_the_activations_at_the_hook(tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path) -> None:
    harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)
    store = ActivationStore.open(tmp_path)
    assert [p.name for p in store.shards()] == [f"shard-0000{i}.safetensors" for i in range(3)]
    shards = [read_shard(path) for path in store.shards()]
    whole = {name: torch.cat([s[name] for s in shards]) for name in shards[0]}
    expected = capture(tiny_llama, HOOK, torch.from_numpy(rows.ids.astype(np.int64)))
    row, position = whole["row"].long(), whole["position"].long()
    torch.testing.assert_close(whole["activations"], expected[row, position])
    assert torch.equal(whole["source"].long(), row % 2)
    limit = NormLimit(**store.note["norm_limit"])
    assert len(row) == int(kept_positions(expected, limit).sum())
    assert position.min() == 1
    assert store.note["sources"] == ["general", "medical"]


def test_a_resumed_harvest_has_the_same_bytes(tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path) -> None:
    said: list[str] = []
    harvest(tiny_llama, HOOK, rows, tmp_path / "a", **SIZES, log=Log(said.append))
    whole = _bytes(tmp_path / "a")
    assert len(said) == 3

    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    said.clear()
    harvest(tiny_llama, HOOK, rows, tmp_path / "a", **SIZES, log=Log(said.append))
    assert _bytes(tmp_path / "a") == whole
    assert len(said) == 1, "whole shards are not made again"

    def stop(line: str) -> None:
        if line.startswith("harvest 2/3"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run the same command"):
        harvest(tiny_llama, HOOK, rows, tmp_path / "b", **SIZES, log=Log(stop))
    assert len(_bytes(tmp_path / "b")) == 3  # the note and two shards
    with contextlib.suppress(_Killed), atomic_path(tmp_path / "b" / "shard-00002.safetensors") as half:
        half.write_bytes(b"half")
        os.link(half, tmp_path / "kept")  # the block's end removes it, which a kill does not
        name = half.name
        raise _Killed
    os.link(tmp_path / "kept", tmp_path / "b" / name)
    harvest(tiny_llama, HOOK, rows, tmp_path / "b", **SIZES)
    assert _bytes(tmp_path / "b") == whole, "and nothing is left of the shard that was being written"


class _Killed(BaseException):
    """Stands in for a process that ends here."""


def test_one_writer_a_harvest(
    tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    with sole_writer(tmp_path), complains(InUse, "another process", at=str(tmp_path)):
        harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)
    harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)
    with sole_writer(tmp_path):  # what is complete is read, by as many as like to
        harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)


@pytest.mark.parametrize("limit", [None, [1], {"median_norm": 1.0}, {"median_norm": "1 m", "limit": 3.0}, {"a": 1}])
def test_a_damaged_note_is_refused(
    tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path, complains: Callable[..., Any], limit: Any
) -> None:
    harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)
    note = tmp_path / "harvest.json"
    write_json(note, read_json(note) | {"norm_limit": limit})
    with complains(BadFile, "norm_limit is", "two finite numbers", at=str(note)):
        harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)
    note.unlink()
    with complains(ConfigError, "holds shards, but no harvest.json says of what", at=str(tmp_path)):
        harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)


def test_outliers_and_first_positions_are_left_out(tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path) -> None:
    with edited(tiny_llama, HOOK, _grown([(1, 3), (2, 7)], 100.0)):
        harvest(tiny_llama, HOOK, rows.head(3), tmp_path, **SIZES)
    shard = read_shard(tmp_path / "shard-00000.safetensors")
    kept = set(zip(shard["row"].tolist(), shard["position"].tolist(), strict=True))
    assert {(1, 3), (2, 7)}.isdisjoint(kept)
    assert all(position > 0 for _, position in kept)
    assert len(kept) >= 3 * 7 - 2 - 3
    limit = ActivationStore.open(tmp_path).note["norm_limit"]
    assert limit["limit"] == pytest.approx(3 * limit["median_norm"])


def test_the_limit_by_hand() -> None:
    x = torch.zeros(1, 5, 4)
    x[0, :, 0] = torch.tensor([400.0, 1.0, 2.0, 4.0, 6.1])  # median 4
    limit = measure_norm_limit(x[:, 1:].bfloat16())  # median of four is the lower of the middle two
    assert limit == NormLimit(2.0, 6.0)
    assert kept_positions(x, limit).tolist() == [[False, True, True, True, False]]
    assert kept_positions(x[:, 1:], NormLimit(2.0, 100.0)).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda lm, rows: (lm, HOOK, rows.head(9)), "it differs in text"),
        (lambda lm, rows: (lm, "blocks.2.hook_resid_pre", rows), "it differs in hook"),
        (
            lambda lm, rows: (LanguageModel(lm.model, lm.tokenizer, lm.name, "x"), HOOK, rows),
            "in model_identity",
        ),
    ],
)
def test_a_folder_holds_one_harvest(
    tiny_llama: LanguageModel,
    rows: TokenRows,
    tmp_path: Path,
    complains: Callable[..., Any],
    change: Callable[..., Any],
    part: str,
) -> None:
    harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)
    before = _bytes(tmp_path)
    lm, hook, others = change(tiny_llama, rows)
    with complains(ConfigError, "holds another harvest", part, at=str(tmp_path)):
        harvest(lm, hook, others, tmp_path, **SIZES)
    assert _bytes(tmp_path) == before


@pytest.mark.parametrize(
    ("bad", "rows_of_pass"),
    [(float("nan"), 6), (float("nan"), 1), (float("inf"), 1)],
    ids=["where the limit is measured", "later", "later, infinite"],
)
def test_nan_activations_are_refused(
    tiny_llama: LanguageModel,
    rows: TokenRows,
    tmp_path: Path,
    complains: Callable[..., Any],
    bad: float,
    rows_of_pass: int,
) -> None:
    """They are no outliers to be left out in silence: the model is broken."""
    grow = _grown([(0, 5)], bad)

    def edit(x: Tensor) -> Tensor:
        # The limit is measured on six rows; a shard of four is made of three rows and one.
        return grow(x) if len(x) == rows_of_pass else x

    with edited(tiny_llama, HOOK, edit), complains(ConfigError, "not finite", at=HOOK):
        harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)
    assert not list(tmp_path.glob("*.safetensors"))


def test_bad_hook_before_anything_is_written(tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        harvest(tiny_llama, "blocks.9.hook_resid_pre", rows, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_digest_is_that_of_the_text(rows: TokenRows) -> None:
    same = TokenRows(rows.ids.copy(), rows.sources.copy(), rows.names)
    other = rows.ids.copy()
    other[3, 3] += 1
    assert same.identity() == rows.identity()
    digests = {
        rows.identity(),
        TokenRows(other, rows.sources, rows.names).identity(),
        TokenRows(rows.ids, 1 - rows.sources, rows.names).identity(),
        TokenRows(rows.ids, rows.sources, ("a", "b")).identity(),
        rows.head(9).identity(),
    }
    assert len(digests) == 5
    assert len(rows.head(4)) == 4
    assert len(rows.head(99)) == 10


def test_text_that_the_model_cannot_read(
    tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    """Refused before anything is written."""
    out = tmp_path / "a"

    def of(ids: Any) -> TokenRows:
        return TokenRows(np.asarray(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.int64), ("general",))

    with complains(EmptySelection, "no rows"):
        harvest(tiny_llama, HOOK, rows.head(0), out)
    with complains(ConfigError, "rows have 129 tokens; tiny-llama takes 128", at="context_size"):
        harvest(tiny_llama, HOOK, of(np.ones((2, 129))), out)
    with complains(ConfigError, "rows have 1 token;", at="context_size"):
        harvest(tiny_llama, HOOK, of(np.ones((2, 1))), out)
    for bad in (320, -1):
        with complains(ConfigError, f"{bad}", "knows 0 to 319"):
            harvest(tiny_llama, HOOK, of([[1, 2, bad]]), out)
    assert not out.exists()


def test_disk_cap_counts_all_bytes(
    tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    most = harvest_bytes(tiny_llama, rows)
    assert most == 10 * 7 * (32 * 4 + 12)  # ten rows of seven tokens that count, 32 floats and three int32 each
    with complains(ConfigError, "take 9,800 bytes; the cap is 9,799 bytes", at="max_disk_gb"):
        check_disk_space(tmp_path, most, most - 1)
    check_disk_space(tmp_path, most, most)
    harvest(tiny_llama, HOOK, rows, tmp_path / "a", **SIZES)
    tensors = [t for p in ActivationStore.open(tmp_path / "a").shards() for t in read_shard(p).values()]
    assert 0.9 * most < sum(t.nbytes for t in tensors) <= most


def test_a_disk_without_room(
    tiny_llama: LanguageModel,
    rows: TokenRows,
    tmp_path: Path,
    complains: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harvest(tiny_llama, HOOK, rows, tmp_path / "a", **SIZES)
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    free = 2_000  # half a shard

    def usage(_: Any) -> Any:
        return type("Usage", (), {"free": free})

    monkeypatch.setattr("shutil.disk_usage", usage)
    with complains(ConfigError, "more; the disk has 2,000 bytes free", at=str(tmp_path / "a")):
        harvest(tiny_llama, HOOK, rows, tmp_path / "a", **SIZES)
    with complains(ConfigError, "the disk has", at="b"):
        harvest(tiny_llama, HOOK, rows, tmp_path / "b" / "c", **SIZES)
    assert not (tmp_path / "b").exists()
    free = 5_000  # what is there counts: only one shard is missing
    harvest(tiny_llama, HOOK, rows, tmp_path / "a", **SIZES)
    with complains(ConfigError, "the disk has"):
        harvest(tiny_llama, HOOK, rows, tmp_path / "b", **SIZES)


def test_a_write_that_fails_leaves_whole_shards(
    tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    """The system refuses bytes in the middle of the third shard, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def then_no_more(line: str) -> None:
        if line.startswith("harvest 2/"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    out = tmp_path / "out"
    try:
        with complains(BadFile, "cannot be written: File too large", "run the same command", at="shard-00002.safe"):
            harvest(tiny_llama, HOOK, rows, out, **SIZES, log=Log(then_no_more))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in out.iterdir()) == [
        "harvest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    for path in ActivationStore.open(out).shards():
        read_shard(path)


def test_bos_in_front_is_not_measured(
    tiny_llama: LanguageModel, rows: TokenRows, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    lm = dataclasses.replace(tiny_llama, prepend_bos=True)
    with complains(ConfigError, "begin with the token 0 (BOS), but not every row does", "prepend_bos=False"):
        harvest(lm, HOOK, rows, tmp_path, **SIZES)
    ids = rows.ids.copy()
    ids[:, 0] = 0
    begun = TokenRows(ids, rows.sources, rows.names)
    harvest(lm, HOOK, begun, tmp_path, **SIZES)
    store = ActivationStore.open(tmp_path)
    assert store.note["made_by"]["bos"] == 0
    x = capture(lm, HOOK, torch.from_numpy(ids[:4].astype(np.int64)))
    assert first_limit(lm, HOOK, ids[:4]).median_norm == pytest.approx(float(x[:, 1:].norm(dim=-1).median()))
    with complains(ConfigError, "another harvest", "bos"):
        harvest(tiny_llama, HOOK, rows, tmp_path, **SIZES)


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


def test_epoch_visits_each_token_once(store: ActivationStore) -> None:
    order = _order(store)
    assert len(order) == len(set(order)) == 48  # 12 batches of 4; two tokens are left over
    assert order != sorted(order)
    assert len(_order(store, batch_size=10)) == 50


def test_order_depends_on_seed_and_epoch(store: ActivationStore) -> None:
    assert _order(store) == _order(store)
    assert len({tuple(_order(store, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_tokens_mix_within_a_pool_only(store: ActivationStore) -> None:
    order = _order(store, batch_size=5, pool_shards=1)
    for start in range(0, 50, 10):
        assert len({t // 10 for t in order[start : start + 10]}) == 1
    assert len({t // 10 for t in _order(store)[:10]}) > 1


@pytest.mark.parametrize("size", [1, 4, 10, 13, 25])
def test_epoch_can_start_in_any_pool(store: ActivationStore, size: int) -> None:
    whole = _order(store, batch_size=size, pool_shards=2, epoch=1)
    assert len(whole) == 50 // size * size == store.n_batches(size) * size
    for start in range(50 // size + 2):
        assert _order(store, batch_size=size, pool_shards=2, epoch=1, start=start) == whole[start * size :]


def test_pools_before_the_start_are_not_read(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = harvest_module.read_shard
    monkeypatch.setattr(harvest_module, "read_shard", lambda path: read.append(path) or real(path))
    whole = _order(store, pool_shards=1, batch_size=5)
    assert len(set(read)) == 5
    read.clear()
    assert _order(store, pool_shards=1, batch_size=5, start=7) == whole[35:]
    assert len(set(read)) == 2


def test_memory_holds_two_pools(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]
    real = harvest_module.shuffled

    def made(*args: Any) -> Any:
        pool = real(*args)
        alive.add(pool)
        most[0] = max(most[0], len(alive))
        return pool

    monkeypatch.setattr(harvest_module, "shuffled", made)
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
