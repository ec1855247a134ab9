"""The tokens that each feature promotes: `W_dec @ W_U`, streamed over features.

- `dot` is `W_dec[f] · W_U[:, t]`, as in the paper: the change of the token's logit per unit of the feature, up to the
  final norm's scale.
- `cosine` divides that by `‖W_U[:, t]‖`, since with tied embeddings a few rare tokens of large norm lead most `dot`
  rankings. Dividing by the table's `decoder_norm` as well gives the cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, ShapeMismatch, unknown_name
from saeffect.features.top_tokens import Rows, TopTokens, UnembeddingTiles, exact_products
from saeffect.lm.loading import resolve_dtype

__all__ = ["PRODUCT_DTYPES", "PROJECTIONS", "Projection", "TileMoments", "project", "project_both"]

PROJECTIONS = ("dot", "cosine")
PRODUCT_DTYPES = ("auto", "float32", "bfloat16")

_BLOCK = 32  # columns; the search first looks at the largest product of each block
_PRODUCT_BYTES = 2**26  # products held at once, if that is at least _FEWEST_ROWS rows
_FEWEST_ROWS = 128  # fewer rows make the matrix product slow
_LARGE = 2**32  # multiplications from which bfloat16 pays
_EXACT_ROWS = 32  # rows whose moments are evaluated in float64 at a time
_MISMATCH = 1e-3  # relative error of the variance above which a row is evaluated in float64
# Share of the average direction's variance below which rounding of products or covariance matters.
_SMALL = {torch.float32: 1e-8, torch.bfloat16: 1e-2}


@dataclass(frozen=True, eq=False)
class Projection:
    """The top tokens of every feature, and the moments of its dot product over the vocabulary; all on the CPU.

    `indices` are token ids, int64 [d_sae, top_k], best first, ties by token id; `weights` float32 [d_sae, top_k], on
    the scale that ranks, `projection`, "dot" or "cosine". Moments are of the population of valid tokens (divided by n),
    always of the *dot* product, float64 [d_sae]; `kurtosis` is the fourth standardised moment (3 for a normal
    distribution), not the excess, as in SAELens; it and `skewness` are NaN where `std` is 0 (a row of equal values).
    """

    projection: str
    indices: Tensor
    weights: Tensor
    mean: Tensor
    std: Tensor
    skewness: Tensor
    kurtosis: Tensor


def project(
    W_dec: Tensor,
    W_U: Tensor,
    top_k: int = 10,
    projection: str = "cosine",
    *,
    valid: Tensor | None = None,
    chunk: int = 512,
    dtype: str = "auto",
) -> Projection:
    """The `top_k` tokens that each decoder row promotes most (Gupta & Sica 2024 rank by the dot product).

    Args:
        W_dec: [d_sae, d_in], any float dtype, taken as float32.
        W_U: [d_in, d_vocab], as `saeffect.lm.unembedding` gives it (norm folded in, centred).
        projection: "dot" or "cosine", see the module.
        valid: bool [d_vocab]; tokens where it is False are never chosen and not in the moments. Under "cosine", tokens
            whose unembedding is zero (up to float32 rounding) are not chosen either, but are in the moments.
        chunk: Features per matrix product: at most `chunk × d_vocab` products are held at a time.
        dtype: Of the products in which top tokens are searched: "float32", "bfloat16", or "auto" for the faster one.
            Beyond float32 rounding only skewness and kurtosis depend on it, typically by 1e-4 (see `TileMoments`).

    UnknownName: no such `projection` or `dtype`. ShapeMismatch: shapes that do not fit. ConfigError: `top_k` or `chunk`
    is below 1, or fewer than `top_k` tokens can be chosen. BadFile: a weight is not finite, or a product overflows
    float32.

    Example:
        >>> W_U = torch.tensor([[9.0, 1.0, 0.0], [9.0, 0.0, 1.0]])
        >>> project(torch.tensor([[1.0, 0.0]]), W_U, top_k=2, projection="dot").indices.tolist()
        [[0, 1]]
        >>> project(torch.tensor([[1.0, 0.0]]), W_U, top_k=2, projection="cosine").indices.tolist()
        [[1, 0]]
    """
    if projection not in PROJECTIONS:
        raise unknown_name("projection", projection, PROJECTIONS, at="projection")
    return _stream(W_dec, W_U, top_k, (projection,), valid, chunk, dtype)[projection]


def project_both(
    W_dec: Tensor,
    W_U: Tensor,
    top_k: int = 10,
    *,
    valid: Tensor | None = None,
    chunk: int = 512,
    dtype: str = "auto",
) -> dict[str, Projection]:
    """`project` on both scales by name, from one matrix product; same arguments, same numbers, same errors.

    Example:
        >>> projections = project_both(torch.eye(2), torch.tensor([[4.0, 1.0], [4.0, 0.0]]), top_k=1)
        >>> projections["dot"].indices.flatten().tolist(), projections["cosine"].indices.flatten().tolist()
        ([0, 0], [1, 0])
    """
    return _stream(W_dec, W_U, top_k, PROJECTIONS, valid, chunk, dtype)


def _stream(
    W_dec: Tensor, W_U: Tensor, top_k: int, wanted: tuple[str, ...], valid: Tensor | None, chunk: int, dtype: str
) -> dict[str, Projection]:
    _check_shapes(W_dec, W_U, valid, chunk)
    W_dec, W_U = W_dec.detach(), W_U.detach()
    _check_finite(W_U, "W_U")
    masks = _choosable_masks(W_U, wanted, valid, top_k)
    block = max(1, min(_BLOCK, (W_U.shape[1] if valid is None else int(valid.sum())) // (4 * top_k)))
    tiles = UnembeddingTiles(W_U, valid, block, _product_dtype(dtype, W_dec, W_U))
    scales = {name: (tiles.norms if name == "cosine" else None, mask) for name, mask in masks.items()}
    search = TopTokens(tiles, top_k, scales)

    d_sae, (n_tiles, width, _), device = len(W_dec), tiles.tiles.shape, W_U.device
    max_rows = _PRODUCT_BYTES // (n_tiles * width * tiles.tiles.element_size())
    n_rows = max(1, min(chunk, d_sae, max(_FEWEST_ROWS, max_rows)))
    sums = TileMoments(tiles, n_rows, valid)
    products = torch.empty(n_tiles * n_rows * width, dtype=tiles.tiles.dtype, device=device)
    maxima = torch.empty(n_tiles, n_rows, width // block, device=device)
    moments = torch.empty(4, d_sae, dtype=torch.float64)
    indices = {name: torch.empty(d_sae, top_k, dtype=torch.int64) for name in wanted}
    weights = {name: torch.empty(d_sae, top_k) for name in wanted}
    for start in range(0, d_sae, n_rows):
        part = W_dec[start : start + n_rows].to(device)
        _check_finite(part, "W_dec")
        rows, n = Rows(part, tiles.tiles.dtype), len(part)
        span = slice(start, start + n)
        product = products[: n_tiles * n * width].view(n_tiles, n, width)
        sums.start()
        for i, tile in enumerate(tiles.tiles):
            sums.add(torch.mm(rows.unit, tile.T, out=product[i]), maxima[i, :n])
        best, correction = search.find(product, maxima[:, :n].transpose(0, 1).flatten(1), rows)
        for name in wanted:
            weights[name][span], indices[name][span] = best[name]
        moments[:, span] = sums.result(rows, correction)
    return {name: Projection(name, indices[name], weights[name], *moments) for name in wanted}


class TileMoments:
    """Mean, standard deviation, skewness and kurtosis of every row's products, accumulated tile by tile.

    Only tokens of `valid` count, bool [d_vocab], all if None. Products are centred, so sums of powers do not cancel.
    The standard deviation of bfloat16 products comes from the covariance of W_U. Their rounding (0.2 % of the typical
    product) averages out to about 1e-4 in skewness and kurtosis over 50,000 tokens. Where a few tokens hold most of a
    moment, top tokens get their true products, but those at the other end may still change skewness by 0.02 and
    kurtosis by a percent. A row whose variance in the products is off by more than 1 in 1,000, or small beside that of
    other directions, is computed again in float64. Proven bound: with e_t the error of token t's product and E_p the
    p-th root of the mean of e_t^p, the p-th roots of the absolute p-th moments are off by at most E_p (Minkowski).
    """

    def __init__(self, tiles: UnembeddingTiles, n_rows: int, valid: Tensor | None) -> None:
        self._tiles = tiles
        device = tiles.tokens.device
        self._valid_ids = slice(None) if valid is None else valid.to(device).nonzero().flatten()
        # Of the products: first and second power.
        self._powers = torch.empty(n_rows, 2, tiles.tiles.shape[1], device=device)
        self._sums = torch.zeros(3, n_rows, dtype=torch.float64, device=device)
        self._covariance = None if tiles.covariance is None else tiles.covariance.float()

    def start(self) -> None:
        """Reset the sums, for other rows."""
        self._sums.zero_()

    def add(self, products: Tensor, maxima: Tensor) -> None:
        """Add one tile's products [r, width]; puts the largest of each block into `maxima` [r, n_blocks]."""
        n = len(products)
        powers = self._powers[:n]
        product, square = powers[:, 0], powers[:, 1]
        product.copy_(products)
        torch.amax(product.view(n, -1, self._tiles.block), dim=2, out=maxima)
        torch.mul(product, product, out=square)
        # Products of each row's powers with each other: sums of squares, cubes and fourth powers in one pass.
        second, third, _, fourth = torch.bmm(powers, powers.transpose(1, 2)).flatten(1).unbind(1)
        self._sums[:, :n] += torch.stack([second, third, fourth])

    def result(self, rows: Rows, correction: Tensor) -> Tensor:
        """Mean, std, skewness and kurtosis, float64 [4, r]; `correction` [4, r] is that of `TopTokens.find`."""
        tiles = self._tiles
        if self._covariance is None:
            # float32 needs no correction, so moments do not depend on which tokens were searched.
            correction = torch.zeros_like(correction)
        first = rows.unit.double() @ tiles.mean + correction[0] / tiles.n_valid  # mean of the rounded products
        second, third, fourth = (self._sums[:, : len(first)] + correction[1:]) / tiles.n_valid
        variance = second - first**2
        fourth = fourth - first * (4 * third - first * (6 * second - 3 * first**2))
        third = third - first * (3 * second - 2 * first**2)
        exact_variance = variance
        if self._covariance is not None:
            exact_variance = torch.linalg.vecdot((rows.direction @ self._covariance).double(), rows.direction.double())
        std = rows.length / tiles.scale * exact_variance.sqrt()
        moments = torch.stack([rows.exact @ tiles.centre, std, third / variance**1.5, fourth / variance**2])
        average = tiles.spread / len(tiles.mean)  # variance along the average direction
        trusted = tiles.covers(rows) & ((variance - exact_variance).abs() <= _MISMATCH * exact_variance)
        trusted &= exact_variance > _SMALL[tiles.tiles.dtype] * average
        is_zero = rows.length == 0
        inexact = (~trusted & ~is_zero).nonzero().flatten()
        for part in inexact.split(_EXACT_ROWS) if len(inexact) else ():
            moments[:, part] = self._exact_moments(rows.exact[part])
        moments[:2, is_zero], moments[2:, is_zero] = 0.0, torch.nan
        return moments

    def _exact_moments(self, rows: Tensor) -> Tensor:
        """Moments of rows float64 [r, d_in] in float64, two passes."""
        products = exact_products(rows, self._tiles.tokens)[:, self._valid_ids]
        mean = products.mean(dim=1)
        deviation = products - mean[:, None]
        square = deviation * deviation
        variance = square.mean(dim=1)
        # Equal products deviate by their rounding in float64.
        magnitude = rows.abs() @ self._tiles.largest
        flat = ~(variance > ((rows.shape[1] + 8) * 2.0**-52 * magnitude) ** 2)
        variance = torch.where(flat, 0.0, variance)
        third = torch.linalg.vecdot(square, deviation) / products.shape[1] / variance**1.5
        fourth = torch.linalg.vecdot(square, square) / products.shape[1] / variance**2
        third[flat], fourth[flat] = torch.nan, torch.nan
        return torch.stack([mean, variance.sqrt(), third, fourth])


