"""Activations at a hook: rows of text, which positions count, one pass, and batches straight from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.errors import ConfigError, EmptySelection
from saeffect.io import fingerprint
from saeffect.lm.architectures import hook_width
from saeffect.lm.chat_rows import Row, counted
from saeffect.lm.corpora import StreamedText
from saeffect.lm.hooks import capture, parse_hook
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.parallel import device_of_process, from_all, gathered, rank_and_world

__all__ = [
    "ActivationSource",
    "NormLimit",
    "Pool",
    "StreamedActivations",
    "TokenRows",
    "check_rows",
    "cut_batches",
    "first_limit",
    "kept_positions",
    "measure_norm_limit",
    "read_ahead",
    "run_pass",
    "shuffled",
]

# Residual norms vary by some 20 %; those of attention sinks are 40 times as long. A factor of three separates them.
_OUTLIER_FACTOR = 3.0
# Share of a pool's tokens (without each row's first) that is used. The rest allows for norm outliers: with a fixed
# number of tokens a pool, the position of batch n is known without running the model.
_USED_SHARE = 0.99


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Packed text in memory.

    Attributes:
        ids: Token ids, int32 `[n_rows, context_size]`.
        sources: Index into `names`, such as ("general", "medical"), of each row's source, int64 `[n_rows]`.
        counts: Bool `[n_rows, context_size]`, the tokens on which activations count, such as an assistant's; None: all.
    """

    ids: NDArray[np.int32]
    sources: NDArray[np.int64]
    names: tuple[str, ...]
    counts: NDArray[np.bool_] | None = None

    @classmethod
    def from_rows(
        cls, rows: Sequence[Row], sources: Sequence[int], names: tuple[str, ...], positions: Sequence[str] = ("all",)
    ) -> TokenRows:
        """Rows as `cut_rows` makes them; EmptySelection if none of their tokens is at `positions`."""
        ids = np.stack([row.ids for row in rows])
        return cls(ids, np.asarray(sources, dtype=np.int64), names, counted(rows, positions))

    def __len__(self) -> int:
        return len(self.ids)

    def head(self, n_rows: int) -> TokenRows:
        """The first `n_rows` rows, or all if there are fewer."""
        return self.part(slice(n_rows))

    def part(self, rows: slice | NDArray[np.integer[Any]], width: int | None = None) -> TokenRows:
        """Some of the rows, each cut to its first `width` tokens."""
        ids = np.ascontiguousarray(self.ids[rows, :width])
        counts = None if self.counts is None else np.ascontiguousarray(self.counts[rows, :width])
        return TokenRows(ids, self.sources[rows], self.names, counts)

    def counts_of(self, start: int, n: int) -> Tensor | None:
        """Which tokens of `n` rows from `start` on count, bool `[n, context_size]`; None if all do."""
        return None if self.counts is None else torch.from_numpy(self.counts[start : start + n])

    @property
    def context_size(self) -> int:
        return int(self.ids.shape[1])

    @property
    def n_rows(self) -> int:
        """`len`; with `rows()` it lets activations be streamed from these rows as from a `StreamedText`."""
        return len(self)

    def rows(self) -> Iterator[NDArray[np.int32]]:
        return iter(self.ids)

    def identity(self) -> str:
        """SHA-256 of ids and sources: two arms saw the same text if this is the same."""
        counts = [] if self.counts is None else [self.counts.tobytes().hex()]
        return fingerprint([self.ids.tobytes().hex(), self.sources.tolist(), self.names, *counts])


