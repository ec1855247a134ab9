"""Checkpoints of a training run with Adam: safetensors files that are whole or absent, the last few of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError
from saeffect.provenance import atomic_path

__all__ = ["Checkpoint"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PATTERN = "step-*.safetensors"


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
        from safetensors.torch import save_file

        tensors = {f"other.{name}": t for name, t in (others or {}).items()}
        for name, p in weights.items():
            tensors[f"weight.{name}"] = p.detach()
            tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in _MOMENTS}
        try:
            with atomic_path(self._file(step)) as temporary:
                save_file(
                    {name: t.contiguous() for name, t in tensors.items()},
                    temporary,
                    metadata={"step": str(step), "made_by": self._made_by},
                )
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
        """Delete the folder: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

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
            BadFile: It cannot be read; some tensors may be filled already.
        """
        from safetensors import SafetensorError, safe_open

        if step is None:
            step = max(self.steps(), default=0)
        if not step:
            return 0
        path = self._file(step)
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                if (file.metadata() or {}).get("made_by") != self._made_by:
                    raise ConfigError(
                        "this folder holds a checkpoint of another run.",
                        at=str(self.folder),
                        fix="delete it, or choose another output folder.",
                    )
                for name, tensor in (others or {}).items():
                    tensor.copy_(file.get_tensor(f"other.{name}"))
                for name, p in weights.items():
                    p.copy_(file.get_tensor(f"weight.{name}"))
                    # Copies: what get_tensor gives may be the file itself, mapped into memory.
                    moments = {key: torch.empty_like(p).copy_(file.get_tensor(f"{key}.{name}")) for key in _MOMENTS}
                    optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
        except (SafetensorError, OSError) as error:
            raise BadFile(
                f"the checkpoint cannot be read: {error}.",
                at=str(path),
                fix="delete it; the run goes on from the one before, or starts anew if there is none.",
            ) from error
        return step

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"
