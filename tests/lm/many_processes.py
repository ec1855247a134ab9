"""Harvest and stream as one process of however many `torchrun` starts; run by a test."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from saeffect.config import ModelConfig
from saeffect.io import Log
from saeffect.lm.activations import StreamedActivations, TokenRows
from saeffect.lm.harvest import harvest
from saeffect.lm.loading import load_language_model
from saeffect.parallel import barrier, leave, rank_and_world

HOOK = "blocks.1.hook_resid_pre"


def main(model: str, out: Path) -> None:
    torch.set_num_threads(1)
    lm = load_language_model(ModelConfig(path=model, dtype="bfloat16"))
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


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
