"""Run a model over text up to one hook and keep what stands there, in shards on disk.

A harvest can be killed at any moment: whole shards stay, and the next run continues after the last one.
Every SAE of the same model trains from the same shards.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, EmptySelection, Interrupted
from saeffect.io import SILENT, Log, check_disk_space, fingerprint, remove_leftovers, sole_writer, write_json
from saeffect.lm.fused import fused
from saeffect.lm.hooks import capture, parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.shards import NOTE, SHARDS, read_note, save_shard, shard_name
from saeffect.parallel import barrier, is_first, rank_and_world

__all__ = [
    "NormLimit",
    "TokenRows",
    "first_limit",
    "harvest",
    "harvest_bytes",
    "harvest_made_by",
    "kept_positions",
    "measure_norm_limit",
    "norm_limit_of",
    "refuse_unfit",
    "run_pass",
]

# A typical residual varies by some 20 %; attention sinks are 40 times as long. Three keeps the two apart.
_OUTLIER_FACTOR = 3.0
# Row, position and source of a token in a shard, int32 each.
_BYTES_OF_PLACE = 12


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Packed text.

    Attributes:
        ids: Token ids, int32 `[n_rows, context_size]`.
        sources: Index into `names` of each row's source, int64 `[n_rows]`.
        names: Names of the sources, such as ("general", "medical").
    """

    ids: NDArray[np.int32]
    sources: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def head(self, n_rows: int) -> TokenRows:
        """The first rows, as many as there are up to `n_rows`."""
        return TokenRows(self.ids[:n_rows], self.sources[:n_rows], self.names)

    @property
    def context_size(self) -> int:
        """Tokens a row."""
        return int(self.ids.shape[1])

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return len(self)

    def rows(self) -> Iterator[NDArray[np.int32]]:
        """One row after the other, so that activations can be streamed from these rows."""
        return iter(self.ids)

    def identity(self) -> str:
        """The same as `digest`."""
        return self.digest()

    def digest(self) -> str:
        """SHA-256 of ids and sources: two arms saw the same text if this is the same."""
        return fingerprint([self.ids.tobytes().hex(), self.sources.tolist(), self.names])


@dataclass(frozen=True)
class NormLimit:
    """Which positions count.

    Attributes:
        median_norm: Median Euclidean norm of the residuals at the hook.
        limit: Longer residuals are outliers (attention sinks) and are left out.
    """

    median_norm: float
    limit: float


def measure_norm_limit(activations: Tensor) -> NormLimit:
    """The norm above which a residual is an outlier: three times the median.

    Args:
        activations: `[..., d_model]`, any float dtype.
    """
    median = float(activations.float().norm(dim=-1).median())
    return NormLimit(median, _OUTLIER_FACTOR * median)


def kept_positions(activations: Tensor, limit: NormLimit) -> Tensor:
    """Bool `[batch, sequence]`: true where the residual is no outlier. The first position never counts.

    The first token, BOS where rows begin with one, is the attention sink of most models: its residual is some 40 times
    as long as the others and says nothing about the text.
    """
    kept = activations.float().norm(dim=-1) <= limit.limit
    kept[:, 0] = False
    return kept


