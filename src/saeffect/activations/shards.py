"""Activation shards on disk: safetensors files that are whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeffect.errors import BadFile, EmptySelection, NotFound
from saeffect.provenance import atomic_path, read_json

__all__ = ["ActivationStore", "read_shard", "save_shard", "shard_name"]


def shard_name(index: int) -> str:
    """File name of the shard with this index."""
    return f"shard-{index:05d}.safetensors"


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard atomically."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)


def read_shard(path: Path) -> dict[str, Tensor]:
    """Read one shard.

    Raises:
        BadFile: It is truncated or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadFile(
            f"this shard cannot be read: {error}.",
            at=str(path),
            fix="delete it and harvest again; the others stay.",
        ) from error


@dataclass(frozen=True)
class ActivationStore:
    """A folder of shards, read as shuffled batches.

    Attributes:
        folder: Where `harvest.json` and the shards lie.
        note: What `harvest.json` says: who made it, the norm limit, names of sources.
    """

    folder: Path
    note: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """Open a harvest.

        Raises:
            NotFound: No `harvest.json`.
            EmptySelection: No shards.
        """
        folder = Path(folder)
        if not (folder / "harvest.json").is_file():
            raise NotFound("there is no harvest.json here.", at=str(folder), fix="run a harvest first.")
        store = cls(folder, read_json(folder / "harvest.json"))
        if not store.shards():
            raise EmptySelection("the harvest has no shards.", at=str(folder))
        return store

    def shards(self) -> list[Path]:
        """Shard files in order."""
        return sorted(self.folder.glob("shard-*.safetensors"))

    def sample(self, n_tokens: int) -> Tensor:
        """The first `n_tokens` activations, float32 `[n, d_in]`; fewer if the store holds fewer."""
        found: list[Tensor] = []
        for shard in self.shards():
            found.append(read_shard(shard)["activations"].float())
            if sum(map(len, found)) >= n_tokens:
                break
        return torch.cat(found)[:n_tokens]

    def batches(self, batch_size: int, *, seed: int, epoch: int, pool_shards: int = 48) -> Iterator[Tensor]:
        """One pass over all activations in a shuffled order that depends on (seed, epoch) alone.

        Shards are visited in a shuffled order, a pool of them at a time, and tokens are shuffled within the
        pool, so memory stays at `pool_shards` shards however long the text. Up to `batch_size - 1` tokens
        a pool are left out.

        Yields:
            float32 `[batch_size, d_in]`.
        """
        generator = np.random.default_rng([seed, epoch])
        shards = self.shards()
        order = generator.permutation(len(shards))
        for start in range(0, len(order), pool_shards):
            pool = torch.cat([read_shard(shards[i])["activations"] for i in order[start : start + pool_shards]])
            shuffled = torch.from_numpy(generator.permutation(len(pool)))
            for at in range(0, len(pool) - batch_size + 1, batch_size):
                yield pool[shuffled[at : at + batch_size]].float()
