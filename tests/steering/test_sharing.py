"""What `torchrun` starts steers together what one process steers alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from saeffect.steering import run_trials, run_trials_shared
from saeffect.steering.sharing import features_of_process
from steering import shared_trials
from steering.shared_trials import FEATURES, PLAN, W_DEC
from steering.tiny_model import OneHotWords, site


@pytest.fixture(scope="module")
def alone(lm):
    return run_trials(site(lm), W_DEC, FEATURES, PLAN, vectors=OneHotWords())


def test_two_processes_make_what_one_makes(lm, alone, tmp_path: Path) -> None:
    source = str(Path(shared_trials.__file__).parents[2] / "src")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, shared_trials.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    single = run_trials(site(lm), W_DEC, FEATURES[:1], PLAN, vectors=OneHotWords())
    for rank in (0, 1):
        assert_frame_equal(pd.read_pickle(tmp_path / f"table-{rank}-of-2.pkl"), alone, check_exact=True)
        assert_frame_equal(pd.read_pickle(tmp_path / f"resumed-{rank}-of-2.pkl"), alone, check_exact=True)
        assert_frame_equal(pd.read_pickle(tmp_path / f"single-{rank}-of-2.pkl"), single, check_exact=True)
    own = [set(pd.read_pickle(tmp_path / f"own-{rank}-of-2.pkl")["feature"]) for rank in (0, 1)]
    assert own == [{0, 2, 11}, {5, 7}], "each steers its share and no other"


def test_a_process_that_is_alone(lm, alone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    chunks: list[pd.DataFrame] = []
    table = run_trials_shared(site(lm), W_DEC, FEATURES, PLAN, vectors=OneHotWords(), on_chunk=chunks.append)
    assert_frame_equal(table, alone, check_exact=True)
    assert len(chunks) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n_features", [1, 2, 5, 12])
def test_every_feature_has_one_process_and_chunks_stay_whole(n_features: int, world: int) -> None:
    shares = [features_of_process(n_features, PLAN, rank, world) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(n_features))
    for share in shares:
        chunks = [share[i : i + 2] for i in range(0, len(share), 2)]
        assert all(chunk[0] % 2 == 0 and chunk == list(range(chunk[0], chunk[0] + len(chunk))) for chunk in chunks)