def harvest(
    lm: LanguageModel,
    hook: str,
    rows: TokenRows,
    out: Path | str,
    *,
    rows_per_shard: int = 128,
    batch_size: int = 8,
    max_bytes: int | None = None,
    log: Log = SILENT,
) -> Path:
    """Write the activations of every kept position to shards under `out`.

    Under `torchrun` each process writes its share of the shards; the files are those of one process.

    Args:
        lm: The model; activations are stored in its dtype.
        hook: TransformerLens name.
        rows: The text, the same in every process.
        out: Folder for `harvest.json` and the shards; one that all processes share.
        rows_per_shard: Rows of text a shard.
        batch_size: Rows a forward pass.
        max_bytes: The most that the folder may hold, in bytes; None for what the disk has.
        log: Receives a line of progress after each shard.

    Returns:
        `out`, once all shards are there.

    Raises:
        ConfigError: The folder holds the harvest of something else; the shards would not fit; the model has no
            such hook, or no such positions or tokens.
        EmptySelection: No rows.
        BadFile: The model gives NaN or infinite activations, or a shard cannot be written; whole shards stay. Or
            `harvest.json` is damaged.
        InUse: Another process harvests into this folder.
        Interrupted: Ctrl-C; whole shards stay.
    """
    out = Path(out)
    refuse_unfit(lm, hook, rows)
    made_by = harvest_made_by(lm, hook, rows, rows_per_shard)
    rank, world = rank_and_world()
    starts = range(0, len(rows), rows_per_shard)
    with contextlib.ExitStack() as stack:
        if is_first() and (_missing(out, starts) or not (out / NOTE).is_file()):
            stack.enter_context(sole_writer(out))
            remove_leftovers(out)
        limit = _begin(lm, hook, rows, out, made_by=made_by, batch_size=batch_size, max_bytes=max_bytes)
        missing = _missing(out, starts)
        todo = [start for start in missing if start // rows_per_shard % world == rank]
        began = time.monotonic()
        try:
            with fused(lm):
                for done, start in enumerate(todo, start=1):
                    span = slice(start, start + rows_per_shard)
                    _shard(lm, hook, rows, out, span, limit=limit, batch_size=batch_size)
                    all_done = min(done * world, len(missing))
                    pace = all_done / (time.monotonic() - began)
                    log(
                        f"harvest {len(starts) - len(missing) + all_done}/{len(starts)} shards"
                        f"  {pace * rows_per_shard * rows.context_size:,.0f} tokens/s"
                        f"  {(len(missing) - all_done) / pace / 60:.1f} min left"
                    )
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; whole shards stay in {out}.", fix="run the same command to go on.") from None
        barrier()
    return out


def harvest_made_by(lm: LanguageModel, hook: str, rows: TokenRows, rows_per_shard: int = 128) -> dict[str, object]:
    """What decides the activations of a harvest; its fingerprint is the store's identity."""
    return {
        "model": lm.name,
        "model_identity": lm.identity,
        "hook": hook,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "text": rows.digest(),
        "rows_per_shard": rows_per_shard,
        # What was harvested before this was known had none, and stays valid.
        **({} if lm.bos_id is None else {"bos": lm.bos_id}),
    }


def harvest_bytes(lm: LanguageModel, rows: TokenRows) -> int:
    """The most that the shards of these rows can take, in bytes: the first position of a row is never kept."""
    return len(rows) * (rows.context_size - 1) * (lm.d_model * lm.dtype.itemsize + _BYTES_OF_PLACE)


def refuse_unfit(lm: LanguageModel, hook: str, rows: TokenRows) -> None:
    """Refuse what cannot be harvested, before anything heavy starts.

    Raises:
        ConfigError: The model has no such hook, no such token ids, or fewer positions than a row; a row has fewer
            than two tokens (the first never counts); or rows lack the BOS token that this model's texts begin with.
        EmptySelection: No rows.
    """
    parse_hook(hook, lm.n_layers)
    if not rows.ids.size:
        raise EmptySelection("there are no rows of text to harvest.", fix="give more text.")
    if rows.context_size < 2:
        raise ConfigError(
            f"rows have {rows.context_size} token; expected at least 2.", at="context_size", fix="use longer rows."
        )
    lm.refuse_rows(rows.ids)
    if lm.bos_id is not None and (rows.ids[:, 0] != lm.bos_id).any():
        raise ConfigError(
            f"texts of {lm.name} begin with the token {lm.bos_id} (BOS), but not every row does.",
            at="bos",
            fix="make the rows with LanguageModel.pack, or open the model with prepend_bos=False.",
        )


def run_pass(lm: LanguageModel, hook: str, ids: NDArray[np.int32], limit: NormLimit) -> tuple[Tensor, Tensor]:
    """One forward pass.

    Args:
        lm: The model.
        hook: TransformerLens name.
        ids: Token ids, int32 `[n_rows, context_size]`.
        limit: Which positions count.

    Returns:
        The kept activations in text order `[n_kept, d_model]`, in the model's dtype, on the CPU; and which
        positions those are, bool `[n_rows, context_size]`.

    Raises:
        BadFile: The model gives NaN or infinity.
    """
    x = capture(lm, hook, _ids(ids)).cpu()
    # Before the mask: NaN is no number below the limit, so it would be left out without a word.
    if not torch.isfinite(x).all():
        raise BadFile("the model's activations hold NaN or infinity.", at=hook, fix="try dtype: float32.")
    mask = kept_positions(x, limit)
    return x[mask], mask


def first_limit(lm: LanguageModel, hook: str, ids: NDArray[np.int32]) -> NormLimit:
    """The norm limit, measured on these rows; a BOS in front does not count.

    Raises:
        BadFile: The model gives NaN or infinity.
    """
    limit = measure_norm_limit(capture(lm, hook, _ids(ids))[:, lm.n_bos(ids[0]) :])
    if not np.isfinite(limit.median_norm):
        raise BadFile("the model's activations are not finite.", at=hook, fix="try dtype: float32.")
    return limit


def _begin(
    lm: LanguageModel,
    hook: str,
    rows: TokenRows,
    out: Path,
    *,
    made_by: dict[str, object],
    batch_size: int,
    max_bytes: int | None,
) -> NormLimit:
    """Read the note of an earlier, partial run, or write a new one; the first process does, the others wait."""
    note = out / NOTE
    if is_first():
        if note.is_file():
            _refuse_another(read_note(out), made_by, out)
        elif any(out.glob(SHARDS)):
            raise ConfigError(
                f"this folder holds shards, but no {NOTE} says of what.",
                at=str(out),
                fix="choose another folder, or delete this one.",
            )
        check_disk_space(out, harvest_bytes(lm, rows), max_bytes)
        if not note.is_file():
            limit = first_limit(lm, hook, rows.ids[: 2 * batch_size])
            write_json(note, {"made_by": made_by, "norm_limit": vars(limit), "sources": list(rows.names)})
    barrier()
    found = read_note(out)
    _refuse_another(found, made_by, out)
    return norm_limit_of(found, at=str(note))


def norm_limit_of(note: Mapping[str, Any], *, at: str) -> NormLimit:
    """Which positions a harvest kept, by its note.

    Raises:
        BadFile: The note does not say it.
    """
    found: Any = note.get("norm_limit")
    try:
        limit = NormLimit(**{name: float(value) for name, value in found.items()})
    except (AttributeError, TypeError, ValueError, OverflowError):
        limit = NormLimit(math.nan, math.nan)
    if not (math.isfinite(limit.median_norm) and math.isfinite(limit.limit)):
        raise BadFile(
            f"norm_limit is {found!r}; expected two finite numbers, median_norm and limit.",
            at=at,
            fix="delete the folder and harvest again.",
        )
    return limit


def _missing(out: Path, starts: range) -> list[int]:
    """First rows of the shards that are not there."""
    return [start for start in starts if not (out / shard_name(start // starts.step)).is_file()]


def _refuse_another(found: Mapping[str, Any], made_by: dict[str, object], out: Path) -> None:
    if found["made_by"] != made_by:
        differs = [key for key in made_by if found["made_by"].get(key) != made_by[key]]
        raise ConfigError(
            f"this folder holds another harvest (it differs in {', '.join(differs)}).",
            at=str(out),
            fix="choose another folder, or delete this one.",
        )


def _shard(
    lm: LanguageModel,
    hook: str,
    rows: TokenRows,
    out: Path,
    span: slice,
    *,
    limit: NormLimit,
    batch_size: int,
) -> None:
    ids, sources = rows.ids[span], rows.sources[span]
    kept: list[Tensor] = []
    row_of: list[Tensor] = []
    position_of: list[Tensor] = []
    for start in range(0, len(ids), batch_size):
        activations, mask = run_pass(lm, hook, ids[start : start + batch_size], limit)
        row, position = mask.nonzero(as_tuple=True)
        kept.append(activations)
        row_of.append(row + start + span.start)
        position_of.append(position)
    row = torch.cat(row_of)
    save_shard(
        out / shard_name(span.start // (span.stop - span.start)),
        {
            "activations": torch.cat(kept),
            "row": row.to(torch.int32),
            "position": torch.cat(position_of).to(torch.int32),
            "source": torch.from_numpy(sources)[row - span.start].to(torch.int32),
        },
    )


def _ids(ids: NDArray[np.int32] | Sequence[Sequence[int]]) -> Tensor:
    return torch.from_numpy(np.asarray(ids, dtype=np.int64))
