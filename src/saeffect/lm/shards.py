"""Activation shards on disk: safetensors files that are whole or absent, read as shuffled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeffect.checksums import open_tensors, read_tensors, save_tensors
from saeffect.errors import BadFile, EmptySelection, NotFound
from saeffect.io import fingerprint, read_json
from saeffect.lm.pool import Pool, cut, read_ahead, shuffled

__all__ = ["NOTE", "SHARDS", "ActivationStore", "read_note", "read_shard", "save_shard", "shard_name"]

NOTE, SHARDS = "harvest.json", "shard-*.safetensors"

_MAKE_AGAIN = "delete it and harvest again; the others stay."


def shard_name(index: int) -> str:
    """File name of the shard with this index."""
    return f"shard-{index:05d}.safetensors"


def read_note(folder: Path) -> dict[str, Any]:
    """What `harvest.json` says.

    Raises:
        NotFound: There is none.
        BadFile: It is damaged.
    """
    if not (folder / NOTE).is_file():
        raise NotFound(f"there is no {NOTE} here.", at=str(folder), fix="run a harvest first.")
    note = read_json(folder / NOTE)
    if isinstance(note, dict) and isinstance(note.get("made_by"), dict):
        return note
    raise BadFile(
        f"{NOTE} is not what a harvest writes, so nothing says what made the shards.",
        at=str(folder / NOTE),
        fix="delete this folder and harvest again.",
    )


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard: all of it, or nothing.

    Raises:
        BadFile: It cannot be written, as when the disk is full.
    """
    save_tensors(path, tensors)


def read_shard(path: Path) -> dict[str, Tensor]:
    """Read one shard.

    Raises:
        BadFile: It is truncated, no safetensors file, or holds other bits than were written.
    """
    return read_tensors(path, "this shard", fix=_MAKE_AGAIN)[0]


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
            BadFile: It is damaged.
            EmptySelection: No shards.
        """
        folder = Path(folder)
        store = cls(folder, read_note(folder))
        if not store.shards():
            raise EmptySelection("the harvest has no shards.", at=str(folder))
        return store

    def shards(self) -> list[Path]:
        """Shard files in order."""
        return sorted(self.folder.glob(SHARDS))

    def lengths(self) -> list[int]:
        """Tokens in each shard, from the headers.

        Raises:
            BadFile: A shard is truncated or no safetensors file.
        """
        return [_shape(shard)[0] for shard in self.shards()]

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return _shape(self.shards()[0])[1]

    @cached_property
    def mean_norm(self) -> float:
        """Mean Euclidean norm over `sample(20_000)`."""
        return float(self.sample(20_000).norm(dim=1).mean())

    def identity(self) -> str:
        """SHA-256 of what made the harvest: model, hook, text, dtype."""
        return fingerprint(self.note["made_by"])

    def sample(self, n_tokens: int) -> Tensor:
        """The first `n_tokens` activations, float32 `[n, d_in]`; fewer if the store holds fewer."""
        found: list[Tensor] = []
        for shard in self.shards():
            found.append(read_shard(shard)["activations"].float())
            if sum(map(len, found)) >= n_tokens:
                break
        return torch.cat(found)[:n_tokens]

    def n_batches(self, batch_size: int, *, seed: int = 0, epoch: int = 0) -> int:  # noqa: ARG002 - the interface's
        """How many batches one pass gives: the same for every seed and epoch."""
        return sum(self.lengths()) // batch_size

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, pool_shards: int = 16
    ) -> Iterator[Tensor]:
        """One pass over all activations in a shuffled order that depends on (seed, epoch) alone.

        Shards are visited in a shuffled order, a pool of them at a time, and tokens are shuffled within the
        pool. A thread reads the next pool while one is used, so memory stays at two pools however long the
        text. Up to `batch_size - 1` tokens at the end are left out.

        Args:
            batch_size: Tokens a batch.
            seed: Decides the order, with `epoch`.
            epoch: Number of the pass.
            start: Number of the first batch; pools before it are not read.
            pool_shards: Shards a pool; decides the order too.

        Yields:
            float32 `[batch_size, d_in]`.

        Raises:
            BadFile: A shard is truncated or no safetensors file; the error names it.
        """
        shards, lengths = self.shards(), self.lengths()
        visits = np.random.default_rng([seed, epoch]).permutation(len(shards)).tolist()
        skip = start * batch_size
        makers: list[Callable[[], Pool]] = []
        for number, first in enumerate(range(0, len(visits), pool_shards)):
            members = visits[first : first + pool_shards]
            tokens = sum(lengths[i] for i in members)
            if not makers and skip >= tokens:
                skip -= tokens
            else:
                makers.append(partial(_pool, [shards[i] for i in members], tokens, (seed, epoch, number)))
        yield from cut(read_ahead(makers), batch_size, skip=skip)


def _shape(path: Path) -> tuple[int, int]:
    with open_tensors(path, "this shard", fix=_MAKE_AGAIN) as file:
        rows, width = file.get_slice("activations").get_shape()
    return int(rows), int(width)


def _pool(shards: list[Path], n_tokens: int, seeds: tuple[int, ...]) -> Pool:
    """Shards are copied one by one: joined at once they would take twice the memory."""
    first = read_shard(shards[0])["activations"]
    joined = torch.empty(n_tokens, first.shape[1], dtype=first.dtype)
    at = 0
    for shard in shards:
        part = read_shard(shard)["activations"]
        joined[at : at + len(part)] = part
        at += len(part)
    return shuffled(joined, *seeds)
