"""The encoder's product, and which of its entries are worth keeping.

This is the one dense product that training cannot avoid. It may run in bfloat16: the result then only says
which entries could be on, within a proven bound of the rounding, and those are evaluated again in float32.
The buffers live as long as the encoder, since touching fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.sae.entries import DenseEntries, Entries, SparseEntries

__all__ = ["Encoder"]

# A product of two numbers rounded to bfloat16 (8 bits, half a unit each) is off by at most 2^-8 and a little
# of its size; Cauchy-Schwarz turns the sum of the sizes into norms. 1 % on top covers float32's own rounding.
_ROUNDING = 1.01 * 2.0**-8
_BLOCK = 32


class Encoder:
    """Finds the entries of `x @ W.T + bias` that are above a floor, or among the largest.

    Args:
        dtype: Of the product: torch.float32 or torch.bfloat16.
        chunk: Tokens a product; the buffer is `[chunk, d_sae]`.
        dense_above: Share of entries above the floor from which `above` gives dense entries. It is a number and
            not a stopwatch, so that a run repeats bit by bit; benchmarks/sae_training.py measures where it lies.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, *, chunk: int = 1024, dense_above: float = 0.04) -> None:
        self.dtype, self.chunk, self.dense_above = dtype, chunk, dense_above
        self._buffers: dict[str, Tensor] = {}

    def above(self, x: Tensor, W: Tensor, bias: Tensor, floor: Tensor | None = None) -> Entries:
        """Entries where `x @ W.T + bias` is above `floor`; values are `x @ W.T + bias` there.

        Args:
            x: Float32 `[n, d_in]`.
            W: Encoder, one row a feature, float32 `[d_sae, d_in]`.
            bias: Float32 `[d_sae]`.
            floor: One number a feature, float32 `[d_sae]`; 0 without it.
        """
        shifted = bias if floor is None else bias - floor
        found: list[_Found] = []
        n_found = 0
        for start, hidden in self._products(x, W, shifted):
            found.append(self._at_least(hidden, None, start))
            n_found += len(found[-1].positions)
            if n_found > self.dense_above * len(x) * len(W):
                return self._dense(x, W, bias, floor)
        entries = self._evaluated(found, x, W, bias, floor)
        return entries.where(entries.values > (0.0 if floor is None else entries.per_feature(floor)))

    def top(self, x: Tensor, W: Tensor, bias: Tensor, k: int, *, weight: Tensor | None = None) -> SparseEntries:
        """Of each token the k largest entries of `(x @ W.T + bias) * weight`, and of those the positive ones.

        The values are those of `x @ W.T + bias`.

        Args:
            x: Float32 `[n, d_in]`.
            W: Encoder, one row a feature, float32 `[d_sae, d_in]`.
            bias: Float32 `[d_sae]`.
            k: How many a token.
            weight: Positive, float32 `[d_sae]`; 1 without it.
        """
        W, bias = (W, bias) if weight is None else (W * weight[:, None], bias * weight)
        found: list[_Found] = []
        for start, hidden in self._products(x, W, bias):
            maxima = _block_maxima(hidden, k)
            floor = maxima.topk(k, dim=1).values[:, -1:] if maxima.shape[1] >= k else None
            found.append(self._at_least(hidden, floor, start))
        entries = self._evaluated(found, x, W, bias)
        return _unweighted(entries.where(_among_top_k(entries, k) & (entries.values > 0)), weight)

    def batch_top(
        self, x: Tensor, W: Tensor, bias: Tensor, n_kept: int, *, weight: Tensor | None = None
    ) -> SparseEntries:
        """The `n_kept` largest entries of the whole batch, and of those the positive ones (see `top`)."""
        W, bias = (W, bias) if weight is None else (W * weight[:, None], bias * weight)
        found: list[_Found] = []
        seen = x.new_zeros(0)
        for start, hidden in self._products(x, W, bias):
            # The n_kept-th largest maximum of blocks seen so far is no larger than the entry that is sought.
            seen = torch.cat([seen, _block_maxima(hidden, max(1, n_kept // len(x))).flatten().float()])
            floor = None
            if len(seen) >= n_kept:
                seen = seen.topk(n_kept, sorted=False).values
                floor = seen.min().to(hidden.dtype)
            found.append(self._at_least(hidden, floor, start))
        entries = self._evaluated(found, x, W, bias)
        kept = entries.values > 0
        if len(entries.values) > n_kept:
            chosen = torch.zeros_like(kept)
            chosen[entries.values.topk(n_kept, sorted=False).indices] = True
            kept &= chosen
        return _unweighted(entries.where(kept), weight)

    def _products(self, x: Tensor, W: Tensor, bias: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Chunks of `x @ W.T + bias`, `[chunk, d_sae]`; in bfloat16 an upper bound of it."""
        weights = W
        self._slack = 0.0
        if self.dtype != torch.float32:
            weights = self._buffer("weights", W.shape, W).copy_(W)
            slack = W.norm(dim=1) * (x.norm(dim=1).max() * _ROUNDING)
            self._slack = float(slack.max())
            bias = bias + slack
            bias = (bias + bias.abs() * 2.0**-7).to(self.dtype)  # rounded, it is still no smaller
            x = x.to(self.dtype)
        hidden = self._buffer("hidden", (min(self.chunk, len(x)), len(W)), W)
        for start in range(0, len(x), self.chunk):
            part = x[start : start + self.chunk]
            yield start, torch.addmm(bias, part, weights.T, out=hidden[: len(part)])

    def _at_least(self, hidden: Tensor, floor: Tensor | None, start: int) -> _Found:
        """Positive entries at or above the floor (a number, or one a row), in order."""
        if floor is not None and self.dtype != torch.float32:  # both sides' bounds, and the rounding of all
            floor = floor.float()
            floor = (floor - 2 * self._slack - floor.abs() * 2.0**-5).to(hidden.dtype)
        n = hidden.numel()
        mask = self._buffer("mask", (-(-self.chunk * hidden.shape[1] // 8) * 8,), hidden, torch.bool)
        mask = mask[: -(-n // 8) * 8]
        mask[n:] = False
        # Positive floats order like their bits, and torch compares integers faster than bfloat16.
        bits = hidden.view(torch.int16 if hidden.dtype == torch.bfloat16 else torch.int32)
        lowest = 1 if floor is None else floor.view(bits.dtype).clamp_min(1)
        torch.ge(bits, lowest, out=mask[:n].view(hidden.shape))
        # Eight flags at a time: few words hold any flag, and only those are looked into.
        words = mask.view(torch.int64).nonzero().flatten()
        within = mask.view(-1, 8)[words].nonzero()
        positions = words[within[:, 0]] * 8 + within[:, 1]
        values = hidden.flatten()[positions] if self.dtype == torch.float32 else None
        return _Found(positions + start * hidden.shape[1], values)

    def _evaluated(
        self, found: list[_Found], x: Tensor, W: Tensor, bias: Tensor, floor: Tensor | None = None
    ) -> SparseEntries:
        """The entries that were found, with their values in float32."""
        d_sae = len(W)
        positions = torch.cat([f.positions for f in found])
        token = positions.div(d_sae, rounding_mode="floor")
        feature = positions - token * d_sae
        shape = (len(x), d_sae)
        known = [f.values for f in found if f.values is not None]
        if known:
            values = torch.cat(known)
            return SparseEntries(token, feature, values if floor is None else values + floor[feature], shape)
        entries = SparseEntries(token, feature, x.new_zeros(len(token)), shape)
        return SparseEntries(token, feature, entries.inner(x, W) + bias[feature], shape)

    def _dense(self, x: Tensor, W: Tensor, bias: Tensor, floor: Tensor | None) -> DenseEntries:
        hidden_pre = torch.addmm(bias, x, W.T, out=self._buffer("dense", (len(x), len(W)), x, torch.float32))
        hidden_pre.relu_() if floor is None else hidden_pre.mul_(hidden_pre > floor)
        return DenseEntries(hidden_pre, scratch=self._buffer("scratch", hidden_pre.shape, x, torch.float32))

    def _buffer(
        self, name: str, shape: tuple[int, ...] | torch.Size, like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        found = self._buffers.get(name)
        if found is None or found.shape != torch.Size(shape) or found.device != like.device:
            found = self._buffers[name] = torch.empty(shape, dtype=dtype or self.dtype, device=like.device)
        return found


@dataclass(frozen=True)
class _Found:
    positions: Tensor  # flat, int64
    values: Tensor | None  # float32; None where only an upper bound is known


def _block_maxima(hidden: Tensor, k: int) -> Tensor:
    """Largest entry of each of many blocks of features: the k-th largest of them bounds the k-th entry from below."""
    n, d_sae = hidden.shape
    block = max(1, min(_BLOCK, d_sae // (4 * k)))
    n_blocks = d_sae // block
    # Features left over at the end are in no block, which leaves the bound a bound.
    return hidden[:, : n_blocks * block].unflatten(1, (block, n_blocks)).amax(1)


def _among_top_k(entries: SparseEntries, k: int) -> Tensor:
    """Bool, one an entry: whether it is among its token's k largest."""
    n = entries.shape[0]
    counts = torch.bincount(entries.token, minlength=n)
    if not len(entries.values) or int(counts.max()) <= k:
        return torch.ones_like(entries.values, dtype=torch.bool)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(entries.values), device=entries.token.device) - starts[entries.token]
    padded = entries.values.new_full((n, int(counts.max())), -torch.inf)
    padded[entries.token, place] = entries.values
    chosen = torch.zeros_like(padded, dtype=torch.bool).scatter_(1, padded.topk(k, dim=1).indices, True)
    return chosen[entries.token, place]


def _unweighted(entries: SparseEntries, weight: Tensor | None) -> SparseEntries:
    if weight is not None:
        entries.values = entries.values / entries.per_feature(weight)
    return entries
