"""Activations straight from the model to the trainer: nothing is written, and memory holds one pool of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.errors import ConfigError, EmptySelection
from saeffect.io import fingerprint
from saeffect.lm.fused import fused
from saeffect.lm.harvest import NormLimit, TokenRows, first_limit, refuse_unfit, run_pass
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.pool import Pool, cut, shuffled
from saeffect.lm.streamed_text import RowSource
from saeffect.parallel import device_of_process, gathered, rank_and_world

__all__ = ["StreamedActivations"]

# How many tokens of a pool are given out, as a share of all but each row's first. Some are outliers of the norm,
# and how many only the model can tell; a fixed number tells where batch n begins without running it.
_GIVEN_OUT = 0.99


@dataclass(frozen=True, eq=False)
class StreamedActivations:
    """A model that runs over text while a trainer takes the activations, pool by pool.

    A pool is `pool_rows` rows of text, harvested, shuffled, and given out; then the next one is harvested. Of its
    tokens 99 in 100 are given out; where outliers leave fewer than that, some twice. A pool takes
    `pool_rows` x context_size x d_in numbers in the model's dtype, and twice that for a moment when it is put
    together.

    Under `torchrun` each process runs its share of each pool's passes, and gets the whole pool.

    Attributes:
        lm: The model.
        hook: TransformerLens name.
        text: The rows.
        limit: Which positions count.
        pool_rows: Rows a pool; decides the order too.
        rows_a_pass: Rows a forward pass.
    """

    lm: LanguageModel
    hook: str
    text: RowSource
    limit: NormLimit
    pool_rows: int = 512
    rows_a_pass: int = 8

    @classmethod
    def open(
        cls, lm: LanguageModel, hook: str, text: RowSource, *, pool_rows: int = 512, rows_a_pass: int = 8
    ) -> StreamedActivations:
        """Check that model, hook and text fit, and measure the norm limit on the first rows.

        Raises:
            ConfigError: The model has no such hook, or no such positions or tokens; a size is not positive.
            EmptySelection: The text is shorter than one row.
            BadFile: The model gives NaN or infinite activations.
        """
        if min(pool_rows, rows_a_pass) < 1:
            raise ConfigError(
                f"pool_rows is {pool_rows} and rows_a_pass is {rows_a_pass}; both must be at least 1.", at="pool_rows"
            )
        first = list(islice(text.rows(), 2 * rows_a_pass))
        if not first:
            raise EmptySelection("there are no rows of text to harvest.", fix="give more text.")
        ids = np.stack(first)
        refuse_unfit(lm, hook, TokenRows(ids, np.zeros(len(ids), dtype=np.int64), ()))
        with fused(lm):
            limit = first_limit(lm, hook, ids)
        # Processors differ in the last digit; all processes use the first one's.
        both = torch.tensor([[limit.median_norm, limit.limit]], dtype=torch.float64, device=device_of_process())
        return cls(lm, hook, text, NormLimit(*gathered(both)[0].tolist()), pool_rows, rows_a_pass)

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.lm.d_model

    @cached_property
    def mean_norm(self) -> float:
        """Mean Euclidean norm over `sample(20_000)`."""
        return float(self.sample(20_000).norm(dim=1).mean())

    def identity(self) -> str:
        """SHA-256 of model, hook, dtype, text, and the size of a pool."""
        return fingerprint(
            [self.lm.name, self.lm.identity, self.hook, str(self.lm.dtype), self.text.identity(), self.pool_rows]
        )

    def sample(self, n_tokens: int) -> Tensor:
        """The first `n_tokens` activations in text order, float32 `[n, d_in]`; fewer if there are fewer."""
        found: list[Tensor] = []
        wanted = n_tokens
        rows = self.text.rows()
        while wanted > 0:
            about = -(-wanted // (self.text.context_size - 1))
            ids = list(islice(rows, about))
            if not ids:
                break
            found.append(self._kept(np.stack(ids)).float())
            wanted -= len(found[-1])
        return torch.cat([torch.empty(0, self.d_in), *found])[:n_tokens]

    def n_batches(self, batch_size: int, *, seed: int = 0, epoch: int = 0) -> int | None:  # noqa: ARG002 - interface
        """How many batches one pass gives; None where the length of the text is not known."""
        n_rows = self.text.n_rows
        if n_rows is None:
            return None
        pools, rest = divmod(n_rows, self.pool_rows)
        return (pools * self._given_out(self.pool_rows) + self._given_out(rest)) // batch_size

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """One pass over the text; the order of the tokens depends on (seed, epoch) and the size of a pool alone.

        Text before the pool that holds batch number `start` is tokenised, to know where the pool begins; the
        model does not run on it.

        Yields:
            float32 `[batch_size, d_in]`, on the CPU.

        Raises:
            BadFile: The model gives NaN or infinity.
            EmptySelection: The text is shorter than it says, or every position of a pool is an outlier.
        """
        number, skip = divmod(start * batch_size, self._given_out(self.pool_rows))
        yield from cut(self._pools(seed, epoch, number), batch_size, skip=skip)

    def _given_out(self, n_rows: int) -> int:
        """Tokens that a pool of so many rows gives: known before the model has run."""
        return max(1, int(_GIVEN_OUT * n_rows * (self.text.context_size - 1))) if n_rows else 0

    def _pools(self, seed: int, epoch: int, first: int) -> Iterator[Pool]:
        rows = islice(self.text.rows(), first * self.pool_rows, None)
        number = first
        while ids := list(islice(rows, self.pool_rows)):
            pool = shuffled(self._kept(np.stack(ids)), seed, epoch, number)
            if not len(pool):
                raise EmptySelection(
                    f"every residual of rows {number * self.pool_rows:,} and on is an outlier.",
                    at=self.hook,
                    fix="look at the text there, and at the model.",
                )
            # Cyclic where outliers leave fewer tokens than are given out.
            yield Pool(pool.activations, torch.from_numpy(np.resize(pool.order.numpy(), self._given_out(len(ids)))))
            del pool
            number += 1

    def _kept(self, ids: NDArray[np.int32]) -> Tensor:
        """Kept activations of the rows in text order, `[n, d_in]`: the same whatever the number of processes."""
        rank, world = rank_and_world()
        starts = range(0, len(ids), self.rows_a_pass)
        with fused(self.lm):
            mine = [
                run_pass(self.lm, self.hook, ids[start : start + self.rows_a_pass], self.limit)[0]
                for start in starts[rank::world]
            ]
        if world == 1:
            return torch.cat(mine)
        device = device_of_process()
        lengths = gathered(torch.tensor([len(x) for x in mine], dtype=torch.int64, device=device)).tolist()
        nothing = torch.empty(0, self.d_in, dtype=self.lm.dtype)
        together = gathered(torch.cat([nothing, *mine]).to(device)).cpu()
        numbers = [number for other in range(world) for number in range(len(starts))[other::world]]
        parts = dict(zip(numbers, together.split(lengths), strict=True))
        return torch.cat([parts[number] for number in range(len(starts))])
