"""Interventions shared over the processes that `torchrun` started: each steers some features, all get the table."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.parallel import barrier, device_of_process, gathered, is_first, join, rank_and_world
from saeffect.steering.generate import Progress
from saeffect.steering.outcomes import TextVectors
from saeffect.steering.plan import Site, SteeringPlan, check_features
from saeffect.steering.trials import run_trials

__all__ = ["features_of_process", "run_trials_shared"]


def run_trials_shared(
    site: Site,
    W_dec: Tensor,
    features: pd.DataFrame,
    plan: SteeringPlan,
    *,
    vectors: TextVectors,
    done: pd.DataFrame | None = None,
    on_chunk: Callable[[pd.DataFrame], None] | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """`run_trials`, with the features shared out over processes; exactly `run_trials` in a process that is alone.

    Processes take the chunks that one process would work off by turns, so every batch holds the same rows as
    there and the table is the same, on the same kind of processor and number of threads. What a process was
    killed at is done again by whoever gets it: pass `done` to all of them alike.

    Args:
        site: As `run_trials`, and so are the others.
        W_dec: Equal in all processes.
        features: The whole selection, in all processes.
        plan: Equal in all processes.
        vectors: Where the texts' vectors come from.
        done: Rows of an earlier call, whichever process wrote them.
        on_chunk: Called with the chunks of this process; two processes must not write the same file.
        progress: Called in the first process alone, about its own share.

    Returns:
        The table of `run_trials`, whole, in every process.

    Raises:
        Interrupted: Another process is gone.
        SaeffectError: As `run_trials`.
    """
    if join() == 1:
        return run_trials(site, W_dec, features, plan, vectors=vectors, done=done, on_chunk=on_chunk, progress=progress)
    table = check_features(site, W_dec, features, ("top_tokens", *plan.feature_columns))
    mine = table.iloc[features_of_process(len(table), plan, *rank_and_world())]
    rows: pd.DataFrame | None = None
    if len(mine):
        rows = run_trials(
            site,
            W_dec,
            mine,
            plan,
            vectors=vectors,
            done=None if done is None else done[done["feature"].isin(mine["feature"])],
            on_chunk=on_chunk,
            progress=progress if is_first() else None,
        )
    barrier()  # which waits for the slowest, however long; what follows takes a moment
    everything = pd.concat(_from_all(rows), ignore_index=True)
    # Within a feature the rows are in their order already, and a feature is one process' alone.
    return everything.sort_values("feature", kind="stable", ignore_index=True)


def features_of_process(n_features: int, plan: SteeringPlan, rank: int, world: int) -> list[int]:
    """Positions, in order of feature number, of the features that a process steers: every `world`-th chunk.

    Example:
        >>> plan = SteeringPlan(("Hi",), (1.0,), samples=1, batch_size=5)  # steered and random: two features a batch
        >>> features_of_process(7, plan, rank=0, world=2), features_of_process(7, plan, rank=1, world=2)
        ([0, 1, 4, 5], [2, 3, 6])
    """
    return [i for i in range(n_features) if i // plan.features_at_once % world == rank]


def _from_all(rows: pd.DataFrame | None) -> list[pd.DataFrame]:
    """The tables of all processes, in order of rank; None for none. They travel as parquet, which keeps every bit."""
    packed = io.BytesIO()
    if rows is not None:
        rows.to_parquet(packed, index=False)
    data = torch.from_numpy(np.frombuffer(packed.getvalue() or b"\0", dtype=np.uint8).copy())
    lengths = gathered(torch.tensor([len(packed.getvalue())], device=device_of_process()))
    everything = gathered(data.to(device_of_process())).cpu().numpy()
    tables: list[pd.DataFrame] = []
    start = 0
    for length in lengths.tolist():
        if length:
            tables.append(pd.read_parquet(io.BytesIO(everything[start : start + length].tobytes())))
        start += max(1, length)
    return tables
