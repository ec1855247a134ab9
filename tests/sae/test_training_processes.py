"""Many processes do what one does. Most tests start them as torchrun would; the last one lets torchrun do it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # for planted, which the other processes import too

from planted import planted_store
from training_process import WEIGHTS, Running, Spec, left_in, train

from processes import free_port, ranks
from saeffect.checksums import save_tensors
from saeffect.lm.checkpoint import Checkpoint
from saeffect.lm.harvest import ActivationStore, read_shard

N_STEPS = 50
SMALL: dict[str, Any] = {
    "d_sae": 48,
    "batch_size": 65,  # uneven for two processes and for three
    "steps": N_STEPS,
    "learning_rate": 3e-3,
    "checkpoint_every": 20,
    "metrics_every": 1,
    "evaluate_every": 25,
    "dead_window": 10,
}
AUXILIARY = {"k": 2, "dead_after": 300, "auxiliary_k": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 4.0, "resample_every": 20, "dead_threshold": 0.3},
    "topk": AUXILIARY,
    "batchtopk": AUXILIARY,
    "matryoshka": AUXILIARY | {"matryoshka_widths": (12, 48)},
    "jumprelu": {"l0_coefficient": 0.1, "threshold_at_start": 0.25, "dead_after": 300, "pre_act_coefficient": 1e-3},
    "gated": {"l1_coefficient": 1.0},
}


def _config(architecture: str, **changes: Any) -> dict[str, Any]:
    return SMALL | {"architecture": architecture} | CONFIGS[architecture] | changes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """960 planted tokens: 14 batches of 65 an epoch."""
    return planted_store(tmp_path_factory.mktemp("store"), 960)


@pytest.fixture(scope="module")
def alone(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Where one process trained each architecture."""

    class Folders(dict[str, Path]):
        def __missing__(self, architecture: str) -> Path:
            out = tmp_path_factory.mktemp(architecture)
            assert train(Spec(((out, _config(architecture)),), store.folder))[0] == [0]
            self[architecture] = out
            return out

    return Folders()


def _refuse_unlike(found: Path, expected: Path) -> None:
    """The same numbers to float tolerance, and the same files."""
    ours, theirs = left_in(found), left_in(expected)
    assert ours["names"] == theirs["names"]
    assert ours["cfg.json"] == theirs["cfg.json"]
    assert len(ours["metrics"]) == len(theirs["metrics"])
    for ours_row, theirs_row in zip(ours["metrics"], theirs["metrics"], strict=True):
        for name in ("kind", "event"):
            assert ours_row.pop(name, None) == theirs_row.pop(name, None)
        assert ours_row == pytest.approx(theirs_row, rel=2e-4, abs=1e-4)
    tensors, expected_tensors = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    for name, tensor in expected_tensors.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("architecture", "n_processes"), [*((name, 2) for name in CONFIGS), ("batchtopk", 3)])
def test_many_processes_end_as_one(
    store: ActivationStore, alone: Mapping[str, Path], tmp_path: Path, architecture: str, n_processes: int
) -> None:
    codes, said = train(Spec(((tmp_path, _config(architecture)),), store.folder), n_processes)
    assert codes == [0] * n_processes, said
    assert not any(said[1:]), "only the first process speaks"
    _refuse_unlike(tmp_path, alone[architecture])
    rows = left_in(tmp_path)["metrics"]
    if architecture == "standard":
        assert any(row.get("event") == "resampled" for row in rows)
    if "dead_after" in CONFIGS[architecture]:
        assert max(row.get("dead", 0) for row in rows) > 0, "the losses on dead features take part"


@pytest.mark.parametrize(
    ("architecture", "before", "after"), [("standard", 2, 1), ("batchtopk", 2, 3), ("batchtopk", 1, 2)]
)
def test_other_number_of_processes_resumes(
    store: ActivationStore, alone: Mapping[str, Path], tmp_path: Path, architecture: str, before: int, after: int
) -> None:
    spec = Spec(((tmp_path, _config(architecture)),), store.folder)
    running = [Running(spec, variables) for variables in ranks(before)]
    running[0].line(27)
    for process in running:
        process.process.kill()
    for process in running:
        process.end()
    assert Checkpoint(tmp_path / "checkpoint", "").steps() == [20]
    codes, said = train(spec, after)
    assert codes == [0] * after
    assert said[0][0] == "going on from step 20"
    _refuse_unlike(tmp_path, alone[architecture])


def test_more_processes_than_tokens_of_a_batch(store: ActivationStore, tmp_path: Path) -> None:
    codes, said = train(Spec(((tmp_path / "sae", _config("topk", batch_size=1)),), store.folder), 2)
    assert codes == [2, 2]
    assert all("a batch of 1 tokens cannot be shared by 2 processes" in lines[-1] for lines in said)
    assert not (tmp_path / "sae").exists()


