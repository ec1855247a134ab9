"""What `torchrun` starts harvests together what one process harvests alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm import many_processes
from saeffect.errors import ConfigError
from saeffect.parallel import barrier, gathered, is_first, join, rank_and_world

SCRIPT = many_processes.__file__


def test_two_processes_make_what_one_makes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    many_processes.main(str(tiny_llama_folder), tmp_path / "one")

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
    done = subprocess.run(
        [*command, str(tiny_llama_folder), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [{p.name: p.read_bytes() for p in (tmp_path / n / "shards").iterdir()} for n in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 7
    expected = np.load(tmp_path / "one" / "stream-0-of-1.npy")
    for rank in (0, 1):
        assert np.array_equal(np.load(tmp_path / "two" / f"stream-{rank}-of-2.npy"), expected)


def test_a_process_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

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
def test_an_environment_that_contradicts_itself(
    monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any], rank: str, world: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with complains(ConfigError, "do not fit", at="environment"):
        rank_and_world()
