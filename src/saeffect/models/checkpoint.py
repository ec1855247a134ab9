"""Checkpoints of a training run with Adam: one safetensors file that is whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError
from saeffect.provenance import atomic_path

__all__ = ["Checkpoint"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpoint:
    """Weights, Adam's moments, other tensors, and the number of finished steps.

    Args:
        folder: Where `state.safetensors` goes.
        made_by: Fingerprint of everything that decides the run; another run's checkpoint is refused.
    """

    def __init__(self, folder: Path, made_by: str) -> None:
        self.folder = folder
        self._file = folder / "state.safetensors"
        self._made_by = made_by

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Replace the checkpoint by the state after `step` steps."""
        from safetensors.torch import save_file

        tensors = {f"other.{name}": t for name, t in (others or {}).items()}
        for name, p in weights.items():
            tensors[f"weight.{name}"] = p.detach()
            tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in _MOMENTS}
        with atomic_path(self._file) as temporary:
            save_file(
                {name: t.contiguous() for name, t in tensors.items()},
                temporary,
                metadata={"step": str(step), "made_by": self._made_by},
            )

    def restore(
        self,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        others: Mapping[str, Tensor] | None = None,
    ) -> int:
        """Fill the tensors and the optimizer in place; the number of finished steps, 0 without a checkpoint.

        Raises:
            ConfigError: The checkpoint is another run's.
            BadFile: It cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        if not self._file.is_file():
            return 0
        try:
            with safe_open(self._file, framework="pt") as file, torch.no_grad():
                note = file.metadata()
                if note["made_by"] != self._made_by:
                    raise ConfigError(
                        "this folder holds a checkpoint of another run.",
                        at=str(self.folder),
                        fix="delete it, or choose another output folder.",
                    )
                step = int(note["step"])
                for name, tensor in (others or {}).items():
                    tensor.copy_(file.get_tensor(f"other.{name}"))
                for name, p in weights.items():
                    p.copy_(file.get_tensor(f"weight.{name}"))
                    moments = {key: file.get_tensor(f"{key}.{name}") for key in _MOMENTS}
                    optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
        except SafetensorError as error:
            raise BadFile(
                f"the checkpoint cannot be read: {error}.", at=str(self._file), fix="delete it to start over."
            ) from error
        return step
