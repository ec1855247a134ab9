"""Mean, standard deviation, skewness and kurtosis of every row's products, from the tiles as they pass.

The mean is `W_dec @ mean(W_U)`, in float64. The sums of powers are taken while a tile is in the cache, in float32 over
a tile and in float64 over tiles, of products that are already centred, so that nothing cancels.

Products in bfloat16 are off by some 0.2 % of the typical product each. Over a vocabulary of 50,000 that averages out to
about 10^-4 in skewness and kurtosis; the standard deviation does not depend on it, since it is taken from the
covariance of W_U. Where a few tokens hold most of a moment, nothing averages out. Those are mostly the top tokens,
which are evaluated exactly, so their true products take the place of the rounded ones; a few tokens at the other end
may still put skewness off by 0.02 and kurtosis by a percent.

What is proven is less: if e_t bounds the error of token t's product and E_p is the p-th root of the mean of e_t^p, then
by Minkowski's inequality the p-th roots of the absolute p-th moments are off by at most E_p, which for a W_U of 768
dimensions and no preferred directions is a tenth of the standard deviation. So there is a check besides: a row whose
variance in the products differs from the true one by more than one part in 1,000, or whose variance is small beside
that of other directions, is computed again in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeffect.features.top_tokens import exact_products
from saeffect.features.unembedding_tiles import Rows, UnembeddingTiles

__all__ = ["TileMoments"]

_ROWS = 32  # evaluated in float64 at a time
_MISMATCH = 1e-3  # share of the variance
# Share of the variance of the average direction, below which the products' rounding, or the covariance's, is too near.
_SMALL = {torch.float32: 1e-8, torch.bfloat16: 1e-2}


class TileMoments:
    """Sums up the powers of some rows' products tile by tile; one object serves all rows, in turn.

    Args:
        tiles: The unembedding.
        n_rows: Most rows at a time.
        valid: Bool [d_vocab], tokens that count; None for all.
    """

    def __init__(self, tiles: UnembeddingTiles, n_rows: int, valid: Tensor | None) -> None:
        self._tiles = tiles
        self._kept = None if valid is None else valid.to(tiles.tokens.device).nonzero().flatten()
        device = tiles.tokens.device
        width = tiles.tiles.shape[1]
        self._powers = torch.empty(n_rows, 2, width, device=device)  # of the products: first and second
        self._sums = torch.zeros(3, n_rows, dtype=torch.float64, device=device)
        self._covariance = None if tiles.covariance is None else tiles.covariance.float()
        self._average = tiles.spread / len(tiles.mean)  # variance along the average direction

    def start(self) -> None:
        """Begin with other rows."""
        self._sums.zero_()

    def add(self, products: Tensor, maxima: Tensor) -> None:
        """One tile's products [r, width]; puts the largest of each block into `maxima` [r, n_blocks]."""
        n = len(products)
        powers = self._powers[:n]
        product, square = powers[:, 0], powers[:, 1]
        product.copy_(products)
        torch.amax(product.view(n, -1, self._tiles.block), dim=2, out=maxima)
        torch.mul(product, product, out=square)
        # Products of each row's powers with each other: sums of squares, cubes and fourth powers in one pass.
        second, third, _, fourth = torch.bmm(powers, powers.transpose(1, 2)).flatten(1).unbind(1)
        self._sums[:, :n] += torch.stack([second, third, fourth])

    def result(self, rows: Rows, change: Tensor) -> Tensor:
        """Mean, std, skewness and kurtosis of the rows whose tiles were added: float64 [4, r].

        Args:
            rows: What was multiplied.
            change: What is to be added to the sums of the first four powers, float64 [4, r]; see `TopTokens.find`.
        """
        tiles = self._tiles
        if self._covariance is None:
            change = torch.zeros_like(change)  # float32 needs none, and so does not depend on what was looked for
        first = rows.unit.double() @ tiles.mean + change[0] / tiles.n_valid  # of the rounded products
        second, third, fourth = (self._sums[:, : len(first)] + change[1:]) / tiles.n_valid
        variance = second - first**2
        fourth = fourth - first * (4 * third - first * (6 * second - 3 * first**2))
        third = third - first * (3 * second - 2 * first**2)
        true = variance
        if self._covariance is not None:
            true = torch.linalg.vecdot((rows.direction @ self._covariance).double(), rows.direction.double())
        std = rows.length / tiles.scale * true.sqrt()
        shape = torch.stack([rows.exact @ tiles.centre, std, third / variance**1.5, fourth / variance**2])
        trusted = tiles.covers(rows) & ((variance - true).abs() <= _MISMATCH * true)
        trusted &= true > _SMALL[tiles.tiles.dtype] * self._average
        again = ~trusted & (rows.length > 0)
        if bool(again.any()):
            for part in again.nonzero().flatten().split(_ROWS):
                shape[:, part] = self._again(rows.exact[part])
        zero = rows.length == 0
        shape[:2, zero], shape[2:, zero] = 0.0, torch.nan
        return shape

    def _again(self, rows: Tensor) -> Tensor:
        """Rows float64 [r, d_in] for which the products say too little, in float64; two passes."""
        products = exact_products(rows, self._tiles.tokens)
        if self._kept is not None:
            products = products[:, self._kept]
        mean = products.mean(dim=1)
        deviation = products - mean[:, None]
        square = deviation * deviation
        variance = square.mean(dim=1)
        # Equal products deviate by their rounding in float64.
        size = rows.abs() @ self._tiles.largest
        flat = ~(variance > ((rows.shape[1] + 8) * 2.0**-52 * size) ** 2)
        variance = torch.where(flat, 0.0, variance)
        third = torch.linalg.vecdot(square, deviation) / products.shape[1] / variance**1.5
        fourth = torch.linalg.vecdot(square, square) / products.shape[1] / variance**2
        third[flat], fourth[flat] = torch.nan, torch.nan
        return torch.stack([mean, variance.sqrt(), third, fourth])
