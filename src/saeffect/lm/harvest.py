"""Run a model over text up to a hook, write the activations to shards on disk, and read them back as batches."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeffect.checksums import open_tensors, read_tensors, save_tensors
from saeffect.errors import BadFile, ConfigError, EmptySelection, NotFound
from saeffect.io import fingerprint, read_json, remove_leftovers, sole_writer, write_json
from saeffect.lm.activations import (
    ActivationSource,
    NormLimit,
    Pool,
    TokenRows,
    check_rows,
    cut_batches,
    first_limit,
    read_ahead,
    run_pass,
    shuffled,
)
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.parallel import barrier, is_first, rank_and_world, stopping
from saeffect.progress import SILENT, Log

__all__ = [
    "ActivationStore",
    "ShardSource",
    "check_disk_space",
    "harvest",
    "harvest_bytes",
    "harvest_made_by",
    "read_shard",
    "shard_name",
    "shard_places",
]

_NOTE, _SHARDS = "harvest.json", "shard-*.safetensors"
_MAKE_AGAIN = "delete it and harvest again; the others stay."
_ANOTHER_FOLDER = "choose another folder, or delete this one."
# Row, position and source of a token in a shard, int32 each
_BYTES_OF_PLACE = 12


def harvest(
    lm: LanguageModel,
    hook: str,
    rows: TokenRows,
    out: Path | str,
    *,
    rows_per_shard: int = 128,
    batch_size: int = 8,
    log: Log = SILENT,
) -> ActivationStore:
    """Write the activations of every kept position to shards under `out`, in the model's dtype.

    A killed harvest continues after its last whole shard. Under `torchrun` each process writes its share of the shards
    (the files are the same as those of one process); `rows` and `out` must then be the same in every process. A shard
    has `rows_per_shard` rows of text, a forward pass `batch_size`.

    ConfigError: as `check_rows`; the folder holds another harvest; or the disk is too small. EmptySelection: no rows.
    BadFile: a shard cannot be written, or `harvest.json` is damaged. InUse: another process harvests into this folder.
    Interrupted: Ctrl-C; whole shards stay.
    """
    out = Path(out)
    check_rows(lm, hook, rows)
    rank, world = rank_and_world()
    starts = range(0, len(rows), rows_per_shard)
    with contextlib.ExitStack() as stack:
        if is_first() and (_missing_starts(out, starts) or not (out / _NOTE).is_file()):
            stack.enter_context(sole_writer(out))
            remove_leftovers(out)
        limit = _prepare_folder(lm, hook, rows, out, harvest_made_by(lm, hook, rows, rows_per_shard), batch_size)
        missing = _missing_starts(out, starts)
        todo = [start for start in missing if start // rows_per_shard % world == rank]
        started = time.monotonic()
        with stopping(f"whole shards stay in {out}"), fused(lm):
            for done, start in enumerate(todo, start=1):
                passes = range(start, min(start + rows_per_shard, len(rows)), batch_size)
                save_tensors(out / shard_name(start // rows_per_shard), _make_shard(lm, hook, rows, passes, limit))
                all_done = min(done * world, len(missing))
                pace = all_done / (time.monotonic() - started)
                log(
                    f"harvest {len(starts) - len(missing) + all_done}/{len(starts)} shards"
                    f"  {pace * rows_per_shard * rows.context_size:,.0f} tokens/s"
                    f"  {(len(missing) - all_done) / pace / 60:.1f} min left"
                )
        barrier()
    return ActivationStore.open(out)


def harvest_made_by(lm: LanguageModel, hook: str, rows: TokenRows, rows_per_shard: int = 128) -> dict[str, object]:
    """What decides the activations of a harvest; its fingerprint is the store's `identity`."""
    return {
        "model": lm.name,
        "model_identity": lm.identity,
        "hook": hook,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "text": rows.identity(),
        "rows_per_shard": rows_per_shard,
        **({} if lm.bos_id is None else {"bos": lm.bos_id}),
    }


def harvest_bytes(lm: LanguageModel, rows: TokenRows) -> int:
    """The most that the shards of these rows can take, in bytes."""
    n_tokens = len(rows) * (rows.context_size - 1) if rows.counts is None else int(rows.counts[:, 1:].sum())
    return n_tokens * (lm.d_model * lm.dtype.itemsize + _BYTES_OF_PLACE)