@runtime_checkable
class ActivationSource(Protocol):
    """Activations of one model at one hook, from shards or from a running model, as batches in a random order.

    Batch n of an epoch depends on the activations, batch size, seed and epoch alone, and every process gets the same
    ones.
    """

    @property
    def d_in(self) -> int: ...

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm over `sample(20_000)`."""
        return float(self.sample(20_000).norm(dim=1).mean())

    def identity(self) -> str:
        """SHA-256 of what decides the activations and their order; checkpoints made with another one are refused."""

    def sample(self, n_tokens: int) -> Tensor:
        """The first `n_tokens` activations in text order, float32 `[n, d_in]`; fewer if there are fewer."""

    def n_batches(self, batch_size: int) -> int | None:
        """Batches an epoch; None if unknown before the text ends."""

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """One epoch from batch `start` on, float32 `[batch_size, d_in]`; a short last batch is dropped. Skipping is
        cheap.
        """


@dataclass(frozen=True)
class NormLimit:
    """The largest residual norm of a position that counts; longer residuals are attention sinks."""

    median_norm: float
    limit: float


def measure_norm_limit(activations: Tensor) -> NormLimit:
    """Three times the median norm of activations `[..., d_model]` of any float dtype."""
    median = float(activations.float().norm(dim=-1).median())
    return NormLimit(median, _OUTLIER_FACTOR * median)


def first_limit(lm: LanguageModel, hook: str, ids: NDArray[np.int32]) -> NormLimit:
    """The norm limit measured on rows `[n_rows, context_size]`; a BOS in front does not count."""
    return measure_norm_limit(capture(lm, hook, torch.from_numpy(ids.astype(np.int64)))[:, lm.n_bos(ids[0]) :])


def kept_positions(activations: Tensor, limit: NormLimit, counts: Tensor | None = None) -> Tensor:
    """Bool `[batch, sequence]`: the positions whose residual is no outlier and that `counts`; never the first one,
    usually an attention sink.
    """
    mask = activations.float().norm(dim=-1) <= limit.limit
    mask[:, 0] = False
    return mask if counts is None else mask & counts.to(mask.device)


def check_rows(lm: LanguageModel, hook: str, rows: TokenRows) -> None:
    """Refuse rows that cannot be harvested: EmptySelection if there are none; ConfigError if the model lacks the hook
    or a token id, or for rows longer than its context, shorter than two tokens, or without its BOS token.
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


