from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for planted, which the other processes import too

from planted import planted_store
from training_process import WEIGHTS, Running, Spec, left_in, train

from saeffect.checksums import save_tensors
from saeffect.io import hash_file
from saeffect.lm.checkpoint import Checkpoint
from saeffect.lm.harvest import ActivationStore, read_shard

N_STEPS = 160
SMALL: dict[str, Any] = {
    "d_sae": 48,
    "batch_size": 64,
    "steps": N_STEPS,
    "learning_rate": 3e-3,
    "checkpoint_every": 7,
    "metrics_every": 1,
    "evaluate_every": 50,
    "dead_window": 20,
}
STANDARD = SMALL | {
    "architecture": "standard",
    "l1_coefficient": 5.0,
    "resample_every": 40,
    "dead_threshold": 0.06,
    "penalty_warmup_share": 0.2,
}
TOPK = SMALL | {"architecture": "topk", "k": 2, "dead_after": 600, "auxiliary_k": 8}
CROSSCODER = SMALL | {"architecture": "crosscoder", "k": 2, "dead_after": 600, "auxiliary_k": 8}
BATCHTOPK = SMALL | {"architecture": "batchtopk", "k": 2, "dead_after": 600, "auxiliary_k": 8}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """960 planted tokens: 15 batches of 64 an epoch."""
    return planted_store(tmp_path_factory.mktemp("store"), 960)


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What is left of a run in one go, by its settings."""
    found: dict[str, dict[str, Any]] = {}

    def run(config: Mapping[str, Any]) -> dict[str, Any]:
        key = repr(sorted(config.items()))
        if key not in found:
            out = tmp_path_factory.mktemp("whole")
            codes, said = train(Spec(((out, config),), store.folder))
            assert codes == [0], said
            found[key] = left_in(out)
        return found[key]

    return run


def _kill_after(spec: Spec, n_lines: int, delay: float) -> bool:
    """`kill -9` some moments after a number of lines; whether it was still at work."""
    running = Running(spec)
    running.line(n_lines)
    time.sleep(delay)
    running.process.kill()
    running.process.join()
    return running.process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("config", [STANDARD, BATCHTOPK, CROSSCODER], ids=lambda c: c["architecture"])
def test_killed_at_random_moments(
    store: ActivationStore, whole: Callable[..., dict[str, Any]], tmp_path: Path, config: dict[str, Any]
) -> None:
    moments = random.Random(config["architecture"])
    spec = Spec(((tmp_path, config),), store.folder)
    kills = 0
    for _ in range(4):
        kills += _kill_after(spec, moments.randint(1, 25), moments.uniform(0, 0.01))
        assert not (tmp_path / WEIGHTS).exists()
    assert kills == 4
    codes, said = train(spec)
    assert codes == [0], said
    assert said[0][0].startswith("going on from step")
    assert left_in(tmp_path) == whole(config)
    events = [row["event"] for row in whole(config)["metrics"] if row["kind"] == "event"]
    assert ("resampled" in events) == (config is STANDARD), "the run does what a resume could get wrong"


def test_killed_before_or_during_a_checkpoint(
    store: ActivationStore, whole: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    spec = Spec(((tmp_path, TOPK),), store.folder)
    assert _kill_after(spec, 1, 0.0)
    # What a kill leaves of a file that is being written: part of it, under atomic_path's name.
    (tmp_path / "checkpoint").mkdir(exist_ok=True)
    for name in (
        "checkpoint/.saeffect-writing-step-00000007.ab12_xyz.safetensors",
        ".saeffect-writing-metrics.ab12_xyz.jsonl",
        ".saeffect-writing-cfg.ab12_xyz.json",
    ):
        (tmp_path / name).write_bytes(b"half a file")
    (tmp_path / ".keep.me").write_text("the user's")
    assert train(spec)[0] == [0]
    expected = whole(TOPK)
    assert left_in(tmp_path) == expected | {"names": sorted([*expected["names"], ".keep.me"])}


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoint").glob("step-*.safetensors"))


def test_an_unreadable_checkpoint(store: ActivationStore, whole: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    spec = Spec(((tmp_path, TOPK),), store.folder)
    assert _kill_after(spec, 40, 0.0)
    older, newest = _checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-20])
    codes, (said,) = train(spec)
    assert codes == [0]
    assert "cannot be read" in said[0]
    assert newest.name in said[0]
    assert said[1] == f"going on from step {int(older.stem.removeprefix('step-'))}"
    assert left_in(tmp_path) == whole(TOPK)


def test_unreadable_checkpoints_are_an_error(store: ActivationStore, tmp_path: Path) -> None:
    spec = Spec(((tmp_path, TOPK),), store.folder)
    assert _kill_after(spec, 40, 0.0)
    for path in _checkpoints(tmp_path):
        path.write_bytes(b"")
    codes, (said,) = train(spec)
    assert codes == [2]
    assert "BadFile: this checkpoint cannot be read" in said[-1]
    assert "delete it" in said[-1]
    assert len(_checkpoints(tmp_path)) == 2


def test_several_saes_killed_together(
    store: ActivationStore, whole: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Also between two SAEs' checkpoints: each ends as it does alone."""
    configs = [c | {"keep_checkpoints": 1} for c in (STANDARD, TOPK)]
    spec = Spec(tuple((tmp_path / c["architecture"], c) for c in configs), store.folder)
    moments = random.Random(1)
    for _ in range(3):
        assert _kill_after(spec, moments.randint(2, 60), moments.uniform(0, 0.01))
    first, second = (Checkpoint(out, "").steps() for out in (spec.jobs[i][0] / "checkpoint" for i in range(2)))
    assert set(first) & set(second), "a step that both have"
    codes, said = train(spec)
    assert codes == [0]
    assert said[0][0].startswith("going on")
    for out, config in spec.jobs:
        assert left_in(out) == whole(config)


