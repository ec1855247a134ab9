"""The encoder's product in float32, or in bfloat16 with a proven bound of its rounding (see `_slack`), and its largest
entries, evaluated in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.sae.entries import DenseEntries, Entries, ListedByFeature, SparseEntries

__all__ = ["Encoder"]

_UNIT = 2.0**-24  # largest relative rounding error of float32
# Squares of numbers below 2^-63 may underflow in a norm, and processors may flush numbers below 2^-126 to zero:
# for up to 16,384 dimensions both come to less than this.
_VANISHING = 2.0**-56
_NEAREST = 2.0**-8  # largest relative rounding error of bfloat16
_ROWS = 512  # weights converted at a time, so that their norms are computed in the cache
_BLOCK = 8  # features a block; a search of the product compares only the maximum of each block
_WIDER = 4  # blocks merged into one to bound a token's k-th largest entry
_TILE = 4096


class Encoder:
    """Finds the entries of `x @ W.T + bias` that are above a floor, or among the largest.

    In bfloat16 the product only selects candidates; their values are float32. Buffers live as long as the encoder. A
    product takes `chunk` tokens and at most `[chunk, d_sae]` of memory. Above the share `dense_above` of active
    entries, `above` returns dense ones; a fixed share, not a timing, so that runs are bit-reproducible (its value is
    from benchmarks/sae_training.py).
    """

    def __init__(self, dtype: torch.dtype = torch.float32, *, chunk: int = 1024, dense_above: float = 0.04) -> None:
        self.dtype, self.chunk, self.dense_above = dtype, chunk, dense_above
        self._buffers: dict[str, Tensor] = {}
        self._gap = 0.0  # most by which entries of the last product exceed the float32 values, before rounding

    def above(self, x: Tensor, W: Tensor, bias: Tensor, floor: Tensor | None = None) -> Entries:
        """Entries where `x @ W.T + bias` is above `floor`, with its values there.

        All are float32: x `[n, d_in]`, W `[d_sae, d_in]`, bias and floor `[d_sae]` (None: 0). Dense entries hold the
        floor wherever the value is not above it. NaN counts as above, so that it is noticed.
        """
        candidates: list[_Candidates] = []
        n_candidates = 0
        product = self._prepare(x, W, bias, floor)
        for start in range(0, len(x), self.chunk):
            for first in product.tiles:
                candidates.append(self._candidates(self._tile(product, start, first), None))
                n_candidates += len(candidates[-1].token)
            if n_candidates > self.dense_above * len(x) * len(W):
                return self._dense(x, W, bias, floor)
        listed = self._evaluate(candidates, x, W, bias, floor)
        return listed.where(~(listed.values <= (0.0 if floor is None else floor[listed.feature]))).entries()

    def top(self, x: Tensor, W: Tensor, bias: Tensor, k: int, *, weight: Tensor | None = None) -> SparseEntries:
        """The k largest entries of `(x @ W.T + bias) * weight` of each token, if positive; the values returned are
        without weight. Shapes as in `above`; `weight` is positive, float32 `[d_sae]` (None: 1).
        """
        W, bias = self._apply_weight(W, bias, weight)
        candidates: list[_Candidates] = []
        product = self._prepare(x, W, bias)
        for start in range(0, len(x), self.chunk):
            tiles, maxima = self._tiles(product, start, k)
            floor = maxima.topk(k, dim=1).values[:, -1:] if maxima.shape[1] >= k else None
            candidates += [self._candidates(tile, floor) for tile in tiles]
        entries = self._evaluate(candidates, x, W, bias).entries()
        return _remove_weight(entries.where(_among_top_k(entries, k) & ~(entries.values <= 0)), weight)

    def batch_top(
        self, x: Tensor, W: Tensor, bias: Tensor, n_kept: int, *, weight: Tensor | None = None
    ) -> SparseEntries:
        """The `n_kept` largest entries of the whole batch, and of those the positive ones (see `top`)."""
        W, bias = self._apply_weight(W, bias, weight)
        candidates: list[_Candidates] = []
        largest_maxima = x.new_zeros(0)
        product = self._prepare(x, W, bias)
        for start in range(0, len(x), self.chunk):
            # The n_kept-th largest block maximum so far is at most the n_kept-th largest entry of the batch.
            # Blocks are small enough for the first chunk to have that many, for any length of the batch.
            tiles, maxima = self._tiles(product, start, -(-n_kept // len(product.x[start : start + self.chunk])))
            largest_maxima = torch.cat([largest_maxima, maxima.flatten().float()])
            floor = None
            if len(largest_maxima) >= n_kept:
                largest_maxima = largest_maxima.topk(n_kept, sorted=False).values
                floor = largest_maxima.min().to(maxima.dtype)
            candidates += [self._candidates(tile, floor) for tile in tiles]
        listed = self._evaluate(candidates, x, W, bias)
        selected = ~(listed.values <= 0)
        if len(listed.values) > n_kept:
            among_largest = torch.zeros_like(selected)
            among_largest[listed.values.topk(n_kept, sorted=False).indices] = True
            selected &= among_largest
        return _remove_weight(listed.where(selected).entries(), weight)

    def _prepare(self, x: Tensor, W: Tensor, bias: Tensor, floor: Tensor | None = None) -> _Product:
        """The factors of `x @ W.T + bias - floor`; in bfloat16 those of an upper bound of it."""
        shifted = bias if floor is None else bias - floor
        if self.dtype == torch.float32:
            return _Product(x, W, shifted)
        weights, length = self._round_weights(W)
        rounded = x.to(self.dtype)
        added = bias.abs() if floor is None else bias.abs() + floor.abs()
        slack = _slack(x, rounded, length, added)
        raised = shifted + slack
        raised = (raised + raised.abs() * 2.0**-7).to(self.dtype)  # not smaller after rounding
        self._gap = float((raised - shifted + slack).max())
        if x.is_cuda:  # otherwise cuBLAS may add partial sums in bfloat16, which the bound does not cover
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        return _Product(rounded, weights, raised)

    def _tile(self, product: _Product, start: int, first: int, *, kept: bool = False) -> _Tile:
        """The product of a chunk of tokens and a tile of features; the next call overwrites it unless `kept`."""
        part, tile = product.x[start : start + self.chunk], product.tile
        weights, bias = product.W[first : first + tile], product.bias[first : first + tile]
        name, n_slots, slot = ("tiles", len(product.tiles), first // tile) if kept else ("tile", 1, 0)
        slots = self._buffer(name, (n_slots, min(self.chunk, len(product.x)) * tile), product.x)
        hidden = slots[slot, : len(part) * len(weights)].view(len(part), len(weights))
        torch.addmm(bias, part, weights.T, out=hidden)
        return _Tile(hidden, _block_maxima(hidden, _BLOCK), start, first)

    def _tiles(self, product: _Product, start: int, k: int) -> tuple[list[_Tile], Tensor]:
        """All tiles of a chunk, and block maxima, whose k-th largest bounds a token's k-th largest entry from below."""
        tiles = [self._tile(product, start, first, kept=True) for first in product.tiles]
        n_blocks = sum(tile.maxima.shape[1] for tile in tiles)
        wider = max(1, min(_WIDER, n_blocks // (4 * k)))  # maxima of maxima, if enough of them remain
        return tiles, torch.cat([_block_maxima(tile.maxima, wider) for tile in tiles], dim=1)

    def _round_weights(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """W rounded, and the norm of each row, in one pass over memory."""
        rounded, length = self._buffer("weights", W.shape, W), torch.empty_like(W[:, 0])
        for start in range(0, len(W), _ROWS):
            rows = W[start : start + _ROWS]
            rounded[start : start + _ROWS].copy_(rows)
            torch.linalg.vector_norm(rows, dim=1, out=length[start : start + _ROWS])
        return rounded, length

    def _apply_weight(self, W: Tensor, bias: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight is None:
            return W, bias
        return torch.mul(W, weight[:, None], out=self._buffer("weighted", W.shape, W, torch.float32)), bias * weight

    def _candidates(self, tile: _Tile, floor: Tensor | None) -> _Candidates:
        """Positive entries of a tile at or above the floor (one number, or one a row, in units of the product)."""
        bits, maxima = _bits(tile.hidden), _bits(tile.maxima)
        lowest = torch.ones((1, 1), dtype=bits.dtype, device=bits.device)
        if floor is not None and self.dtype != torch.float32:
            # An entry of `hidden` is a rounded sum that exceeds the float32 value by at most `gap`. The floor is
            # lowered by the rounding and the gap, so that no entry whose float32 value reaches it is lost.
            floor = floor.float()
            floor = (floor - floor.abs() * 2.0**-7 - self._gap).to(tile.hidden.dtype)
        if floor is not None:
            lowest = floor.view(bits.dtype).clamp_min(1).view(-1, 1)
        n, n_blocks = maxima.shape
        token, block = (maxima >= lowest).nonzero().unbind(1)
        blocks = bits.view(n, -1, n_blocks)[token, :, block]
        row, within = (blocks >= (lowest if len(lowest) == 1 else lowest[token])).nonzero().unbind(1)
        values = blocks[row, within].view(torch.float32) if self.dtype == torch.float32 else None
        return _Candidates(token[row] + tile.start, block[row] + within * n_blocks + tile.first, values)

    def _evaluate(
        self, candidates: list[_Candidates], x: Tensor, W: Tensor, bias: Tensor, floor: Tensor | None = None
    ) -> ListedByFeature:
        shape = (len(x), len(W))
        token, feature = torch.cat([f.token for f in candidates]), torch.cat([f.feature for f in candidates])
        position = feature * len(x) + token
        # A stable sort of 32-bit numbers is a radix sort, which takes half the time.
        order = torch.sort(position.int() if len(x) * len(W) < 2**31 else position, stable=True).indices
        token, feature = token[order], feature[order]
        known_values = [f.values for f in candidates if f.values is not None]
        if known_values:
            values = torch.cat(known_values)[order]
            return ListedByFeature(token, feature, values if floor is None else values + floor[feature], shape)
        listed = ListedByFeature(token, feature, x.new_zeros(len(token)), shape)
        return ListedByFeature(token, feature, listed.inner(x, W) + bias[feature], shape)

    def _dense(self, x: Tensor, W: Tensor, bias: Tensor, floor: Tensor | None) -> DenseEntries:
        hidden_pre = torch.addmm(bias, x, W.T, out=self._buffer("dense", (len(x), len(W)), x, torch.float32))
        hidden_pre.relu_() if floor is None else torch.maximum(hidden_pre, floor, out=hidden_pre)
        return DenseEntries(hidden_pre, scratch=self._buffer("scratch", hidden_pre.shape, x, torch.float32))

    def _buffer(
        self, name: str, shape: tuple[int, ...] | torch.Size, like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != torch.Size(shape) or buffer.device != like.device:
            buffer = self._buffers[name] = torch.empty(shape, dtype=dtype or self.dtype, device=like.device)
        return buffer


@dataclass(frozen=True)
class _Product:
    """The factors of a product of activations and encoder, and its tiles."""

    x: Tensor  # [n, d_in]
    W: Tensor  # [d_sae, d_in]
    bias: Tensor  # [d_sae]

    @property
    def tile(self) -> int:
        """Features a tile: few enough for the result to be searched while it is in the cache."""
        return len(self.W) if self.W.is_cuda else min(_TILE, len(self.W))

    @property
    def tiles(self) -> range:
        return range(0, len(self.W), self.tile)


@dataclass(frozen=True)
class _Tile:
    hidden: Tensor  # [n, width]
    maxima: Tensor  # [n, n_blocks]: largest entry of each block; block b holds the features b, b + n_blocks, ...
    start: int  # first token
    first: int  # first feature


@dataclass(frozen=True)
class _Candidates:
    token: Tensor  # int64
    feature: Tensor  # int64
    values: Tensor | None  # float32; None after a bfloat16 product, an upper bound


# The bound. Write X for x rounded to bfloat16, V for w. Then x·w - X·V = x·(w - V) + (x - X)·V, which by Cauchy-Schwarz
# is at most |x| |w - V| + |x - X| |V|. Rounding to nearest is off by at most 2^-8 of a number, so |w - V| is at most
# 2^-8 |w| (measuring it would cost a pass over all weights); |x - X| is measured. The product of two bfloat16 numbers
# is exact in float32; adding K of them in float32, in any order, is off by at most K 2^-24 (|X| |V| + |bias|), and so
# is the later float32 value. All of that is added to the bias, which is then rounded upwards, so that the sum before
# its own rounding to bfloat16 is never below the float32 value. Rounding keeps order and sign. Numbers so small that a
# processor flushes them to zero, or whose squares vanish, are covered by an absolute term. tests/sae/test_encoder.py
# tests each step.
def _slack(x: Tensor, rounded: Tensor, length: Tensor, added: Tensor) -> Tensor:
    """How far the bfloat16 sum may be below the float32 value; `added`: total size of the terms added to it."""
    d_in = x.shape[1]
    longest = torch.linalg.vector_norm(x, dim=1).max()
    longest_error = torch.linalg.vector_norm(x - rounded, dim=1).max()
    rounding = length * (longest * _NEAREST + longest_error * (1 + _NEAREST))
    # Twice: the sum over bfloat16 products and the one in float32. Eight more terms for the operations after it.
    summing = (longest * length * (1 + 2.0**-6) + added) * (2 * (d_in + 8) * _UNIT)
    # The norms are float32 sums themselves.
    return (rounding + summing) * (1 + 2 * (d_in + 8) * _UNIT) + _VANISHING * (longest + length) + 2.0**-100


def _bits(values: Tensor) -> Tensor:
    """The floats' bits as integers: positive floats have the same order, and torch compares integers faster."""
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)


def _block_maxima(hidden: Tensor, block: int) -> Tensor:
    """Largest entry of each block of at most `block` features; of a block without a positive entry, any entry."""
    bits = _bits(hidden)
    while block > 1 and bits.shape[1] % 2 == 0:
        half, block = bits.shape[1] // 2, block // 2
        bits = torch.maximum(bits[:, :half], bits[:, half:])
    return bits.view(hidden.dtype)


def _among_top_k(entries: SparseEntries, k: int) -> Tensor:
    n = entries.shape[0]
    counts = torch.bincount(entries.token, minlength=n)
    if not len(entries.values) or int(counts.max()) <= k:
        return torch.ones_like(entries.values, dtype=torch.bool)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(entries.values), device=entries.token.device) - starts[entries.token]
    padded = entries.values.new_full((n, int(counts.max())), -torch.inf)
    padded[entries.token, rank] = entries.values
    chosen = torch.zeros_like(padded, dtype=torch.bool).scatter_(1, padded.topk(k, dim=1).indices, True)
    return chosen[entries.token, rank]


def _remove_weight(entries: SparseEntries, weight: Tensor | None) -> SparseEntries:
    if weight is not None:
        entries.values = entries.values / entries.per_feature(weight)
    return entries