def _product_dtype(name: str, W_dec: Tensor, W_U: Tensor) -> torch.dtype:
    if name not in PRODUCT_DTYPES:
        raise unknown_name("dtype", name, PRODUCT_DTYPES, at="dtype")
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    # On a GPU, and where little is to be computed, float32 is fast enough.
    if W_U.device.type != "cpu" or len(W_dec) * W_U.numel() < _LARGE or not torch.backends.mkldnn.is_available():
        return torch.float32
    return resolve_dtype("auto", W_U.device)


def _choosable_masks(W_U: Tensor, wanted: tuple[str, ...], valid: Tensor | None, top_k: int) -> dict[str, Tensor]:
    """For each scale the tokens that can be chosen, bool [d_vocab]; `ConfigError` if there are fewer than `top_k`."""
    allowed = torch.ones(W_U.shape[1], dtype=torch.bool, device=W_U.device) if valid is None else valid.to(W_U.device)
    masks = dict.fromkeys(wanted, allowed)
    if "cosine" in wanted:
        norms = torch.linalg.vector_norm(W_U, dim=0, dtype=torch.float32)
        if not bool(torch.isfinite(norms).all()):
            raise BadFile("the norm of a token's unembedding overflows float32.", at="W_U")
        # A column this small is the rounding left over from centring, and its direction is noise.
        masks["cosine"] = allowed & (norms > torch.finfo(torch.float32).eps * norms.max())
    for name, mask in masks.items():
        choosable = int(mask.sum())
        if not 1 <= top_k <= choosable:
            raise ConfigError(
                f"top_k must be from 1 to the {choosable} tokens that projection {name!r} can choose among. "
                f"Got {top_k} instead.",
                at="top_k",
                fix="ask for fewer top tokens, or mark more tokens as valid.",
            )
    return masks


