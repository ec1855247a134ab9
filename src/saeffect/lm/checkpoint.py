"""Checkpoints of a training run with Adam: safetensors files that are whole or absent, the last few of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saeffect.checksums import open_tensors, read_tensors, save_tensors
from saeffect.errors import BadFile, ConfigError, SaeffectError
from saeffect.io import read_json, remove_leftovers, write_json

__all__ = ["Checkpoint"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PATTERN = "step-*.safetensors"
_MARK = "run.json"


class Checkpoint:
    """Weights, Adam's moments, other tensors, and the number of finished steps.

    Args:
        folder: Where `step-00000500.safetensors` and so on go.
        made_by: Fingerprint of everything that decides the run; another run's checkpoint is refused.
        keep: How many of the newest stay.
    """

    def __init__(self, folder: Path, made_by: str, *, keep: int = 1) -> None:
        self.folder = folder
        self._made_by, self._keep = made_by, keep

    def owner(self) -> str | None:
        """Fingerprint of the run that marked this folder, or a checkpoint in it, as its own; None where no run did."""
        with contextlib.suppress(SaeffectError):
            mark = read_json(self.folder / _MARK)
            if isinstance(mark, dict) and isinstance(mark.get("made_by"), str):
                return str(mark["made_by"])
        for step in reversed(self.steps()):
            with contextlib.suppress(BadFile), open_tensors(self._file(step), "this checkpoint", fix="") as file:
                if made_by := (file.metadata() or {}).get("made_by"):
                    return str(made_by)
        return None

    def begin(self) -> None:
        """Mark the folder as this run's; clear away what a kill left half-written."""
        remove_leftovers(self.folder)
        if self.owner() != self._made_by:
            write_json(self.folder / _MARK, {"made_by": self._made_by})

    def steps(self) -> list[int]:
        """Numbers of finished steps that there is a checkpoint of, rising."""
        numbers = [path.stem.removeprefix("step-") for path in self.folder.glob(_PATTERN)]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        others: Mapping[str, Tensor] | None = None,
        *,
        drop_old: bool = True,
    ) -> None:
        """Keep the state after `step` steps, and drop the oldest if there are too many.

        Args:
            step: How many are finished.
            weights: By name.
            optimizer: Over the weights; it has made at least one step.
            others: Further tensors by name.
            drop_old: Whether to call `drop_old` afterwards. Runs that go on together from one step do that
                themselves, when all of them have saved it.

        Raises:
            BadFile: The disk is full, or cannot be written; older checkpoints stay.
        """
        tensors = {f"other.{name}": t for name, t in (others or {}).items()}
        for name, p in weights.items():
            tensors[f"weight.{name}"] = p.detach()
            tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in _MOMENTS}
        try:
            save_tensors(self._file(step), tensors, {"step": str(step), "made_by": self._made_by})
        except BadFile as error:
            last = self.steps()
            raise BadFile(
                f"the checkpoint after step {step:,} cannot be written: {error.message}",
                at=str(self.folder),
                fix=f"{error.fix}" + (f" It goes on from step {last[-1]:,}." if last else ""),
            ) from error
        if drop_old:
            self.drop_old(step)

    def drop_old(self, newest: int) -> None:
        """Keep as many as wanted up to step `newest`; later ones are left over from before a return to an older one."""
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-self._keep :]
        for step in set(steps) - set(kept):
            self._file(step).unlink(missing_ok=True)

    def drop_all(self) -> None:
        """Delete all checkpoints, and the folder unless it holds something else: the run is finished."""
        for step in self.steps():
            self._file(step).unlink(missing_ok=True)
        remove_leftovers(self.folder)
        (self.folder / _MARK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            self.folder.rmdir()

    def of_another_run(self) -> ConfigError:
        """The error for a folder that another run marked as its own."""
        return ConfigError(
            "this folder holds a checkpoint of another run: of another recipe, or of this one before model or text"
            " were exchanged.",
            at=str(self.folder),
            fix="delete it, or choose another output folder.",
        )

    def restore(
        self,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        others: Mapping[str, Tensor] | None = None,
        *,
        step: int | None = None,
    ) -> int:
        """Fill the tensors and the optimizer in place; the number of finished steps, 0 without a checkpoint.

        Args:
            weights: By name.
            optimizer: Over the weights.
            others: Further tensors by name.
            step: Which one; the newest by default, 0 for none.

        Raises:
            ConfigError: The checkpoint is another run's.
            BadFile: It cannot be read, or some bits in it have changed.
        """
        if step is None:
            step = max(self.steps(), default=0)
        if not step:
            return 0
        path = self._file(step)
        fix = "delete it; the run goes on from the one before, or starts anew if there is none."
        tensors, metadata = read_tensors(path, "this checkpoint", fix=fix)
        if metadata.get("made_by") != self._made_by:
            raise self.of_another_run()
        try:
            with torch.no_grad():
                for name, tensor in (others or {}).items():
                    tensor.copy_(tensors[f"other.{name}"])
                for name, p in weights.items():
                    p.copy_(tensors[f"weight.{name}"])
                    # Copies: what is read may be the file itself, mapped into memory.
                    moments = {key: torch.empty_like(p).copy_(tensors[f"{key}.{name}"]) for key in _MOMENTS}
                    optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
        except KeyError as error:
            raise BadFile(f"this checkpoint cannot be read: it has no {error}.", at=str(path), fix=fix) from error
        return step

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"