def test_signal_to_one_process_stops_all(store: ActivationStore, alone: Mapping[str, Path], tmp_path: Path) -> None:
    config = _config("topk", steps=2_000, evaluate_every=10_000)
    spec = Spec(((tmp_path, config),), store.folder)
    first, second = (Running(spec, variables) for variables in ranks(2))
    first.line(15)
    assert second.process.pid is not None
    os.kill(second.process.pid, signal.SIGTERM)
    for running in (first, second):
        code, said = running.end()
        assert code == 130
        assert "stopped after step" in said[-1]
    steps = Checkpoint(tmp_path / "checkpoint", "").steps()
    assert f"stopped after step {steps[-1]:,} of 2,000" in said[-1]


def _damaged(store: ActivationStore, folder: Path, damage: str) -> Path:
    """A copy of the shards that one process of several finds differently."""
    for shard in store.shards():
        activations = read_shard(shard)["activations"]
        if shard == store.shards()[2] and damage == "NaN":
            activations[7, 3] = torch.nan
        save_tensors(folder / shard.name, {"activations": activations})
    (folder / "harvest.json").write_bytes((store.folder / "harvest.json").read_bytes())
    return folder


def test_nan_in_one_processes_shards_stops_all(store: ActivationStore, tmp_path: Path) -> None:
    config = _config("topk", normalise_inputs="none", b_dec_init="zeros")
    out = tmp_path / "sae"
    folders = [store.folder, _damaged(store, tmp_path / "store", "NaN")]
    running = [
        Running(Spec(((out, config),), folder), variables) for folder, variables in zip(folders, ranks(2), strict=True)
    ]
    for process in running:
        code, said = process.end()
        assert code == 2, said
        assert "BadFile: the loss became nan at step" in said[-1]
    assert not (out / WEIGHTS).exists()


def test_an_unreadable_shard_in_one_process_stops_all(store: ActivationStore, tmp_path: Path) -> None:
    out = tmp_path / "sae"
    folders = [store.folder, _damaged(store, tmp_path / "store", "")]
    specs = [Spec(((out, _config("topk", steps=2_000)),), folder) for folder in folders]
    first, second = map(Running, specs, ranks(2))
    first.line(30)
    shard = tmp_path / "store" / "shard-00001.safetensors"
    (tmp_path / "torn").write_bytes(shard.read_bytes()[:-5])
    (tmp_path / "torn").replace(shard)
    code, said = second.end()
    assert code == 2
    assert "BadFile: this shard cannot be read" in said[-1]
    code, said = first.end()
    assert code == 130
    assert "Interrupted: this process stops because another one of the same run did" in said[-1]
    assert Checkpoint(out / "checkpoint", "").steps()


def test_a_process_that_is_killed_stops_the_others(store: ActivationStore, tmp_path: Path) -> None:
    spec = Spec(((tmp_path, _config("standard", steps=2_000)),), store.folder)
    first, second = (Running(spec, variables) for variables in ranks(2))
    first.line(30)
    second.process.kill()
    code, said = first.end()
    assert code == 130
    assert "goes on from the last checkpoint" in said[-1]
    second.end()


def test_a_folder_that_only_the_first_process_sees(store: ActivationStore, tmp_path: Path) -> None:
    config = _config("topk", steps=2_000)
    shared = Spec(((tmp_path / "a", config),), store.folder)
    running = Running(shared)
    running.line(50)
    running.process.kill()
    running.end()
    specs = [shared, Spec(((tmp_path / "b", config),), store.folder)]
    for process in [Running(spec, variables) for spec, variables in zip(specs, ranks(2), strict=True)]:
        code, said = process.end()
        assert code == 2
        assert "ConfigError: the processes see different checkpoints" in said[-1]


def _torchrun(store: Path, out: Path, config: Mapping[str, Any]) -> subprocess.Popen[str]:
    here = Path(__file__)
    path = os.pathsep.join([str(here.parents[2] / "src"), str(here.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return subprocess.Popen(
        [*command, str(here.parent / "training_process.py"), str(store), str(out), json.dumps(config)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_ctrl_c_and_the_rest(store: ActivationStore, alone: Mapping[str, Path], tmp_path: Path) -> None:
    config = _config("standard", checkpoint_every=1_000)
    (tmp_path / "slow").write_text("1")  # held-out text takes a second: time for the signal to arrive
    process = _torchrun(store.folder, tmp_path, config)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGINT)  # torchrun passes it on
    _, said = process.communicate()
    assert process.returncode != 0
    steps = Checkpoint(tmp_path / "checkpoint", "").steps()
    assert len(steps) == 1, said
    assert f"stopped after step {steps[0]} of {N_STEPS}" in said
    (tmp_path / "slow").unlink()
    codes, heard = train(Spec(((tmp_path, config),), store.folder), 2)
    assert codes == [0, 0]
    assert heard[0][0] == f"going on from step {steps[0]}"
    _refuse_unlike(tmp_path, alone["standard"])
