"""The unembedding laid out for one pass of products that may be coarse: centred, scaled, in tiles, with error bounds.

A row x of W_dec promotes token t by x·u_t. Write n = |x|, ū for the mean over tokens (rounded to float32), s for a
power of two that brings the longest u_t - ū to a length of at most 1 and not far below, and c_t = s (u_t - ū). Then
x·u_t = n z_t / s + x·ū with z_t = (x / n)·c_t: within a row the order of z_t is that of x·u_t, and no z_t is above 1.
The products computed are z'_t = X·V_t, where X is x / n and V_t is c_t, both rounded to the dtype of the tiles.

The bound. z_t - X·V_t = X·(c_t - V_t) + (x/n - X)·c_t, so by Cauchy-Schwarz it is at most |X| e_t + a (|V_t| + e_t)
with e_t = |c_t - V_t| and a = |x/n - X|. These lengths are measured and not assumed. Products of two bfloat16 numbers
are exact in float32, those of two float32 numbers are not; K of them, added in float32 in whatever order, are off by at
most (K + 1) 2^-24 |X| |V_t| to first order. Last, z'_t may itself be rounded to bfloat16, by 2^-8 of its size.
Numbers that vanish (squares below 2^-126, what a processor flushes to zero) are covered by an absolute term, which
the scaling makes meaningful. `tests/features/test_projection_exact.py` tries to break it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows", "UnembeddingTiles"]

_UNIT = 2.0**-24  # float32: rounding is off by at most this share
_VANISHING = 2.0**-56  # squares of what is below 2^-63 may vanish from a length, in up to 16,384 dimensions
_FARTHEST = 2.0**100  # beyond, or below its inverse, float32 has no room for the scaling
_PART = 1024  # tokens in float64 at a time
_WIDTH = 2048  # columns of a tile: a product of 512 rows by a tile stays in the cache


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of W_dec, made ready for the products.

    Attributes:
        exact: The rows, float64 [r, d_in].
        length: Their Euclidean lengths, float64 [r].
        unit: Divided by their lengths, in the dtype of the tiles [r, d_in]; zero for a row of zeros.
        error: Largest distance of a row of `unit` from the true unit vector.
        direction: As `unit`, in float32.
    """

    exact: Tensor
    length: Tensor
    unit: Tensor
    error: float
    direction: Tensor

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype) -> Rows:
        """From rows of any float dtype [r, d_in]."""
        exact = rows.double()
        length = torch.linalg.vector_norm(exact, dim=1)
        true = exact / torch.where(length > 0, length, 1.0)[:, None]
        direction = true.float()
        unit = direction.to(dtype)
        error = torch.linalg.vector_norm(true - unit, dim=1).max()
        return cls(exact, length, unit, float(error), direction)