def run_pass(
    lm: LanguageModel, hook: str, ids: NDArray[np.int32], limit: NormLimit, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One forward pass over rows `[n_rows, context_size]`: the activations that count, `[n_kept, d_model]` in text
    order, of the model's dtype, on the CPU; and the mask of their positions, bool `[n_rows, context_size]`.
    """
    x = capture(lm, hook, torch.from_numpy(ids.astype(np.int64))).cpu()
    mask = kept_positions(x, limit, counts)
    return x[mask], mask


@dataclass(frozen=True, eq=False)
class Pool:
    """Activations in memory, `[n_tokens, d_in]` of any float dtype, and the order in which tokens are used: row
    indices, int64 `[n]`, some left out or repeated.
    """

    activations: Tensor
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def part(self, start: int, stop: int) -> Tensor:
        """Tokens `start` to `stop` of the order, float32 `[n, d_in]`."""
        return self.activations[self.order[start:stop]].float()


def shuffled(activations: Tensor, *seed: int) -> Pool:
    """A pool in a random order, which depends only on the seeds and the number of tokens."""
    order = np.random.default_rng(seed).permutation(len(activations))
    return Pool(activations, torch.from_numpy(order))


def cut_batches(pools: Iterable[Pool], batch_size: int, *, skip: int = 0) -> Iterator[Tensor]:
    """Batches across pools, float32 `[batch_size, d_in]`, without the first `skip` tokens and a short last batch."""
    pending: list[Tensor] = []
    position = skip
    for pool in pools:
        missing = batch_size - sum(map(len, pending))
        while position + missing <= len(pool):
            pending.append(pool.part(position, position + missing))
            yield pending[0] if len(pending) == 1 else torch.cat(pending)
            position, missing, pending = position + missing, batch_size, []
        if position < len(pool):
            pending.append(pool.part(position, len(pool)))
        position = 0
        del pool  # free it before the next one is made


def read_ahead(makers: Iterable[Callable[[], Pool]]) -> Iterator[Pool]:
    """The pools in order, the next one made meanwhile by a thread: two are in memory, never three."""
    with ThreadPoolExecutor(1, thread_name_prefix="pool") as thread:
        waiting = None
        for make in makers:
            pool = waiting.result() if waiting is not None else None
            waiting = thread.submit(make)
            if pool is not None:
                yield pool
            del pool  # free it before the one after next is made
        if waiting is not None:
            yield waiting.result()


@dataclass(frozen=True, eq=False)
class StreamedActivations(ActivationSource):
    """Activations of a model while it runs over text; nothing is written to disk.

    A pool is `pool_rows` rows of text, run `rows_a_pass` at once, then shuffled. 99 % of its tokens are used; where
    outliers leave fewer, some twice. It takes `pool_rows` x context_size x d_in numbers in the model's dtype, briefly
    twice that. Under `torchrun` each process runs its share of the passes and gets the whole pool.
    """

    lm: LanguageModel
    hook: str
    text: StreamedText | TokenRows
    limit: NormLimit
    pool_rows: int = 512
    rows_a_pass: int = 8

    @classmethod
    def open(
        cls, lm: LanguageModel, hook: str, text: StreamedText | TokenRows, *, pool_rows: int = 512, rows_a_pass: int = 8
    ) -> StreamedActivations:
        """Check that model, hook and text fit (errors as `check_rows`); measure the norm limit on the first rows."""
        if isinstance(text, TokenRows) and text.counts is not None:
            raise ConfigError(
                "streamed activations are of all tokens, and only some of these rows count.",
                at="positions",
                fix="harvest them instead: activations: shards.",
            )
        ids = np.array(list(islice(text.rows(), 2 * rows_a_pass)), dtype=np.int32)
        check_rows(lm, hook, TokenRows(ids, np.zeros(len(ids), dtype=np.int64), ()))
        with fused(lm):
            limit = first_limit(lm, hook, ids)
        # Processes differ in the last digit: all use the limit of the first.
        return cls(lm, hook, text, from_all(limit)[0], pool_rows, rows_a_pass)

    @property
    def d_in(self) -> int:
        return hook_width(self.lm, self.hook)

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def run(self, ids: NDArray[np.int32]) -> Tensor:
        """Kept activations of rows `[n_rows, context_size]`, one pass, in text order, `[n, d_in]` of `dtype`."""
        return run_pass(self.lm, self.hook, ids, self.limit)[0]

    def identity(self) -> str:
        lm = self.lm
        return fingerprint([lm.name, lm.identity, self.hook, str(lm.dtype), self.text.identity(), self.pool_rows])

    def sample(self, n_tokens: int) -> Tensor:
        parts: list[Tensor] = []
        n_left = n_tokens
        rows = self.text.rows()
        while n_left > 0 and (ids := list(islice(rows, -(-n_left // (self.text.context_size - 1))))):
            parts.append(self._run_rows(np.stack(ids)).float())
            n_left -= len(parts[-1])
        return torch.cat([torch.empty(0, self.d_in), *parts])[:n_tokens]

    def n_batches(self, batch_size: int) -> int | None:
        n_rows = self.text.n_rows
        if n_rows is None:
            return None
        pools, rest = divmod(n_rows, self.pool_rows)
        return (pools * self._tokens_used(self.pool_rows) + self._tokens_used(rest)) // batch_size

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """See `ActivationSource`. Text before `start` is tokenised, but the model does not run on it. EmptySelection
        if the text is shorter than declared, or every position of a pool is an outlier.
        """
        number, skip = divmod(start * batch_size, self._tokens_used(self.pool_rows))
        yield from cut_batches(self._pools(seed, epoch, number), batch_size, skip=skip)

    def _tokens_used(self, n_rows: int) -> int:
        """Tokens used of a pool of `n_rows` rows: known before the model has run."""
        return max(1, int(_USED_SHARE * n_rows * (self.text.context_size - 1))) if n_rows else 0

    def _pools(self, seed: int, epoch: int, first: int) -> Iterator[Pool]:
        rows = islice(self.text.rows(), first * self.pool_rows, None)
        number = first
        while ids := list(islice(rows, self.pool_rows)):
            pool = shuffled(self._run_rows(np.stack(ids)), seed, epoch, number)
            if not len(pool):
                raise EmptySelection(
                    f"every residual of rows {number * self.pool_rows:,} and on is an outlier.",
                    at=self.hook,
                    fix="look at the text there, and at the model.",
                )
            # `resize` repeats the order where outliers leave fewer tokens than are used.
            yield Pool(pool.activations, torch.from_numpy(np.resize(pool.order.numpy(), self._tokens_used(len(ids)))))
            del pool
            number += 1

    def _run_rows(self, ids: NDArray[np.int32]) -> Tensor:
        """Kept activations of the rows in text order, `[n, d_in]`; the same for any number of processes."""
        rank, world = rank_and_world()
        starts = range(0, len(ids), self.rows_a_pass)
        with fused(self.lm):
            local = [self.run(ids[start : start + self.rows_a_pass]) for start in starts[rank::world]]
        if world == 1:
            return torch.cat(local)
        device = device_of_process()
        lengths = gathered(torch.tensor([len(x) for x in local], dtype=torch.int64, device=device)).tolist()
        empty = torch.empty(0, self.d_in, dtype=self.dtype)
        joined = gathered(torch.cat([empty, *local]).to(device)).cpu()
        numbers = [number for process in range(world) for number in range(len(starts))[process::world]]
        parts = dict(zip(numbers, joined.split(lengths), strict=True))
        return torch.cat([parts[number] for number in range(len(starts))])
