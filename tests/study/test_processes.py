"""Processes of `torchrun` end with the files of one: together, killed and another number of them, stopped, broken."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from saeffect.study.run import run_study
from saeffect.study.study import Study
from study.test_run import tree
from tiny_study import make_study

BEFORE = ("gate", "features", "coherence", "select", "match", "changes", "put-back")
# One feature a batch, so that each process has several; long enough to be killed in the middle.
STEERING = {
    "prompts": ["The river", "My doctor said"],
    "search_prompts": ["My heart"],
    "doses": [0.5, 1.0],
    "search_features": 2,
    "max_features": 6,
    "samples": 2,
    "max_new_tokens": 24,
    "top_p": 1.0,
    "baseline_features": 1,
    "batch_size": 6,
    "together": {"control": [[1, 2]]},
}
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `study.yaml`, `before` (all stages before steering) and `alone` (steering too, by one process)."""
    folder = tmp_path_factory.mktemp("study")
    study = Study.open(make_study(folder, steering=STEERING))
    run_study(study, folder / "before", stages=BEFORE)
    shutil.copytree(folder / "before", folder / "alone")
    run_study(study, folder / "alone", stages=("steer",))
    return folder


def variables(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **more}


def torchrun(n: int, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    return subprocess.Popen(
        [*command, "-m", "saeffect", *map(str, arguments)],
        env=variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def side_by_side(*arguments: tuple[str | Path, ...]) -> list[subprocess.Popen[str]]:
    """A process for each set of arguments, as torchrun starts them, but nobody looks after them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "saeffect", *map(str, its)],
            env=variables(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(arguments)), **place),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, its in enumerate(arguments)
    ]


def files(run: Path) -> dict[str, str]:
    found = tree(run)
    del found["manifest.json"]  # holds how long each stage took
    return found


def wait_until(true: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    while not true():
        assert all(process.poll() is None for process in processes), "it ended before it could be stopped"
        time.sleep(0.005)


def test_interrupted_processes_end_with_one_process_files(prepared: Path, tmp_path: Path) -> None:
    """Two processes are killed, two of torchrun get Ctrl-C, and three end what was begun."""
    run = tmp_path / "run"
    shutil.copytree(prepared / "before", run)
    arguments = ("steer", prepared / "study.yaml", "--out", run)
    processes = side_by_side(arguments, arguments)
    wait_until(lambda: any(run.glob("partial/steer-control/[!.]*.parquet")), processes)
    for process in processes:
        process.kill()
        process.communicate()
    assert not (run / "arms/control/interventions.parquet").exists()

    together = torchrun(2, *arguments)
    wait_until(lambda: any(run.glob("partial/steer-placebo/[!.]*.parquet")), [together])
    together.send_signal(signal.SIGINT)  # torchrun passes it on
    _, errors = together.communicate()
    assert together.returncode != 0
    assert errors.count("Interrupted: stopped. What is finished is kept") == 1, errors
    assert (run / "arms/control/interventions.parquet").exists()
    kept = list(run.glob("partial/steer-placebo/[!.]*"))
    assert kept or (run / "arms/placebo/interventions.parquet").exists()  # on a quick machine it was just finished

    last = side_by_side(*[arguments] * 3)
    shown = [process.communicate()[1] for process in last]
    assert [process.returncode for process in last] == [0, 0, 0], shown
    assert sum(errors.count("steer treatment: ") for errors in shown) == 1, "the first process alone shows anything"
    assert not any(piece.exists() for piece in kept)
    assert files(run) == files(prepared / "alone")


def test_error_of_all_is_shown_once(prepared: Path, tmp_path: Path) -> None:
    text = (prepared / "study.yaml").read_text()
    broken = prepared / "broken.yaml"
    broken.write_text(text.replace("./saes/placebo", "./saes/nowhere"))
    process = torchrun(2, "run", broken, "--out", tmp_path / "run")
    heard, said = process.communicate()
    assert process.returncode != 0
    assert said.count("NotFound: there is no SAE folder") == 1
    assert "at:  broken.yaml, arms.placebo.sae" in said
    assert heard == ""
    assert not (tmp_path / "run").exists()


def test_error_of_one_stops_all(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "before", tmp_path / "run")
    shutil.copytree(prepared / "before", tmp_path / "elsewhere")
    first, second = side_by_side(
        ("steer", prepared / "study.yaml", "--out", tmp_path / "run", "--redo"),
        ("steer", prepared / "study.yaml", "--out", tmp_path / "elsewhere"),
    )
    _, said = second.communicate()
    assert second.returncode == 2
    assert "ConfigError: the processes see different files" in said
    assert "at:  " + str(tmp_path / "elsewhere") in said
    _, said = first.communicate()
    assert first.returncode == 130, said
    assert "Interrupted: this process stops because another one of the same run did" in said
    assert not any((tmp_path / "run").glob("arms/*/interventions.parquet"))