def check_disk_space(folder: Path, expected: int, cap: int | None = None) -> None:
    """ConfigError if shards of `expected` bytes in all exceed the cap, or those not yet there the free disk space."""
    if cap is not None and expected > cap:
        raise ConfigError(
            f"the activations take {_size(expected)}; the cap is {_size(cap)}.",
            at="max_disk_gb",
            fix="raise the cap, harvest fewer tokens, or stream the activations instead.",
        )
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    missing = expected - sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if missing > free:
        raise ConfigError(
            f"the activations take {_size(missing)} more; the disk has {_size(free)} free.",
            at=str(folder),
            fix="make room, harvest fewer tokens, or stream the activations instead.",
        )


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def read_shard(path: Path) -> dict[str, Tensor]:
    """A shard's `activations` `[n, d_in]`, and `row`, `position`, `source` of each, int32 `[n]`. BadFile: damaged."""
    return read_tensors(path, "this shard", fix=_MAKE_AGAIN)[0]


def shard_places(path: Path) -> Tensor:
    """Positions in the text of a shard's tokens, row · 2³² + position, int64 `[n]`, ascending. BadFile: damaged."""
    with open_tensors(path, "this shard", fix=_MAKE_AGAIN) as tensors:
        row, position = (tensors.get_tensor(name).long() for name in ("row", "position"))
    return row * 2**32 + position