def _check_shapes(W_dec: Tensor, W_U: Tensor, valid: Tensor | None, chunk: int) -> None:
    if chunk < 1:
        raise ConfigError(f"chunk must be at least 1. Got {chunk} instead.", at="chunk")
    if W_dec.ndim != 2 or W_U.ndim != 2 or W_dec.shape[1] != W_U.shape[0]:
        raise ShapeMismatch(
            "W_dec must be [d_sae, d_in] and W_U [d_in, d_vocab]. "
            f"Got {list(W_dec.shape)} and {list(W_U.shape)} instead.",
            at="W_dec, W_U",
            fix="take both from the same model: an SAE of another width cannot be projected.",
        )
    if valid is not None and (valid.shape != W_U.shape[1:] or valid.dtype != torch.bool):
        raise ShapeMismatch(
            f"valid must be a bool tensor of {W_U.shape[1]} entries, one a token. "
            f"Got {str(valid.dtype).removeprefix('torch.')} {list(valid.shape)} instead.",
            at="valid",
        )


def _check_finite(weights: Tensor, name: str) -> None:
    # A mask of the size of the weights is allocated only for the error.
    if weights.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(weights)).tolist())):
        bad = int(weights.numel() - torch.isfinite(weights).sum())
        raise BadFile(f"{name} holds {bad} NaN or infinite values.", at=name, fix="get the weights again.")
