"""Pools: as many tokens as memory holds, shuffled, and cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Pool", "cut", "read_ahead", "shuffled"]


@dataclass(frozen=True, eq=False)
class Pool:
    """Activations and the order in which they are given out.

    Attributes:
        activations: `[n_tokens, d_in]`, any float dtype.
        order: Permutation of the tokens, int64 `[n]`; it may leave some out or repeat them.
    """

    activations: Tensor
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def part(self, start: int, stop: int) -> Tensor:
        """Tokens `start` to `stop` of the order, float32 `[n, d_in]`."""
        return self.activations[self.order[start:stop]].float()


def shuffled(activations: Tensor, *seed: int) -> Pool:
    """A pool in an order that depends on the seeds and the number of tokens alone."""
    order = np.random.default_rng(seed).permutation(len(activations))
    return Pool(activations, torch.from_numpy(order))


def cut(pools: Iterable[Pool], batch_size: int, *, skip: int = 0) -> Iterator[Tensor]:
    """Batches across pools: what is left at the end of one begins the next; the last, short batch is left out.

    Args:
        pools: In order.
        batch_size: Tokens a batch.
        skip: Tokens of the first pool to pass over.

    Yields:
        float32 `[batch_size, d_in]`.
    """
    left: list[Tensor] = []
    at = skip
    for pool in pools:
        missing = batch_size - sum(map(len, left))
        while at + missing <= len(pool):
            left.append(pool.part(at, at + missing))
            yield left[0] if len(left) == 1 else torch.cat(left)
            at, missing, left = at + missing, batch_size, []
        if at < len(pool):
            left.append(pool.part(at, len(pool)))
        at = 0
        del pool  # before the next one is made


def read_ahead(makers: Iterable[Callable[[], Pool]]) -> Iterator[Pool]:
    """The pools in order; a thread makes the next one meanwhile, so that two are in memory, never three."""
    with ThreadPoolExecutor(1, thread_name_prefix="pool") as thread:
        waiting = None
        for make in makers:
            pool = waiting.result() if waiting is not None else None
            waiting = thread.submit(make)
            if pool is not None:
                yield pool
            del pool  # the caller holds it no longer, so neither do we while the next but one is made
        if waiting is not None:
            yield waiting.result()
