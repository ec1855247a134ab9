"""The exact top tokens of some rows of W_dec, from products with W_U that are known up to a bound.

A row x promotes token t by x·u_t. Write n = |x|, ū for the mean over tokens (rounded to float32), s for a power of two
that brings the longest u_t - ū to a length of at most 1 and not far below, and c_t = s (u_t - ū). Then x·u_t = n z_t/s
+ x·ū with z_t = (x / n)·c_t, so z_t ranks a row's tokens, and no z_t is above 1. The computed products are z'_t =
X·V_t, with X = x / n and V_t = c_t, both rounded to the dtype of the tiles.

Bound: z_t - X·V_t = X·(c_t - V_t) + (x/n - X)·c_t, so by Cauchy-Schwarz it is at most |X| e_t + a (|V_t| + e_t), with
e_t = |c_t - V_t| and a = |x/n - X|, both measured. Products of bfloat16 numbers are exact in float32, those of float32
numbers are not; a sum of K in float32, in any order, is off by at most (K + 1) 2^-24 |X| |V_t| to first order. Last,
z'_t may be rounded to bfloat16, by 2^-8 of its size. An absolute term covers squares below 2^-126, which a processor
may flush to zero. `tests/features/test_projection_exact.py` tests the bound.

Search: the largest product of every block of columns, less its slack, is taken; the k-th largest of these is a floor
that the k-th best token reaches. Blocks, then columns, whose product plus slack is below the floor hold no top token.
The rest, some twenty tokens a row, is evaluated in float64 and rounded to float32. So the result does not depend on the
products' dtype, their tiling, or the processor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saeffect.errors import BadFile

__all__ = ["Rows", "TopTokens", "UnembeddingTiles", "exact_products"]

_UNIT = 2.0**-24  # float32: rounding is off by at most this share
_VANISHING = 2.0**-56  # error of a length in which squares of numbers below 2^-63 vanish, up to 16,384 dimensions
_FARTHEST = 2.0**100  # above this, or below its inverse, the scaled numbers do not fit float32
_MARGIN = 2.0**-19  # for the rounding of sums and quotients of float32 numbers
_WIDTH = 2048  # columns of a tile: a product of 512 rows by a tile stays in the cache
# Block sizes that fit in the cache.
_PART = 1024  # tokens converted to float64
_PAIRS = 128  # pairs evaluated
_SEARCH_ROWS = 64
_DENSE_ROWS, _DENSE_TOKENS = 32, 2048  # of a product in float64
# Rows with a larger share of blocks left are evaluated whole, if there are at least _DENSE_BLOCKS blocks.
_DENSE_SHARE, _DENSE_BLOCKS = 0.125, 64


class Rows:
    """Rows of W_dec [r, d_in], prepared for products in the tiles' `dtype`."""

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.exact = rows.double()
        self.length = torch.linalg.vector_norm(self.exact, dim=1)
        true = self.exact / torch.where(self.length > 0, self.length, 1.0)[:, None]  # zero for a row of zeros
        self.direction = true.float()
        self.unit = self.direction.to(dtype)
        # Largest distance of a row of `unit` from the true unit vector.
        self.error = float(torch.linalg.vector_norm(true - self.unit, dim=1).max())


