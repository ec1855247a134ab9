"""What many processes harvest and stream together is what one harvests and streams alone."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeffect.config import ModelConfig
from saeffect.errors import ConfigError
from saeffect.lm.activations import StreamedActivations, TokenRows
from saeffect.lm.harvest import harvest
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model
from saeffect.parallel import barrier, gathered, is_first, join, leave, rank_and_world
from saeffect.progress import Log

HOOK = "blocks.1.hook_resid_pre"


def _harvest_and_stream(lm: LanguageModel, out: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 320, (11, 12)).astype(np.int32)
    rows = TokenRows(ids, np.arange(11) % 2, ("general", "medical"))
    said: list[str] = []
    harvest(lm, HOOK, rows, out / "shards", rows_per_shard=2, batch_size=2, log=Log(said.append))
    rank, world = rank_and_world()
    assert len(said) == 6 // world, "each process writes its share, and says so after each shard"
    # No process is here before every shard is there.
    assert len(list((out / "shards").glob("*.safetensors"))) == 6
    source = StreamedActivations.open(lm, HOOK, rows, pool_rows=5, rows_a_pass=2)
    found = torch.cat([source.sample(30), *source.batches(10, seed=0, epoch=0, start=2)])
    place = out / f"stream-{rank}-of-{world}.npy"
    np.save(place, found.numpy())
    barrier()
    leave()


def _as_torchrun_would(rank: int, port: int, lm: LanguageModel, out: Path) -> None:
    """Started by fork: what takes seconds is imported already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _harvest_and_stream(lm, out)


def test_two_processes_make_what_one_makes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    lm = load_language_model(ModelConfig(path=str(tiny_llama_folder), dtype="bfloat16"))
    _harvest_and_stream(lm, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        multiprocessing.get_context("fork").Process(target=_as_torchrun_would, args=(rank, port, lm, tmp_path / "two"))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()  # one may wait for the other for ever
    assert [process.exitcode for process in processes] == [0, 0]
    files = [{p.name: p.read_bytes() for p in (tmp_path / n / "shards").iterdir()} for n in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 7
    expected = np.load(tmp_path / "one" / "stream-0-of-1.npy")
    for rank in (0, 1):
        assert np.array_equal(np.load(tmp_path / "two" / f"stream-{rank}-of-2.npy"), expected)


def test_single_process_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank_and_world() == (0, 1)
    assert is_first()
    assert join() == 1
    barrier()
    x = torch.arange(3)
    assert gathered(x) is x
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "0"), ("1", "")])
def test_contradicting_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any], rank: str, world: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with complains(ConfigError, "do not fit", at="environment"):
        rank_and_world()
