from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from saeffect.errors import BadFile, ConfigError
from saeffect.lm.checkpoint import Checkpoint


class Run:
    """Two weights under Adam, and a counter."""

    def __init__(self) -> None:
        self.weights = {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.eye(2))}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=0.1)
        self.others = {"counter": torch.zeros(2, dtype=torch.int64)}

    def steps(self, n: int, *, first: int = 0) -> Run:
        for step in range(first, first + n):
            for number, p in enumerate(self.weights.values()):
                p.grad = torch.full_like(p, 1.0 + step + number)
            self.optimizer.step()
            self.others["counter"] += 1
        return self

    def save(self, checkpoint: Checkpoint, step: int, **options: bool) -> None:
        checkpoint.save(step, self.weights, self.optimizer, self.others, **options)

    def restore(self, checkpoint: Checkpoint, step: int | None = None) -> int:
        return checkpoint.restore(self.weights, self.optimizer, self.others, step=step)

    def tensors(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.weights.items()} | self.others


def test_going_on_is_as_never_stopping(tmp_path: Path) -> None:
    whole = Run().steps(7)
    Run().steps(3).save(Checkpoint(tmp_path, "me"), 3)
    resumed = Run()
    assert resumed.restore(Checkpoint(tmp_path, "me")) == 3
    resumed.steps(4, first=3)
    for name, tensor in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor)


def test_without_a_checkpoint_nothing_changes(tmp_path: Path) -> None:
    run = Run()
    before = run.tensors()
    assert run.restore(Checkpoint(tmp_path / "none", "me")) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.tensors().items())
    assert not run.optimizer.state
    assert not (tmp_path / "none").exists()


def test_so_many_are_kept(tmp_path: Path) -> None:
    checkpoint, run = Checkpoint(tmp_path, "me", keep=2), Run().steps(1)
    for step in (5, 10, 15):
        run.save(checkpoint, step)
    assert checkpoint.steps() == [10, 15]
    run.save(checkpoint, 20, drop_old=False)
    assert checkpoint.steps() == [10, 15, 20]
    checkpoint.drop_old(20)
    assert checkpoint.steps() == [15, 20]


def test_newer_checkpoints_are_deleted(tmp_path: Path) -> None:
    """After a return to an older checkpoint the unreadable newer one must not push good ones out."""
    checkpoint, run = Checkpoint(tmp_path, "me", keep=1), Run().steps(1)
    (tmp_path / "step-00000020.safetensors").write_bytes(b"torn")
    run.save(checkpoint, 15)
    assert checkpoint.steps() == [15]


def test_any_of_them_can_be_chosen(tmp_path: Path) -> None:
    checkpoint, run = Checkpoint(tmp_path, "me", keep=5), Run()
    for step in (1, 2, 3):
        run.steps(1, first=step - 1).save(checkpoint, step)
    found = Run()
    assert found.restore(checkpoint, 2) == 2
    assert found.others["counter"].tolist() == [2, 2]
    assert float(found.optimizer.state[found.weights["a"]]["step"]) == 2


def test_moments_are_no_view_of_the_file(tmp_path: Path) -> None:
    checkpoint, run = Checkpoint(tmp_path, "me"), Run().steps(2)
    run.save(checkpoint, 2)
    found = Run()
    found.restore(checkpoint)
    path = tmp_path / "step-00000002.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    for name, p in run.weights.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = run.optimizer.state[p][moment]
            assert torch.equal(found.optimizer.state[found.weights[name]][moment], expected)


def test_another_runs_checkpoint(tmp_path: Path, complains: Callable[..., Any]) -> None:
    Run().steps(1).save(Checkpoint(tmp_path, "me"), 1)
    with complains(ConfigError, "another run", "choose another output folder", at=str(tmp_path)):
        Run().restore(Checkpoint(tmp_path, "somebody else"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "a tensor is missing", "a bit"])
def test_unreadable(tmp_path: Path, complains: Callable[..., Any], damage: str) -> None:
    checkpoint = Checkpoint(tmp_path, "me")
    Run().steps(1).save(checkpoint, 1)
    path = tmp_path / "step-00000001.safetensors"
    data = path.read_bytes()
    if damage == "a tensor is missing":
        path.write_bytes(data.replace(b"exp_avg_sq.b", b"exp_avg_sq.c"))
    else:
        path.write_bytes(
            {
                "a bit": data[:-10] + bytes([data[-10] ^ 1]) + data[-9:],
                "truncated": data[:-10],
                "empty": b"",
                "noise": b"\xff" * 300,
            }[damage]
        )
    with complains(BadFile, "cannot be read", "from the one before", at="step-00000001"):
        Run().restore(checkpoint)


def test_a_full_disk_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    import safetensors.torch

    checkpoint, run = Checkpoint(tmp_path, "me"), Run().steps(1)
    run.save(checkpoint, 1)
    before = load_file(tmp_path / "step-00000001.safetensors")

    def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with complains(BadFile, "after step 2 cannot be written", "No space left", "goes on from step 1", at=str(tmp_path)):
        run.save(checkpoint, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    after = load_file(tmp_path / "step-00000001.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_files_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    mine = ("step-old.safetensors", "notes.txt", ".env.abcdefgh.yaml")
    for name in mine:
        (tmp_path / name).write_bytes(b"x")
    checkpoint = Checkpoint(tmp_path, "me")
    assert (checkpoint.steps(), checkpoint.owner()) == ([], None)
    checkpoint.begin()
    Run().steps(1).save(checkpoint, 1)
    assert checkpoint.owner() == "me"
    checkpoint.drop_all()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(mine)
    for name in mine:
        (tmp_path / name).unlink()
    checkpoint.begin()
    checkpoint.drop_all()
    assert not tmp_path.exists()
