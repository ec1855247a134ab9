"""What a trainer needs of activations, wherever they come from: shards on disk, or a model that runs meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["ActivationSource"]


@runtime_checkable
class ActivationSource(Protocol):
    """Activations of one model at one hook, as shuffled batches that can be taken up anywhere.

    Batch n of an epoch depends on the activations, the batch size, the seed and the epoch alone: not on where
    a run was stopped, nor on the number of processes. Every process of a run gets the same batches.
    """

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        ...

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm over `sample(20_000)`."""
        ...

    def identity(self) -> str:
        """SHA-256 of what decides the activations and their order: a checkpoint of another one does not fit."""
        ...

    def sample(self, n_tokens: int) -> Tensor:
        """The first `n_tokens` activations in text order, float32 `[n, d_in]`; fewer if there are fewer."""
        ...

    def n_batches(self, batch_size: int, *, seed: int, epoch: int) -> int | None:
        """How many batches `batches` gives; None where only the end of the text will tell."""
        ...

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """One pass over the activations, from batch number `start` on; what comes before costs next to nothing.

        Yields:
            float32 `[batch_size, d_in]`.
        """
        ...