class ShardSource(ActivationSource):
    """Activations in shards, each small enough for memory."""

    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Tokens of each shard."""

    @abstractmethod
    def shard(self, index: int) -> Tensor:
        """The activations of a shard in text order, `[n, d_in]` of any float dtype; BadFile if it is damaged."""

    def sample(self, n_tokens: int) -> Tensor:
        parts: list[Tensor] = []
        for index in range(len(self.lengths())):
            parts.append(self.shard(index).float())
            if sum(map(len, parts)) >= n_tokens:
                break
        return torch.cat(parts)[:n_tokens]

    def n_batches(self, batch_size: int) -> int:
        return sum(self.lengths()) // batch_size

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, pool_shards: int = 16
    ) -> Iterator[Tensor]:
        """See `ActivationSource`; BadFile for a damaged shard. Shards are shuffled, then tokens within pools of
        `pool_shards` shards. Two pools are in memory at a time.
        """
        lengths = self.lengths()
        visits = np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist()
        skip = start * batch_size
        makers: list[Callable[[], Pool]] = []
        for number, first in enumerate(range(0, len(visits), pool_shards)):
            members = visits[first : first + pool_shards]
            tokens = sum(lengths[i] for i in members)
            if not makers and skip >= tokens:  # skipped without reading
                skip -= tokens
            else:
                makers.append(partial(_make_pool, self.shard, members, tokens, (seed, epoch, number)))
        yield from cut_batches(read_ahead(makers), batch_size, skip=skip)


@dataclass(frozen=True)
class ActivationStore(ShardSource):
    """A folder of shards, read as shuffled batches; `note` holds its harvest.json."""

    folder: Path
    note: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """Open a harvest. NotFound without `harvest.json`, BadFile if it is damaged, EmptySelection without shards."""
        folder = Path(folder)
        store = cls(folder, _read_note(folder))
        if not store.shards():
            raise EmptySelection("the harvest has no shards.", at=str(folder))
        return store

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob(_SHARDS))

    @property
    def d_in(self) -> int:
        return _shard_shape(self.shards()[0])[1]

    def norm_limit(self) -> NormLimit:
        """The norm limit of kept positions; BadFile if the note lacks it."""
        stored: Any = self.note.get("norm_limit")
        with contextlib.suppress(KeyError, TypeError, ValueError):
            limit = NormLimit(float(stored["median_norm"]), float(stored["limit"]))
            if math.isfinite(limit.median_norm) and math.isfinite(limit.limit):
                return limit
        raise BadFile(
            f"norm_limit is {stored!r}; expected two finite numbers, median_norm and limit.",
            at=str(self.folder / _NOTE),
            fix="delete the folder and harvest again.",
        )

    def identity(self) -> str:
        return fingerprint(self.note["made_by"])

    def lengths(self) -> Sequence[int]:
        return [_shard_shape(shard)[0] for shard in self.shards()]

    def shard(self, index: int) -> Tensor:
        return read_shard(self.shards()[index])["activations"]


def _prepare_folder(
    lm: LanguageModel, hook: str, rows: TokenRows, out: Path, made_by: Mapping[str, object], batch_size: int
) -> NormLimit:
    """Check the note of an earlier, partial run, or write a new one, in the first process while the others wait; then
    the norm limit in it.
    """
    if is_first():
        if (out / _NOTE).is_file():
            _refuse_other_harvest(_read_note(out), made_by, out)
        elif any(out.glob(_SHARDS)):
            raise ConfigError(
                f"this folder holds shards, but no {_NOTE} says of what.", at=str(out), fix=_ANOTHER_FOLDER
            )
        check_disk_space(out, harvest_bytes(lm, rows))
        if not (out / _NOTE).is_file():
            limit = first_limit(lm, hook, rows.ids[: 2 * batch_size])
            write_json(out / _NOTE, {"made_by": made_by, "norm_limit": vars(limit), "sources": list(rows.names)})
    barrier()
    store = ActivationStore(out, _read_note(out))
    _refuse_other_harvest(store.note, made_by, out)
    return store.norm_limit()


def _refuse_other_harvest(note: Mapping[str, Any], made_by: Mapping[str, object], out: Path) -> None:
    changed = [key for key in made_by.keys() | note["made_by"].keys() if note["made_by"].get(key) != made_by.get(key)]
    if changed:
        raise ConfigError(
            f"this folder holds another harvest (it differs in {', '.join(sorted(changed))}).",
            at=str(out),
            fix=_ANOTHER_FOLDER,
        )


def _read_note(folder: Path) -> dict[str, Any]:
    if not (folder / _NOTE).is_file():
        raise NotFound(f"there is no {_NOTE} here.", at=str(folder), fix="run a harvest first.")
    note = read_json(folder / _NOTE)
    if isinstance(note, dict) and isinstance(note.get("made_by"), dict):
        return note
    raise BadFile(
        f"{_NOTE} is not what a harvest writes, so nothing says what made the shards.",
        at=str(folder / _NOTE),
        fix="delete this folder and harvest again.",
    )


def _missing_starts(out: Path, starts: range) -> list[int]:
    return [start for start in starts if not (out / shard_name(start // starts.step)).is_file()]


def _make_shard(lm: LanguageModel, hook: str, rows: TokenRows, starts: range, limit: NormLimit) -> dict[str, Tensor]:
    activations_kept, row, position = [], [], []
    for start in starts:
        stop = min(start + starts.step, starts.stop)
        counts = rows.counts_of(start, stop - start)
        activations, mask = run_pass(lm, hook, rows.ids[start:stop], limit, counts)
        row_of_pass, position_of_pass = mask.nonzero(as_tuple=True)
        activations_kept.append(activations)
        row.append(row_of_pass + start)
        position.append(position_of_pass)
    rows_kept = torch.cat(row)
    return {
        "activations": torch.cat(activations_kept),
        "row": rows_kept.to(torch.int32),
        "position": torch.cat(position).to(torch.int32),
        "source": torch.from_numpy(rows.sources)[rows_kept].to(torch.int32),
    }


def _shard_shape(path: Path) -> tuple[int, ...]:
    with open_tensors(path, "this shard", fix=_MAKE_AGAIN) as tensors:
        return tuple(tensors.get_slice("activations").get_shape())


def _make_pool(read: Callable[[int], Tensor], members: Sequence[int], n_tokens: int, seeds: tuple[int, ...]) -> Pool:
    """A pool of shards, copied one by one, since concatenating them would take twice the memory."""
    part = read(members[0])
    joined = torch.empty(n_tokens, part.shape[1], dtype=part.dtype)
    position = 0
    for index in members:
        part = read(index)
        joined[position : position + len(part)] = part
        position += len(part)
    return shuffled(joined, *seeds)


def _size(n_bytes: int) -> str:
    """A number of bytes for people.

    Example:
        >>> _size(1_530_000_000), _size(40_000_000), _size(9_800)
        ('1.53 GB', '40 MB', '9,800 bytes')
    """
    if n_bytes >= 10**9:
        return f"{n_bytes / 1e9:,.2f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 10**7 else f"{n_bytes:,} bytes"
