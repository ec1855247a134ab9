"""Steer as one process of however many `torchrun` starts; run by a test."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch

# Run as a script by torchrun: the folder of the tests is not on the path yet.
sys.path.insert(0, str(Path(__file__).parents[1]))

from saeffect.parallel import leave, rank_and_world
from saeffect.steering import SteeringPlan, run_trials
from steering.tiny_model import D_MODEL, OneHotWords, site, tiny_model

W_DEC = torch.randn(12, D_MODEL, generator=torch.Generator().manual_seed(6)) * 2
FEATURES = pd.DataFrame(
    {"feature": [7, 2, 5, 0, 11], "top_tokens": [[f"w{3 + 9 * i + j}" for j in range(9)] for i in range(5)]}
)
# Eight steered rows a feature beside two unsteered ones, so two features fill a batch: chunks (0, 2), (5, 7), (11).
PLAN = SteeringPlan(
    prompts=("one two", "three"), doses=(0.5, 1.0), samples=2, max_new_tokens=6, top_p=0.9, batch_size=18, seed=3
)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    lm = tiny_model()
    rank, world = rank_and_world()
    chunks: list[pd.DataFrame] = []
    table = run_trials(site(lm, W_DEC), FEATURES, PLAN, vectors=OneHotWords(), on_chunk=chunks.append)
    table.to_pickle(out / f"table-{rank}-of-{world}.pkl")
    pd.concat(chunks).to_pickle(out / f"own-{rank}-of-{world}.pkl")
    # What another number of processes left unfinished: only feature 5 is missing.
    again: list[pd.DataFrame] = []
    done = table[table["feature"] != 5]
    resumed = run_trials(site(lm, W_DEC), FEATURES, PLAN, vectors=OneHotWords(), done=done, on_chunk=again.append)
    resumed.to_pickle(out / f"resumed-{rank}-of-{world}.pkl")
    # More processes than chunks: the others have nothing to do, and get the table too.
    one = run_trials(site(lm, W_DEC), FEATURES[:1], PLAN, vectors=OneHotWords())
    one.to_pickle(out / f"single-{rank}-of-{world}.pkl")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