class UnembeddingTiles:
    """W_U's valid columns, in an order and a shape that make the largest products of a row cheap to find.

    Columns come in the order of their lengths, cut into tiles, and each tile into blocks of `block` columns among which
    the tile's columns are dealt: blocks of one tile are alike, and columns of one block are too.

    Args:
        W_U: Float [d_in, d_vocab], finite.
        valid: Bool [d_vocab]: tokens to lay out; all if None.
        block: Columns a block.
        dtype: Of the tiles: torch.float32 or torch.bfloat16.

    Attributes:
        tokens: W_U transposed, float32 [d_vocab, d_in], in the order of the vocabulary.
        norms: Length of each row of `tokens`, float64 [d_vocab].
        centre: Mean over valid tokens, float64 [d_in].
        origin: The centre as it was subtracted, rounded to float32 at `scale`; float64 [d_in].
        largest: Largest size of a valid token's number in each dimension, float64 [d_in].
        n_valid: Number of valid tokens.
        scale: Columns were multiplied by this power of two.
        tiles: [n_tiles, width, d_in].
        ids: Token of each column, int64 [n_tiles * width]; -1 for a column of zeros that fills up the first tile.
        mean: Mean of the tiles' columns, float64 [d_in]: small, but for rounding it would be 0.
        spread: Sum over dimensions of the variance of the valid tokens, times `scale` squared.
        covariance: Of the valid tokens, times `scale` squared, float64 [d_in, d_in]; None in float32, where the
            products tell as much.
    """

    def __init__(self, W_U: Tensor, valid: Tensor | None, block: int, dtype: torch.dtype) -> None:
        self.tokens = W_U.T.float().contiguous()
        every = torch.arange(len(self.tokens), device=W_U.device)
        kept = every if valid is None else every[valid.to(W_U.device)]
        self.n_valid, self.block = len(kept), block
        low, high = self._survey(torch.ones_like(every, dtype=torch.bool) if valid is None else valid.to(W_U.device))
        # At least the length of the longest column about the centre, at most sqrt(d_in) times that.
        reach = float(torch.linalg.vector_norm(torch.maximum(high - self.centre, self.centre - low)))
        self.largest = torch.maximum(low.abs(), high.abs())
        self._in_range = reach == 0 or 1 / _FARTHEST <= reach <= _FARTHEST
        self.scale = 2.0 ** -math.ceil(math.log2(reach)) if reach > 0 and self._in_range else 1.0
        n_tiles = -(-self.n_valid // _WIDTH)
        width = -(-self.n_valid // (n_tiles * block)) * block
        padding = torch.full((n_tiles * width - self.n_valid,), -1, device=W_U.device)
        by_length = kept[self.norms[kept].argsort(stable=True)]
        dealt = torch.cat([padding, by_length]).view(n_tiles, block, width // block)
        self.ids = dealt.transpose(1, 2).reshape(-1)
        self._fill(n_tiles, width, dtype)

    def _survey(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Norms and centre; least and greatest number of the valid tokens in each dimension, float64 [d_in].

        A few tokens at a time, since all of them in float64 would be twice as large as W_U.
        """
        n, d_in = self.tokens.shape
        self.norms = torch.empty(n, dtype=torch.float64, device=self.tokens.device)
        total = torch.zeros(d_in, dtype=torch.float64, device=self.tokens.device)
        low, high = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
        for start in range(0, n, _PART):
            here = slice(start, start + _PART)
            part = self.tokens[here].double()
            torch.linalg.vector_norm(part, dim=1, out=self.norms[here])
            part = part[valid[here]]
            if len(part):
                total += part.sum(dim=0)
                low, high = torch.minimum(low, part.amin(dim=0)), torch.maximum(high, part.amax(dim=0))
        self.centre = total / self.n_valid
        return low, high

    def _fill(self, n_tiles: int, width: int, dtype: torch.dtype) -> None:
        """The tiles, and what is measured on them."""
        d_in, device = self.tokens.shape[1], self.tokens.device
        self.tiles = torch.empty(n_tiles, width, d_in, dtype=dtype, device=device)
        self._length = torch.empty(n_tiles * width, device=device)
        self._error = torch.empty(n_tiles * width, device=device)
        total = torch.zeros(d_in, dtype=torch.float64, device=device)
        gram = None if dtype == torch.float32 else torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        exact = torch.empty(width, d_in, device=device)
        centre = (self.centre * self.scale).float()
        self.origin = centre.double() / self.scale
        for i, tile in enumerate(self.tiles):
            here = slice(i * width, (i + 1) * width)
            ids = self.ids[here]
            torch.index_select(self.tokens, 0, ids.clamp_min(0), out=exact)
            exact.mul_(self.scale).sub_(centre)
            exact[ids < 0] = 0.0
            tile.copy_(exact)
            total += tile.sum(dim=0, dtype=torch.float64)
            if gram is not None:
                gram += exact.T @ exact
            torch.linalg.vector_norm(exact, dim=1, out=self._length[here])
            torch.linalg.vector_norm(exact.sub_(tile), dim=1, out=self._error[here])
        self.mean = total / self.n_valid
        self.spread = float(self._length.double().square().sum()) / self.n_valid
        self.covariance = gram
        if gram is not None:
            off = self.centre * self.scale - centre
            self.covariance = gram / self.n_valid - torch.outer(off, off)

    @property
    def rounding(self) -> float:
        """Share of its size by which a product may be off from being rounded to the tiles' dtype."""
        return 0.0 if self.tiles.dtype == torch.float32 else 2.0**-8 * (1 + 2.0**-7)

    def slack(self, rows: Rows) -> Tensor:
        """How far z' before its last rounding may be from z, for any of the rows: float32, one a column."""
        d_in = self.tokens.shape[1]
        unit = 1 + rows.error
        # The lengths are float32 sums themselves, and subtracting the centre was off by a rounding.
        longer = 1 + (d_in + 8) * _UNIT
        summing = (d_in + 16) * _UNIT * (1 + 2.0**-6)
        if self.tiles.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            summing += 2.0**-6  # the user allows factors to be rounded to as few as 8 bits
        length, error = self._length * longer, self._error * longer + _VANISHING
        return unit * (error + summing * length) + rows.error * (length + error) + _VANISHING

    def covers(self, rows: Rows) -> Tensor:
        """Rows for which the bound holds and no product can overflow float32; bool [r], False for rows of zeros."""
        longest = float(self.norms[self.ids[self.ids >= 0]].max())
        near = rows.length * longest < torch.finfo(torch.float32).max / 4
        return near & (rows.length > 2.0**-120) & self._in_range
