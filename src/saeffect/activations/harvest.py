"""Run a model over text up to one hook and keep what stands there, in shards on disk.

A harvest can be killed at any moment: whole shards stay, and the next run continues after the last one.
Every SAE of the same model trains from the same shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.activations.shards import save_shard, shard_name
from saeffect.errors import BadFile, ConfigError, Interrupted
from saeffect.models.hooks import capture, parse_hook
from saeffect.models.language_model import LanguageModel
from saeffect.provenance import fingerprint, read_json, write_json

__all__ = ["NormLimit", "TokenRows", "harvest", "kept_positions", "measure_norm_limit"]

# A typical residual varies by some 20 %; attention sinks are 40 times as long. Three keeps the two apart.
_OUTLIER_FACTOR = 3.0


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

    The first token is the attention sink of most models: its residual is some 40 times as long as the others
    and says nothing about the text.
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
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the activations of every kept position to shards under `out`.

    Args:
        lm: The model; activations are stored in its dtype.
        hook: TransformerLens name.
        rows: The text.
        out: Folder for `harvest.json` and the shards.
        rows_per_shard: Rows of text a shard.
        batch_size: Rows a forward pass.
        say: Receives a line of progress after each shard.

    Returns:
        `out`.

    Raises:
        ConfigError: The folder holds the harvest of something else.
        BadFile: The model gives NaN or infinite activations.
        Interrupted: Ctrl-C; whole shards stay.
    """
    out = Path(out)
    parse_hook(hook, lm.n_layers)
    made_by = {
        "model": lm.name,
        "model_identity": lm.identity,
        "hook": hook,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "text": rows.digest(),
        "rows_per_shard": rows_per_shard,
    }
    limit = _begin(lm, hook, rows, out, made_by=made_by, batch_size=batch_size)
    starts = range(0, len(rows), rows_per_shard)
    todo = [start for start in starts if not (out / shard_name(start // rows_per_shard)).is_file()]
    started = time.monotonic()
    try:
        for done, start in enumerate(todo, start=1):
            _shard(lm, hook, rows, out, slice(start, start + rows_per_shard), limit=limit, batch_size=batch_size)
            rate = done * rows_per_shard * rows.ids.shape[1] / (time.monotonic() - started)
            left = (len(todo) - done) * rows_per_shard * rows.ids.shape[1] / rate / 60
            whole = len(starts) - len(todo) + done
            say(f"harvest {whole}/{len(starts)} shards  {rate:,.0f} tokens/s  {left:.1f} min left")
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; whole shards stay in {out}.", fix="run the same command to go on.") from None
    return out


def _begin(
    lm: LanguageModel, hook: str, rows: TokenRows, out: Path, *, made_by: dict[str, object], batch_size: int
) -> NormLimit:
    """Read the note of an earlier, partial run, or write a new one."""
    note = out / "harvest.json"
    if note.is_file():
        found = read_json(note)
        if found["made_by"] != made_by:
            differs = [key for key in made_by if found["made_by"].get(key) != made_by[key]]
            raise ConfigError(
                f"this folder holds another harvest (it differs in {', '.join(differs)}).",
                at=str(out),
                fix="choose another folder, or delete this one.",
            )
        return NormLimit(**found["norm_limit"])
    limit = measure_norm_limit(capture(lm, hook, _ids(rows.ids[: 2 * batch_size])))
    if not np.isfinite(limit.median_norm):
        raise BadFile("the model's activations are not finite.", at=hook, fix="try dtype: float32.")
    write_json(out / "harvest.json", {"made_by": made_by, "norm_limit": vars(limit), "sources": list(rows.names)})
    return limit


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
        x = capture(lm, hook, _ids(ids[start : start + batch_size])).cpu()
        # Before the mask: NaN is no number below the limit, so it would be left out without a word.
        if not torch.isfinite(x).all():
            raise BadFile("the model's activations hold NaN or infinity.", at=hook, fix="try dtype: float32.")
        mask = kept_positions(x, limit)
        row, position = mask.nonzero(as_tuple=True)
        kept.append(x[mask])
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
