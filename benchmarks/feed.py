"""The contender's side of the connection: its training loop asks for batches; the time between two batches is a step.

A contender does not measure time itself. Its loop calls `next_batch` for each batch, as it would any data source. There
the feed waits while other contenders work, so that no two run at once, and computes the losses from the weights, by the
same code for all.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TextIO

import torch
from measure import peak_rss
from torch import Tensor

__all__ = ["Feed", "Finished", "Weights", "startup_message", "reconstruction_error"]


def startup_message() -> dict[str, Any]:
    """The first message of a process: its peak memory so far, bytes, its torch version, and its peers."""
    peers = {}
    for name in ("sae-lens", "eai-sparsify", "dictionary-learning"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            peers[name] = metadata.version(name)
    return {"peak_rss": peak_rss(), "torch": torch.__version__, "peers": peers}


class Finished(Exception):  # noqa: N818 - the end of a run, not a mistake
    """Ends the contender's loop when no more batches are needed."""


@dataclass(frozen=True)
class Weights:
    """An SAE's weights in the layout that all contenders return.

    Attributes:
        W_enc: Float32 `[d_in, d_sae]`.
        b_enc: Float32 `[d_sae]`.
        W_dec: Float32 `[d_sae, d_in]`.
        b_dec: Float32 `[d_in]`.
        rescale: TopK only: features are ranked and weighted by activation times decoder norm.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    rescale: bool = False


@torch.no_grad()
def reconstruction_error(weights: Weights, x: Tensor, k: int | None) -> tuple[float, float]:
    """Squared error summed over dimensions, mean over tokens; and the number of active features a token.

    Args:
        weights: The SAE; its input is `x - b_dec`.
        x: Activations, float32 `[n_tokens, d_in]`.
        k: Active features a token of a TopK SAE, or None for a ReLU.
    """
    hidden_pre = torch.addmm(weights.b_enc, x - weights.b_dec, weights.W_enc)
    if k is None:
        feature_acts = hidden_pre.relu_()
        l0 = float((feature_acts > 0).sum()) / len(x)
        sae_out = feature_acts @ weights.W_dec
    else:
        W_dec = weights.W_dec
        if weights.rescale:
            norm = W_dec.norm(dim=1)
            hidden_pre *= norm
            W_dec = W_dec / norm[:, None]
        values, indices = hidden_pre.topk(k, dim=1, sorted=False)
        values = values.relu()
        l0 = float((values > 0).sum()) / len(x)
        sae_out = torch.nn.functional.embedding_bag(indices, W_dec.contiguous(), per_sample_weights=values, mode="sum")
    error = sae_out + weights.b_dec - x
    return float(error.double().square().sum()) / len(x), l0


class Feed:
    """Batches in a fixed order, handed out on orders from the parent process.

    Args:
        pool: Float32 `[n_batches, batch, d_in]`; after the last batch comes the first again.
        k: See `reconstruction_error`.
        orders: One JSON object a line: `{"op": "run", "steps": 4}`, `{"op": "curve", "steps": 300, "every": 5}`,
            `{"op": "state"}`, `{"op": "quit"}`.
        answers: Where answers go, one JSON object a line.
    """

    def __init__(self, pool: Tensor, k: int | None, orders: TextIO, answers: TextIO) -> None:
        self._pool, self._k, self._orders, self._answers = pool, k, orders, answers
        self._weights: Callable[[], Weights] | None = None
        self._started: float | None = None
        self._steps_left = 0
        self._position = 0
        self._loss_every = 0
        self._seconds: list[float] = []
        self._losses: list[tuple[int, float, float]] = []

    def ready(self, weights: Callable[[], Weights]) -> None:
        """To be called once, before the first batch, with a function that returns the contender's weights."""
        self._weights = weights
        self._answer(startup_message())

    def next_batch(self) -> Tensor:
        """The next batch, float32 `[batch, d_in]`; waits until it is this contender's turn.

        Raises:
            Finished: No more batches are needed.
        """
        if self._started is not None:
            self._seconds.append(time.perf_counter() - self._started)
        if self._steps_left == 0:
            self._await_order()
        x = self._pool[self._position % len(self._pool)]
        if self._loss_every and self._position % self._loss_every == 0:
            self._losses.append((self._position, *self._reconstruction_error(x)))
        self._steps_left -= 1
        self._position += 1
        self._started = time.perf_counter()
        return x

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.next_batch()

    def _await_order(self) -> None:
        if self._started is not None:
            answer: dict[str, Any] = {"seconds": self._seconds, "peak_rss": peak_rss()}
            if self._loss_every:
                x = self._pool[self._position % len(self._pool)]
                self._losses.append((self._position, *self._reconstruction_error(x)))
                answer["losses"] = self._losses
            self._answer(answer)
        self._seconds, self._losses, self._loss_every = [], [], 0
        while not self._steps_left:
            order = json.loads(self._orders.readline() or '{"op": "quit"}')
            if order["op"] == "quit":
                raise Finished
            if order["op"] == "state":
                mse, l0 = self._reconstruction_error(self._pool[0][:256])
                self._answer({"mse": mse, "l0": l0})
            else:
                self._steps_left = order["steps"]
                self._loss_every = order.get("every", 0)

    def _reconstruction_error(self, x: Tensor) -> tuple[float, float]:
        assert self._weights is not None, "a contender calls ready() before its first batch"
        return reconstruction_error(self._weights(), x, self._k)

    def _answer(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()