def test_killed_between_two_checkpoints_and_between_two_endings(
    store: ActivationStore, whole: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    configs = [c | {"keep_checkpoints": 1} for c in (STANDARD, TOPK)]
    spec = Spec(tuple((tmp_path / c["architecture"], c) for c in configs), store.folder)
    (first, _), (second, _) = spec.jobs
    running = Running(spec)
    running.line(30)
    # The second SAE's checkpoints cannot be written any more: its folder is a file.
    (second / "checkpoint").rename(second / "away")
    (second / "checkpoint").write_bytes(b"")
    code, said = running.end()
    assert code == 2, said
    (second / "checkpoint").unlink()
    (second / "away").rename(second / "checkpoint")
    assert Checkpoint(first / "checkpoint", "").steps()[-1] > Checkpoint(second / "checkpoint", "").steps()[-1]
    codes, (said,) = train(spec)
    assert codes == [0]
    assert said[0].startswith("going on from step"), "the first SAE kept what the second still needs"
    for out, config in spec.jobs:
        assert left_in(out) == whole(config)
    # Finished, but for the second's note: the first is not made again.
    (second / "finished.json").rename(tmp_path / "note")
    made_by = json.loads((tmp_path / "note").read_text())["made_by"]
    Checkpoint(second / "checkpoint", made_by).begin()
    before = (first / WEIGHTS).stat().st_mtime_ns
    codes, (said,) = train(spec)
    assert codes == [0]
    assert (first / WEIGHTS).stat().st_mtime_ns == before
    assert left_in(second) == whole(configs[1])
    assert train(spec)[1] == [["finished before; nothing to do"]]


def test_streamed_activations(tiny_llama_folder: Path, tmp_path: Path) -> None:
    config = TOPK | {"steps": 60, "batch_size": 32, "k": 4}
    out = {name: tmp_path / name for name in ("whole", "killed")}
    assert train(Spec(((out["whole"], config),), lm=tiny_llama_folder))[0] == [0]
    spec = Spec(((out["killed"], config),), lm=tiny_llama_folder)
    for n_lines in (12, 5):
        assert _kill_after(spec, n_lines, 0.0)
    codes, (said,) = train(spec)
    assert codes == [0]
    assert said[0].startswith("going on")
    assert left_in(out["killed"]) == left_in(out["whole"])


def test_a_signal_saves_at_the_end_of_the_step(
    store: ActivationStore, whole: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = TOPK | {"checkpoint_every": 10_000}
    spec = Spec(((tmp_path, config),), store.folder)
    running = Running(spec)
    running.line(25)
    assert running.process.pid is not None
    os.kill(running.process.pid, signal.SIGTERM)
    code, said = running.end()
    assert code == 130, said
    (step,) = Checkpoint(tmp_path / "checkpoint", "").steps()
    assert step >= 25
    assert f"Interrupted: stopped after step {step:,} of {N_STEPS:,}; the state is saved in {tmp_path}" in said[-1]
    assert "run the same command again" in said[-1]
    codes, (said,) = train(spec)
    assert codes == [0]
    assert said[0] == f"going on from step {step:,}"
    assert left_in(tmp_path) == whole(TOPK)


def test_a_second_ctrl_c_stops_at_once(
    store: ActivationStore, whole: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "slow").write_text("600")
    spec = Spec(((tmp_path, TOPK),), store.folder)
    running = Running(spec)
    for line in running.lines():
        if line == "measuring":
            break
    assert running.process.pid is not None
    os.kill(running.process.pid, signal.SIGINT)
    while running.process.is_alive():  # the first may still be on its way
        time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.process.pid, signal.SIGINT)
    code, said = running.end()
    assert code == 130
    assert "stopped at once" in said[-1]
    (tmp_path / "slow").unlink()
    assert train(spec)[0] == [0]
    assert left_in(tmp_path) == whole(TOPK)


def test_a_full_disk(store: ActivationStore, whole: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """As the operating system says it: no file may be larger than the limit, so checkpoints fail and metrics go on."""
    spec = Spec(((tmp_path, TOPK),), store.folder)
    assert _kill_after(spec, 40, 0.0)
    before = {path: hash_file(path) for path in _checkpoints(tmp_path)}
    last = max(int(path.stem.removeprefix("step-")) for path in before)
    size = max(path.stat().st_size for path in before)
    # One byte less than a checkpoint; the metrics of this run stay below that until the next one is due.
    codes, (said,) = train(Spec(spec.jobs, store.folder, most_bytes=size - 1))
    assert codes == [2]
    assert f"the checkpoint after step {last + 7} cannot be written" in said[-1]
    assert f"goes on from step {last}" in said[-1]
    assert {path: hash_file(path) for path in _checkpoints(tmp_path)} == before
    assert train(spec)[0] == [0]
    assert left_in(tmp_path) == whole(TOPK)


@pytest.fixture
def copied(store: ActivationStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.folder, tmp_path / "store"))


def test_a_shard_that_goes_bad(copied: Path, whole: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out, shard = tmp_path / "sae", copied / "shard-00002.safetensors"
    spec, data = Spec(((out, TOPK),), copied), shard.read_bytes()
    running = Running(spec)
    running.line(20)
    shard.with_name("new").write_bytes(data[:-9])
    shard.with_name("new").replace(shard)
    code, said = running.end()
    assert code == 2
    assert "BadFile: this shard cannot be read" in said[-1]
    assert str(shard) in said[-1]
    assert _checkpoints(out)
    assert train(spec)[0] == [2], "and so it is at the start"
    shard.write_bytes(data)
    assert train(spec)[0] == [0]
    assert left_in(out) == whole(TOPK)


def test_nan_in_a_shard(copied: Path, whole: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A token of the tenth batch: the error names that step, and the checkpoint is from before."""
    config = TOPK | {"normalise_inputs": "none", "b_dec_init": "zeros", "learning_rate": 1e-3}
    batches = ActivationStore.open(copied).batches(64, seed=0, epoch=0, start=9)
    token = next(batches)[0]
    (shard,) = (s for s in ActivationStore.open(copied).shards() if _rows_like(s, token).any())
    data, activations = shard.read_bytes(), read_shard(shard)["activations"]
    activations[_rows_like(shard, token), 3] = torch.nan
    save_tensors(shard, {"activations": activations})
    spec = Spec(((tmp_path / "sae", config),), copied)
    codes, (said,) = train(spec)
    assert codes == [2]
    assert "BadFile: the loss became nan at step 9." in said[-1]
    assert "look for NaN in the activations" in said[-1]
    assert "goes on from the checkpoint after step 7" in said[-1]
    shard.write_bytes(data)
    assert train(spec)[0] == [0]
    assert left_in(tmp_path / "sae") == whole(config)


def _rows_like(shard: Path, token: Tensor) -> Tensor:
    return (read_shard(shard)["activations"] == token).all(1)