class UnembeddingTiles:
    """W_U's valid columns, laid out so that the largest products of a row are cheap to find.

    Columns are sorted by length and cut into tiles of float32 or bfloat16 (`dtype`); a tile's columns are dealt into
    blocks of `block` columns. W_U is float [d_in, d_vocab], finite; `valid` bool [d_vocab], all if None.

    Attributes:
        tokens: W_U transposed, float32 [d_vocab, d_in], in the order of the vocabulary.
        norms: Length of each row of `tokens`, float64 [d_vocab].
        centre: Mean over valid tokens, float64 [d_in]; `origin` is its rounded value, as subtracted.
        largest: Largest size of a valid token's number in each dimension, float64 [d_in].
        scale: Power of two by which columns were multiplied.
        tiles: [n_tiles, width, d_in].
        ids: Token of each column, int64 [n_tiles * width]; -1 for the zero columns that pad the first tile.
        mean: Mean of the tiles' columns, float64 [d_in]: 0 up to rounding.
        spread: Sum over dimensions of the variance of the valid tokens, times `scale` squared.
        covariance: The same as a matrix [d_in, d_in]; None in float32, where it is not needed.
        rounding: Largest relative error of a product from rounding to the tiles' dtype.
    """

    def __init__(self, W_U: Tensor, valid: Tensor | None, block: int, dtype: torch.dtype) -> None:
        self.tokens = W_U.T.float().contiguous()
        valid = torch.ones(len(self.tokens), dtype=torch.bool) if valid is None else valid
        valid_ids = valid.to(W_U.device).nonzero().flatten()
        self.n_valid, self.block = len(valid_ids), block
        self.rounding = 0.0 if dtype == torch.float32 else 2.0**-8 * (1 + 2.0**-7)
        low, high = self._measure_columns(valid.to(W_U.device))
        # At least the length of the longest column about the centre, at most sqrt(d_in) times that.
        radius = float(torch.linalg.vector_norm(torch.maximum(high - self.centre, self.centre - low)))
        self.largest = torch.maximum(low.abs(), high.abs())
        self._in_range = radius == 0 or 1 / _FARTHEST <= radius <= _FARTHEST
        self.scale = 2.0 ** -math.ceil(math.log2(radius)) if radius > 0 and self._in_range else 1.0
        n_tiles = -(-self.n_valid // _WIDTH)
        width = -(-self.n_valid // (n_tiles * block)) * block
        padding = torch.full((n_tiles * width - self.n_valid,), -1, device=W_U.device)
        by_length = valid_ids[self.norms[valid_ids].argsort(stable=True)]
        dealt = torch.cat([padding, by_length]).view(n_tiles, block, width // block)
        self.ids = dealt.transpose(1, 2).reshape(-1)
        self.tiles = torch.empty(n_tiles, width, len(W_U), dtype=dtype, device=W_U.device)
        self._fill_tiles()

    def _measure_columns(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Norms, centre, least and greatest number of the valid tokens by dimension, float64 [d_in], in parts."""
        n, d_in = self.tokens.shape
        self.norms = torch.empty(n, dtype=torch.float64, device=self.tokens.device)
        total = torch.zeros(d_in, dtype=torch.float64, device=self.tokens.device)
        low, high = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
        for start in range(0, n, _PART):
            block = slice(start, start + _PART)
            part = self.tokens[block].double()
            torch.linalg.vector_norm(part, dim=1, out=self.norms[block])
            part = part[valid[block]]
            if len(part):
                total += part.sum(dim=0)
                low, high = torch.minimum(low, part.amin(dim=0)), torch.maximum(high, part.amax(dim=0))
        self.centre = total / self.n_valid
        return low, high

    def _fill_tiles(self) -> None:
        _, width, d_in = self.tiles.shape
        device, coarse = self.tiles.device, self.tiles.dtype != torch.float32
        self._lengths, self._errors = torch.empty(2, len(self.ids), device=device)
        total = torch.zeros(d_in, dtype=torch.float64, device=device)
        gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=device) if coarse else None
        exact = torch.empty(width, d_in, device=device)
        centre = (self.centre * self.scale).float()
        self.origin = centre.double() / self.scale
        for i, tile in enumerate(self.tiles):
            columns = slice(i * width, (i + 1) * width)
            ids = self.ids[columns]
            torch.index_select(self.tokens, 0, ids.clamp_min(0), out=exact)
            exact.mul_(self.scale).sub_(centre)
            exact[ids < 0] = 0.0
            tile.copy_(exact)
            total += tile.sum(dim=0, dtype=torch.float64)
            if gram is not None:
                gram += exact.T @ exact
            torch.linalg.vector_norm(exact, dim=1, out=self._lengths[columns])
            torch.linalg.vector_norm(exact.sub_(tile), dim=1, out=self._errors[columns])
        self.mean = total / self.n_valid
        self.spread = float(self._lengths.double().square().sum()) / self.n_valid
        shift = self.centre * self.scale - centre
        self.covariance = None if gram is None else gram / self.n_valid - torch.outer(shift, shift)

    def slack(self, rows: Rows) -> Tensor:
        """Bound on z' minus z before the last rounding, for all of the rows: float32, one a column."""
        d_in = self.tokens.shape[1]
        # The lengths are float32 sums themselves, and subtracting the centre rounded once more.
        rounded_up = 1 + (d_in + 8) * _UNIT
        summing = (d_in + 16) * _UNIT * (1 + 2.0**-6)
        if self.tiles.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            summing += 2.0**-6  # the user allows factors to be rounded to as few as 8 bits
        length, error = self._lengths * rounded_up, self._errors * rounded_up + _VANISHING
        return (1 + rows.error) * (error + summing * length) + rows.error * (length + error) + _VANISHING

    def covers(self, rows: Rows) -> Tensor:
        """Rows for which the bound holds and no product can overflow float32; bool [r], False for rows of zeros."""
        longest = float(self.norms[self.ids[self.ids >= 0]].max())
        near = rows.length * longest < torch.finfo(torch.float32).max / 4
        return near & (rows.length > 2.0**-120) & self._in_range


class _Scale:
    """One ranking, by `x·u_t / divisor_t` or, without a divisor, by z_t, on the layout of the tiles."""

    def __init__(self, tiles: UnembeddingTiles, divisor: Tensor | None, choosable: Tensor) -> None:
        self._divisor, self._choosable = divisor, choosable
        self.ids = choosable.nonzero().flatten()
        token = tiles.ids.clamp_min(0)
        self._columns = ((tiles.ids >= 0) & choosable[token]).view(-1, tiles.block)
        self._any_choosable = self._columns.any(1)
        # If only some tokens of a block can be chosen, its largest product may belong to one of the others.
        self._partly_choosable = ~self._columns.all(1)
        if divisor is not None:
            scaled = (divisor * tiles.scale)[token].float().view(-1, tiles.block)
            self._column_divisor = torch.where(self._columns, scaled, 1.0)
            # 1 over the least and over the greatest divisor of a block's choosable columns.
            inverse = 1 / self._column_divisor
            low = inverse.masked_fill(~self._columns, 0.0).amax(1)
            high = inverse.masked_fill(~self._columns, torch.inf).amin(1)
            self._ends = torch.stack([low, high]).masked_fill(~self._any_choosable, 0.0)
        radius = float(torch.linalg.vector_norm(tiles.origin)) * tiles.scale + 1.0
        self._origin_rounding = (len(tiles.origin) + 8) * 2.0**-51 * radius
        self._smallest = 2.0**-148 * (tiles.scale if divisor is None else 1.0)

    def tie_tolerance(self, rows: Rows, offset: Tensor) -> Tensor:
        """How far below the floor a token's z may lie while its float32 weight is equal: float32 [r, 1]."""
        size = offset.abs() + 1.0 if self._divisor is None else torch.ones_like(offset)
        return (2.0**-22 * size + self._origin_rounding + self._smallest / rows.length).float()[:, None]

    def live_blocks(
        self, maxima: Tensor, bound: Tensor, shift: Tensor, tolerance: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """The floor of each row [r, 1], and which blocks may hold a token that reaches it."""
        lower, upper = maxima - bound, maxima + bound
        if self._divisor is not None:
            # Positive bounds are widest over one end of the divisors, negative ones over the other.
            margin = _MARGIN * shift.abs()
            lower += shift - margin
            upper += shift + margin
            lower = torch.minimum(lower * self._ends[0], lower.mul_(self._ends[1]))
            upper = torch.maximum(upper * self._ends[0], upper.mul_(self._ends[1]))
        if lower.shape[1] < top_k:
            floor = torch.full_like(tolerance, -torch.inf)
        else:
            lower.masked_fill_(self._partly_choosable, -torch.inf)
            floor = lower.topk(top_k, dim=1, sorted=False).values.amin(1, keepdim=True) - tolerance
        return floor, (upper >= floor).logical_and_(self._any_choosable)

    def reaching(self, highest: Tensor, block: Tensor, shift: Tensor, floor: Tensor) -> Tensor:
        """Which columns of the given blocks may reach the floors of their rows: bool, shaped as `highest`."""
        if self._divisor is not None:
            highest = (highest + (shift + _MARGIN * shift.abs())) / self._column_divisor[block]
        return (highest >= floor).logical_and_(self._columns[block])

    def weights(self, products: Tensor, token: Tensor | slice) -> Tensor:
        """Weights in float32 of true products float64 [..., n]; minus infinity for tokens that cannot be chosen."""
        values = (products if self._divisor is None else products / self._divisor[token]).float()
        return values.masked_fill_(~self._choosable[token], -torch.inf)


class TopTokens:
    """Finds the `top_k` best tokens of rows on one or more scales: by name float64 [d_vocab], the divisor of a
    token's product, or None for 1; and bool [d_vocab], the tokens that can be chosen, all of them valid ones and at
    least `top_k`.
    """

    def __init__(self, tiles: UnembeddingTiles, top_k: int, scales: dict[str, tuple[Tensor | None, Tensor]]) -> None:
        self._tiles, self._top_k = tiles, top_k
        d_in, device = tiles.tokens.shape[1], tiles.tokens.device
        self._gathered = torch.empty(_PAIRS, d_in, device=device)
        self._factors = torch.empty(_PAIRS, d_in, dtype=torch.float64, device=device)
        self._scales = {name: _Scale(tiles, *scale) for name, scale in scales.items()}

    def find(self, products: Tensor, maxima: Tensor, rows: Rows) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """By scale the best tokens: weights float32 [r, top_k] and ids int64 [r, top_k], ties by id; and a
        correction, float64 [4, r]: the change of the sums of the first four powers of a row's products when true
        products replace the evaluated ones. `products` of the tiles are [n_tiles, r, width], contiguous; `maxima` of
        the blocks float32 [r, n_blocks].
        """
        tiles = self._tiles
        slack, is_zero = tiles.slack(rows), rows.length == 0
        offset = rows.exact @ tiles.origin * (tiles.scale / rows.length)  # NaN for a row of zeros, handled apart
        shift = offset.float()[:, None]
        dense = ~tiles.covers(rows) & ~is_zero
        tolerances = {name: scale.tie_tolerance(rows, offset) for name, scale in self._scales.items()}
        floors, alive = self._search(maxima, slack, shift, tolerances)
        if alive.shape[1] >= _DENSE_BLOCKS:
            dense |= (alive.sum(1) > _DENSE_SHARE * alive.shape[1]) & ~is_zero
        searched = ~(dense | is_zero)
        row, token, rounded = self._candidates(products, alive.logical_and_(searched[:, None]), slack, shift, floors)
        values = self._pair_products(rows.exact, row, token)
        exact = values * (tiles.scale / rows.length)[row] - offset[row]
        n = len(is_zero)
        correction = [torch.bincount(row, exact**power - rounded**power, minlength=n) for power in (1, 2, 3, 4)]
        best = {}
        for name, scale in self._scales.items():
            # In a row of zeros all tokens are equal, so the first ones are best.
            weights = torch.zeros(n, self._top_k, device=maxima.device)
            indices = scale.ids[: self._top_k].repeat(n, 1)
            if len(row):
                weights[searched], indices[searched] = self._best_per_row(scale.weights(values, token), row, token)
            best[name] = weights, indices
        if bool(dense.any()):
            self._evaluate_whole(rows, dense.nonzero().flatten(), best)
        return best, torch.stack(correction)

    def _evaluate_whole(self, rows: Rows, dense_rows: Tensor, best: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Evaluate every product in float64, for rows that the bound does not cover."""
        for part in dense_rows.split(_DENSE_ROWS):
            products = exact_products(rows.exact[part], self._tiles.tokens)
            for name, scale in self._scales.items():
                values, order = scale.weights(products, slice(None)).sort(dim=1, descending=True, stable=True)
                weights, indices = best[name]
                weights[part], indices[part] = values[:, : self._top_k], order[:, : self._top_k]

    def _search(
        self, maxima: Tensor, slack: Tensor, shift: Tensor, tolerances: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The floors of each scale [r, 1], and which blocks may hold a top token of any [r, n_blocks]."""
        alive = torch.zeros_like(maxima, dtype=torch.bool)
        floors = {name: torch.empty_like(tolerance) for name, tolerance in tolerances.items()}
        slack = slack.view(-1, self._tiles.block).amax(1)
        for start in range(0, len(maxima), _SEARCH_ROWS):
            batch = slice(start, start + _SEARCH_ROWS)
            bound = self._error_bound(maxima[batch], slack)
            for name, scale in self._scales.items():
                floors[name][batch], live = scale.live_blocks(
                    maxima[batch], bound, shift[batch], tolerances[name][batch], self._top_k
                )
                alive[batch] |= live
        return floors, alive

    def _error_bound(self, products: Tensor, slack: Tensor) -> Tensor:
        """Bound on the distance of the true z from the products, including later rounding."""
        return torch.add(slack * (1 + _MARGIN), products.abs(), alpha=self._tiles.rounding + _MARGIN)

    def _candidates(
        self, products: Tensor, alive: Tensor, slack: Tensor, shift: Tensor, floors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, token ids and products (float64) of all possible top tokens, sorted by row, then by id."""
        tiles = self._tiles
        row, block = alive.nonzero(as_tuple=True)
        per_tile = products.shape[2] // tiles.block
        tile = block.div(per_tile, rounding_mode="floor")
        position = (tile * products.shape[1] + row) * per_tile + (block - tile * per_tile)
        rounded = products.view(-1, tiles.block)[position].float()
        possible = torch.zeros_like(rounded, dtype=torch.bool)
        highest = rounded + self._error_bound(rounded, slack.view(-1, tiles.block)[block])
        for name, scale in self._scales.items():
            possible |= scale.reaching(highest, block, shift[row], floors[name][row])
        pair, column = possible.nonzero(as_tuple=True)
        row, token = row[pair], tiles.ids[block[pair] * tiles.block + column]
        order = (row * len(tiles.tokens) + token).argsort()
        return row[order], token[order], rounded[pair, column][order].double()

    def _pair_products(self, rows: Tensor, row: Tensor, token: Tensor) -> Tensor:
        values = torch.empty(len(row), dtype=torch.float64, device=rows.device)
        # Reuses memory: touching fresh memory costs ten times the arithmetic.
        for start in range(0, len(row), _PAIRS):
            pairs = slice(start, start + _PAIRS)
            n = len(row[pairs])
            gathered, factors = self._gathered[:n], self._factors[:n]
            torch.index_select(self._tiles.tokens, 0, token[pairs], out=gathered)
            torch.index_select(rows, 0, row[pairs], out=factors)
            torch.sum(factors.mul_(gathered), dim=1, out=values[pairs])
        return values

    def _best_per_row(self, weights: Tensor, row: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The best tokens of each row that has candidates; these are sorted by row, then by token id."""
        order = weights.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        counts = torch.bincount(row)
        counts = counts[counts > 0]
        starts = counts.cumsum(0) - counts
        best = order[starts[:, None] + torch.arange(self._top_k, device=row.device)]
        return weights[best], token[best]


def exact_products(rows: Tensor, tokens: Tensor) -> Tensor:
    """`rows @ tokens.T`, float64 [r, d_vocab], for a few float64 rows [r, d_in]; `BadFile` on float32 overflow."""
    products = torch.empty(len(rows), len(tokens), dtype=torch.float64, device=rows.device)
    for start in range(0, len(tokens), _DENSE_TOKENS):
        columns = slice(start, start + _DENSE_TOKENS)
        products[:, columns] = rows @ tokens[columns].double().T
    if not bool(torch.isfinite(products.float()).all()):
        raise BadFile("the product of W_dec and W_U overflows float32.", at="W_dec, W_U")
    return products
