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
_VANISHING = 2.0**-56  # squares of what is below 2^-63 may vanish from a length, in up to 16,384 dimensions
_FARTHEST = 2.0**100  # beyond, or below its inverse, the scaling does not fit float32
_MARGIN = 2.0**-19  # for the rounding of sums and quotients of float32 numbers
_WIDTH = 2048  # columns of a tile: a product of 512 rows by a tile stays in the cache
# Sizes that fit in the cache.
_PART = 1024  # tokens in float64
_PAIRS = 128  # pairs evaluated
_SEARCH_ROWS = 64
_DENSE_ROWS, _DENSE_TOKENS = 32, 2048  # of a product in float64
# Rows with more of their blocks alive are evaluated whole; with fewer blocks in all the question does not arise.
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
        kept = valid.to(W_U.device).nonzero().flatten()
        self.n_valid, self.block = len(kept), block
        self.rounding = 0.0 if dtype == torch.float32 else 2.0**-8 * (1 + 2.0**-7)
        low, high = self._survey(valid.to(W_U.device))
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
        self.tiles = torch.empty(n_tiles, width, len(W_U), dtype=dtype, device=W_U.device)
        self._fill()

    def _survey(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Norms, centre, least and greatest number of the valid tokens by dimension, float64 [d_in], in parts."""
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

    def _fill(self) -> None:
        _, width, d_in = self.tiles.shape
        device, coarse = self.tiles.device, self.tiles.dtype != torch.float32
        self._length, self._error = torch.empty(2, len(self.ids), device=device)
        total = torch.zeros(d_in, dtype=torch.float64, device=device)
        gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=device) if coarse else None
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
        off = self.centre * self.scale - centre
        self.covariance = None if gram is None else gram / self.n_valid - torch.outer(off, off)

    def slack(self, rows: Rows) -> Tensor:
        """Bound on z' minus z before the last rounding, for all of the rows: float32, one a column."""
        d_in = self.tokens.shape[1]
        # The lengths are float32 sums themselves, and subtracting the centre was off by a rounding.
        longer = 1 + (d_in + 8) * _UNIT
        summing = (d_in + 16) * _UNIT * (1 + 2.0**-6)
        if self.tiles.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            summing += 2.0**-6  # the user allows factors to be rounded to as few as 8 bits
        length, error = self._length * longer, self._error * longer + _VANISHING
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
        self._some = self._columns.any(1)
        # Where not all can be chosen, the block's largest product may not count.
        self._unsure = ~self._columns.all(1)
        if divisor is not None:
            scaled = (divisor * tiles.scale)[token].float().view(-1, tiles.block)
            self._column_divisor = torch.where(self._columns, scaled, 1.0)
            # 1 over the least and over the greatest divisor of a block's choosable columns.
            inverse = 1 / self._column_divisor
            low = inverse.masked_fill(~self._columns, 0.0).amax(1)
            high = inverse.masked_fill(~self._columns, torch.inf).amin(1)
            self._ends = torch.stack([low, high]).masked_fill(~self._some, 0.0)
        far = float(torch.linalg.vector_norm(tiles.origin)) * tiles.scale + 1.0
        self._far = (len(tiles.origin) + 8) * 2.0**-51 * far
        self._least = 2.0**-148 * (tiles.scale if divisor is None else 1.0)

    def grain(self, rows: Rows, offset: Tensor) -> Tensor:
        """How far below the floor a token may be and still have an equal weight in float32: float32 [r, 1]."""
        size = offset.abs() + 1.0 if self._divisor is None else torch.ones_like(offset)
        return (2.0**-22 * size + self._far + self._least / rows.length).float()[:, None]

    def live_blocks(
        self, maxima: Tensor, doubt: Tensor, shift: Tensor, grain: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """The floor of each row [r, 1], and which blocks may hold a token that reaches it."""
        lower, upper = maxima - doubt, maxima + doubt
        if self._divisor is not None:
            # Positive bounds are widest over one end of the divisors, negative ones over the other.
            margin = _MARGIN * shift.abs()
            lower += shift - margin
            upper += shift + margin
            lower = torch.minimum(lower * self._ends[0], lower.mul_(self._ends[1]))
            upper = torch.maximum(upper * self._ends[0], upper.mul_(self._ends[1]))
        if lower.shape[1] < top_k:
            floor = torch.full_like(grain, -torch.inf)
        else:
            lower.masked_fill_(self._unsure, -torch.inf)
            floor = lower.topk(top_k, dim=1, sorted=False).values.amin(1, keepdim=True) - grain
        return floor, (upper >= floor).logical_and_(self._some)

    def reaching(self, highest: Tensor, block: Tensor, shift: Tensor, floor: Tensor) -> Tensor:
        """Which columns of some blocks may be at or above the floors of their rows: bool as `highest`."""
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
        slack, zero = tiles.slack(rows), rows.length == 0
        offset = rows.exact @ tiles.origin * (tiles.scale / rows.length)  # NaN for a row of zeros, which is set aside
        shift = offset.float()[:, None]
        whole = ~tiles.covers(rows) & ~zero
        grains = {name: scale.grain(rows, offset) for name, scale in self._scales.items()}
        floors, alive = self._search(maxima, slack, shift, grains)
        if alive.shape[1] >= _DENSE_BLOCKS:
            whole |= (alive.sum(1) > _DENSE_SHARE * alive.shape[1]) & ~zero
        usual = ~(whole | zero)
        row, token, near = self._candidates(products, alive.logical_and_(usual[:, None]), slack, shift, floors)
        values = self._pair_products(rows.exact, row, token)
        true = values * (tiles.scale / rows.length)[row] - offset[row]
        change = [torch.bincount(row, true**power - near**power, minlength=len(zero)) for power in (1, 2, 3, 4)]
        found = {}
        for name, scale in self._scales.items():
            # In a row of zeros all tokens are equal, so the first ones are best.
            weights = torch.zeros(len(zero), self._top_k, device=maxima.device)
            indices = scale.ids[: self._top_k].repeat(len(zero), 1)
            if len(row):
                weights[usual], indices[usual] = self._ordered(scale.weights(values, token), row, token)
            found[name] = weights, indices
        if bool(whole.any()):
            self._evaluate_whole(rows, whole.nonzero().flatten(), found)
        return found, torch.stack(change)

    def _evaluate_whole(self, rows: Rows, which: Tensor, found: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Evaluate every product in float64, for rows that the bound does not cover."""
        for part in which.split(_DENSE_ROWS):
            products = exact_products(rows.exact[part], self._tiles.tokens)
            for name, scale in self._scales.items():
                values, order = scale.weights(products, slice(None)).sort(dim=1, descending=True, stable=True)
                weights, indices = found[name]
                weights[part], indices[part] = values[:, : self._top_k], order[:, : self._top_k]

    def _search(
        self, maxima: Tensor, slack: Tensor, shift: Tensor, grains: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The floors of each scale [r, 1], and which blocks may hold a top token of any [r, n_blocks]."""
        alive = torch.zeros_like(maxima, dtype=torch.bool)
        floors = {name: torch.empty_like(grain) for name, grain in grains.items()}
        slack = slack.view(-1, self._tiles.block).amax(1)
        for start in range(0, len(maxima), _SEARCH_ROWS):
            here = slice(start, start + _SEARCH_ROWS)
            doubt = self._doubt(maxima[here], slack)
            for name, scale in self._scales.items():
                floors[name][here], live = scale.live_blocks(
                    maxima[here], doubt, shift[here], grains[name][here], self._top_k
                )
                alive[here] |= live
        return floors, alive

    def _doubt(self, products: Tensor, slack: Tensor) -> Tensor:
        """Bound on the distance of the true z from the products, including later rounding."""
        return torch.add(slack * (1 + _MARGIN), products.abs(), alpha=self._tiles.rounding + _MARGIN)

    def _candidates(
        self, products: Tensor, alive: Tensor, slack: Tensor, shift: Tensor, floors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, token ids and products (float64) of everything that may be a top token, by row, then by id."""
        tiles = self._tiles
        row, block = alive.nonzero(as_tuple=True)
        per_tile = products.shape[2] // tiles.block
        tile = block.div(per_tile, rounding_mode="floor")
        place = (tile * products.shape[1] + row) * per_tile + (block - tile * per_tile)
        near = products.view(-1, tiles.block)[place].float()
        possible = torch.zeros_like(near, dtype=torch.bool)
        highest = near + self._doubt(near, slack.view(-1, tiles.block)[block])
        for name, scale in self._scales.items():
            possible |= scale.reaching(highest, block, shift[row], floors[name][row])
        which, within = possible.nonzero(as_tuple=True)
        row, token = row[which], tiles.ids[block[which] * tiles.block + within]
        order = (row * len(tiles.tokens) + token).argsort()
        return row[order], token[order], near[which, within][order].double()

    def _pair_products(self, rows: Tensor, row: Tensor, token: Tensor) -> Tensor:
        values = torch.empty(len(row), dtype=torch.float64, device=rows.device)
        # Reuses memory: touching fresh memory costs ten times the arithmetic.
        for start in range(0, len(row), _PAIRS):
            here = slice(start, start + _PAIRS)
            n = len(row[here])
            gathered, factors = self._gathered[:n], self._factors[:n]
            torch.index_select(self._tiles.tokens, 0, token[here], out=gathered)
            torch.index_select(rows, 0, row[here], out=factors)
            torch.sum(factors.mul_(gathered), dim=1, out=values[here])
        return values

    def _ordered(self, weights: Tensor, row: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The best of each row that has candidates, which come by row, then by token id."""
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
        here = slice(start, start + _DENSE_TOKENS)
        products[:, here] = rows @ tokens[here].double().T
    if not bool(torch.isfinite(products.float()).all()):
        raise BadFile("the product of W_dec and W_U overflows float32.", at="W_dec, W_U")
    return products
