"""The exact top tokens of some rows, out of products that are known up to a bound.

Of every block of columns only the largest product is looked at. Less its slack, the k-th largest of those is a floor
that the k-th best token reaches; blocks and then columns whose product plus slack stays under the floor hold no top
token. What is left, some twenty tokens a row, is evaluated in float64 and rounded to float32. So the result does not
depend on the dtype of the products, on how they were cut up, or on the processor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import BadFile
from saeffect.features.unembedding_tiles import Rows, UnembeddingTiles

__all__ = ["TopTokens", "exact_products"]

_MARGIN = 2.0**-19  # for the rounding of sums and quotients of float32 numbers
_PAIRS = 128  # evaluated at a time: stays in the cache
_DENSE_SHARE = 0.125  # rows with more of their blocks alive are evaluated whole
_DENSE_BLOCKS = 64  # with fewer blocks in all the question does not arise
_DENSE_ROWS = 32
_SEARCH_ROWS = 64  # searched at a time: stays in the cache
_DENSE_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class _Scale:
    """One ranking, `x·u_t / divisor_t`, on the layout of the tiles.

    `inverse` holds 1 over the least and over the greatest divisor of a block's choosable columns, at the tiles' scale.
    `some` blocks have such columns. In an `unsure` block not all can be chosen, so its largest product may not count.
    """

    divisor: Tensor  # float64 [d_vocab]
    choosable: Tensor  # bool [d_vocab]
    column_divisor: Tensor  # float32 [n_columns], 1 where it cannot be chosen
    column_choosable: Tensor  # bool [n_columns]
    inverse: Tensor  # float32 [2, n_blocks]
    some: Tensor  # bool [n_blocks]
    unsure: Tensor
    ids: Tensor  # int64, the choosable tokens

    @classmethod
    def of(cls, tiles: UnembeddingTiles, divisor: Tensor, choosable: Tensor) -> _Scale:
        there = tiles.ids >= 0
        column_choosable = there & choosable[tiles.ids.clamp_min(0)]
        scaled = (divisor * tiles.scale)[tiles.ids.clamp_min(0)].float()
        column_divisor = torch.where(column_choosable, scaled, 1.0)
        blocks = column_choosable.view(-1, tiles.block)
        inverse = (1 / column_divisor).view(-1, tiles.block)
        ends = torch.stack([inverse.masked_fill(~blocks, 0.0).amax(1), inverse.masked_fill(~blocks, torch.inf).amin(1)])
        some = blocks.any(1)
        ends[:, ~some] = 0.0
        ids = choosable.nonzero().flatten()
        return cls(divisor, choosable, column_divisor, column_choosable, ends, some, ~blocks.all(1), ids)


class TopTokens:
    """Finds the best tokens of rows on one or more scales.

    Args:
        tiles: The unembedding.
        top_k: How many tokens; at most the fewest that a scale can choose among.
        scales: By name: float64 [d_vocab], what a token's product is divided by, or None for 1; and bool [d_vocab], the
            tokens that can be chosen, all of them valid ones.
    """

    def __init__(self, tiles: UnembeddingTiles, top_k: int, scales: dict[str, tuple[Tensor | None, Tensor]]) -> None:
        self._tiles, self._top_k = tiles, top_k
        d_in, device = tiles.tokens.shape[1], tiles.tokens.device
        self._gathered = torch.empty(_PAIRS, d_in, device=device)
        self._factors = torch.empty(_PAIRS, d_in, dtype=torch.float64, device=device)
        # Without a divisor z itself is ranked, so the divisor is 1 over the tiles' scale.
        ones = torch.ones_like(tiles.norms)
        self._plain = {name for name, (divisor, _) in scales.items() if divisor is None}
        self._scales = {
            name: _Scale.of(tiles, ones / tiles.scale if divisor is None else divisor, choosable)
            for name, (divisor, choosable) in scales.items()
        }

    def find(self, products: Tensor, maxima: Tensor, rows: Rows) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """The best tokens, and what evaluating them says of the products' rounding.

        Returns:
            By scale, weights float32 [r, top_k] and token ids int64 [r, top_k], equal weights by token id; and float64
            [4, r], by how much the sums of the first four powers of a row's products change if those of the tokens that
            were evaluated are replaced by the true ones.

        Args:
            products: Each tile's, [n_tiles, r, width], contiguous.
            maxima: Largest product of each block, float32 [r, n_blocks].
            rows: What was multiplied.

        Raises:
            BadFile: A product overflows float32.
        """
        tiles = self._tiles
        slack = tiles.slack(rows)
        offset = rows.exact @ tiles.origin * (tiles.scale / rows.length)  # NaN for a row of zeros, which is set aside
        shift = offset.float()[:, None]
        zero = rows.length == 0
        whole = ~tiles.covers(rows) & ~zero
        floors, alive = self._search(
            maxima, slack, shift, {name: self._grain(name, rows, offset) for name in self._scales}
        )
        if alive.shape[1] >= _DENSE_BLOCKS:
            whole |= (alive.sum(1) > _DENSE_SHARE * alive.shape[1]) & ~zero
        usual = ~(whole | zero)
        alive.logical_and_(usual[:, None])
        row, token, near = self._candidates(products, alive, slack, shift, floors)
        values = self._pair_products(rows.exact, row, token)
        true = values * (tiles.scale / rows.length)[row] - offset[row]
        change = [torch.bincount(row, true**power - near**power, minlength=len(zero)) for power in (1, 2, 3, 4)]
        found = {}
        for name, scale in self._scales.items():
            weights = torch.zeros(len(zero), self._top_k, device=maxima.device)
            # In a row of zeros all tokens are equal, so the first ones are best.
            indices = scale.ids[: self._top_k].repeat(len(zero), 1)
            if len(row):
                weights[usual], indices[usual] = self._ordered(name, scale, row, token, values)
            found[name] = weights, indices
        if bool(whole.any()):
            self._evaluate_whole(rows, whole.nonzero().flatten(), found)
        return found, torch.stack(change)

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
                floor, live = self._live_blocks(name, scale, maxima[here], doubt, shift[here], grains[name][here])
                floors[name][here] = floor
                alive[here] |= live
        return floors, alive

    def _grain(self, name: str, rows: Rows, offset: Tensor) -> Tensor:
        """How far below the floor a token may be and still have an equal weight in float32: float32 [r, 1]."""
        tiles = self._tiles
        far = float(torch.linalg.vector_norm(tiles.origin)) * tiles.scale + 1.0
        size = offset.abs() + 1.0 if name in self._plain else torch.ones_like(offset)
        grain = 2.0**-22 * size + (len(tiles.origin) + 8) * 2.0**-51 * far
        least = tiles.scale if name in self._plain else 1.0
        return (grain + 2.0**-148 * least / rows.length).float()[:, None]

    def _live_blocks(
        self, name: str, scale: _Scale, maxima: Tensor, doubt: Tensor, shift: Tensor, grain: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The floor of each row [r, 1], and which blocks may hold a token that reaches it."""
        lower, upper = maxima - doubt, maxima + doubt
        if name not in self._plain:
            # Positive bounds are widest over one end of the divisors, negative ones over the other.
            margin = _MARGIN * shift.abs()
            lower += shift - margin
            upper += shift + margin
            lower = torch.minimum(lower * scale.inverse[0], lower.mul_(scale.inverse[1]))
            upper = torch.maximum(upper * scale.inverse[0], upper.mul_(scale.inverse[1]))
        if lower.shape[1] < self._top_k:
            floor = torch.full_like(grain, -torch.inf)
        else:
            lower.masked_fill_(scale.unsure, -torch.inf)
            floor = lower.topk(self._top_k, dim=1, sorted=False).values.amin(1, keepdim=True) - grain
        return floor, (upper >= floor).logical_and_(scale.some)

    def _doubt(self, products: Tensor, slack: Tensor) -> Tensor:
        """How far the true z may be from the products, with room for the rounding of what is done to both."""
        return torch.add(slack * (1 + _MARGIN), products.abs(), alpha=self._tiles.rounding + _MARGIN)

    def _candidates(
        self, products: Tensor, alive: Tensor, slack: Tensor, offset: Tensor, floors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, token ids and products (float64) of everything that may be a top token, by row, then by id."""
        tiles = self._tiles
        row, block = alive.nonzero(as_tuple=True)
        per_tile = products.shape[2] // tiles.block
        tile = block.div(per_tile, rounding_mode="floor")
        place = (tile * products.shape[1] + row) * per_tile + (block - tile * per_tile)
        near = products.view(-1, tiles.block)[place].float()
        possible = torch.zeros_like(near, dtype=torch.bool)
        slack = slack.view(-1, tiles.block)[block]
        highest = near + self._doubt(near, slack)
        for name, scale in self._scales.items():
            upper = highest
            if name not in self._plain:
                shift = offset[row]
                upper = (highest + (shift + _MARGIN * shift.abs())) / scale.column_divisor.view(-1, tiles.block)[block]
            reaches = upper >= floors[name][row]
            possible |= reaches.logical_and_(scale.column_choosable.view(-1, tiles.block)[block])
        which, within = possible.nonzero(as_tuple=True)
        row, token = row[which], tiles.ids[block[which] * tiles.block + within]
        order = (row * len(tiles.tokens) + token).argsort()
        return row[order], token[order], near[which, within][order].double()

    def _pair_products(self, rows: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """`rows[row] · tokens[token]`, float64, one a pair."""
        values = torch.empty(len(row), dtype=torch.float64, device=rows.device)
        # Into the same memory again and again: touching fresh memory costs ten times the arithmetic.
        for start in range(0, len(row), _PAIRS):
            here = slice(start, start + _PAIRS)
            n = len(row[here])
            gathered, factors = self._gathered[:n], self._factors[:n]
            torch.index_select(self._tiles.tokens, 0, token[here], out=gathered)
            torch.index_select(rows, 0, row[here], out=factors)
            torch.sum(factors.mul_(gathered), dim=1, out=values[here])
        return values

    def _ordered(self, name: str, scale: _Scale, row: Tensor, token: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The best of each row that has candidates, which come by row, then by token id."""
        weights = (values if name in self._plain else values / scale.divisor[token]).float()
        weights = weights.masked_fill(~scale.choosable[token], -torch.inf)
        order = weights.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        counts = torch.bincount(row)
        counts = counts[counts > 0]
        starts = counts.cumsum(0) - counts
        best = order[starts[:, None] + torch.arange(self._top_k, device=row.device)]
        return weights[best], token[best]

    def _evaluate_whole(self, rows: Rows, which: Tensor, found: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Rows for which the bound says too little: every product of theirs, in float64."""
        for part in which.split(_DENSE_ROWS):
            products = exact_products(rows.exact[part], self._tiles.tokens)
            for name, scale in self._scales.items():
                values = (products if name in self._plain else products / scale.divisor).float()
                values[:, ~scale.choosable] = -torch.inf
                values, order = values.sort(dim=1, descending=True, stable=True)
                weights, indices = found[name]
                weights[part], indices[part] = values[:, : self._top_k], order[:, : self._top_k]


def exact_products(rows: Tensor, tokens: Tensor) -> Tensor:
    """`rows @ tokens.T` in float64 [r, d_vocab], for a few rows float64 [r, d_in] and float32 tokens [d_vocab, d_in].

    Raises:
        BadFile: A product overflows float32.
    """
    products = torch.empty(len(rows), len(tokens), dtype=torch.float64, device=rows.device)
    for start in range(0, len(tokens), _DENSE_TOKENS):
        here = slice(start, start + _DENSE_TOKENS)
        products[:, here] = rows @ tokens[here].double().T
    if not bool(torch.isfinite(products.float()).all()):
        raise BadFile("the product of W_dec and W_U overflows float32.", at="W_dec, W_U")
    return products
