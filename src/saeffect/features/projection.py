"""The tokens that each feature promotes: `W_dec @ W_U`, streamed over features.

Two scales of the same product:

- `dot` is `W_dec[f] · W_U[:, t]`: by how much one unit of the feature moves the token's logit, but for the
  final norm's scale. It is the paper's.
- `cosine` divides that by `‖W_U[:, t]‖`, so that a token is judged by its direction only. Where embeddings
  are tied, a few rare tokens have large norms and lead the `dot` ranking of nearly every direction.

The decoder row's own norm is *not* divided out of either: it would not change a feature's ranking, and SAEs
differ in whether they fix it to 1. A `cosine` weight is thus a true cosine times `‖W_dec[f]‖`; divide it by
the table's `decoder_norm` for the cosine itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, ShapeMismatch, unknown_name
from saeffect.features.moments import TileMoments
from saeffect.features.top_tokens import TopTokens
from saeffect.features.unembedding_tiles import Rows, UnembeddingTiles
from saeffect.lm.loading import resolve_dtype

__all__ = ["PRODUCT_DTYPES", "PROJECTIONS", "Projection", "ProjectionPair", "project", "project_both"]

PROJECTIONS = ("dot", "cosine")
PRODUCT_DTYPES = ("auto", "float32", "bfloat16")

_BLOCK = 32  # columns of which only the largest product is looked at first
_PRODUCT_BYTES = 2**26  # products held at once, unless that is fewer rows than make a product efficient
_FEWEST_ROWS = 128
_LARGE = 2**32  # multiplications from which bfloat16 pays


@dataclass(frozen=True, eq=False)
class Projection:
    """The top tokens of every feature, and the shape of its dot product over the vocabulary.

    The moments are those of the population of valid tokens (divided by n, not n - 1), always of the *dot*
    product, whichever scale ranks the tokens. All tensors are on the CPU.

    Attributes:
        projection: The scale that ranks: "dot" or "cosine".
        indices: int64 [d_sae, top_k], token ids, best first; equal weights in order of token id.
        weights: float32 [d_sae, top_k], on the ranking scale.
        mean: float64 [d_sae].
        std: float64 [d_sae], 0 for a row of equal values.
        skewness: float64 [d_sae], NaN where `std` is 0.
        kurtosis: float64 [d_sae], the plain fourth standardised moment, 3 for a normal distribution, not the
            excess over it: SAELens' feature statistics define it so, and tables from both can be laid side by
            side. NaN where `std` is 0.
    """

    projection: str
    indices: Tensor
    weights: Tensor
    mean: Tensor
    std: Tensor
    skewness: Tensor
    kurtosis: Tensor


@dataclass(frozen=True, eq=False)
class ProjectionPair:
    """Both scales of one product."""

    dot: Projection
    cosine: Projection

    def __getitem__(self, projection: str) -> Projection:
        """The one of that name; `UnknownName` for any other."""
        _check_name(projection)
        return self.dot if projection == "dot" else self.cosine


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
    """The `top_k` tokens that each decoder row promotes most.

    Holds `chunk × d_vocab` products at a time or fewer, never `d_sae × d_vocab`.

    Args:
        W_dec: [d_sae, d_in], any float dtype, taken as float32.
        W_U: [d_in, d_vocab], as `saeffect.lm.unembedding` gives it (norm folded in, centred).
        top_k: How many tokens to keep.
        projection: "dot" or "cosine", see the module.
        valid: bool [d_vocab]; tokens where it is False are never chosen and do not count in the moments.
            Under "cosine" tokens whose unembedding is zero (up to float32 rounding of the largest) are not
            chosen either, since they have no direction; they do count in the moments.
        chunk: Features per matrix product, at most. Changes memory, and the moments by float32 rounding at most.
        dtype: Of the products among which the top tokens are looked for: "float32", "bfloat16", or "auto" for the
            faster one, which is bfloat16 where the processor multiplies it and there is much to multiply. Top tokens
            and weights are the same in all: every token that could be among them, by a proven bound of the rounding,
            is evaluated in float64 and rounded to float32. So are mean and std, but for the rounding of float32;
            skewness and kurtosis from bfloat16 are typically off by 1e-4 (see `saeffect.features.moments`).

    Raises:
        UnknownName: `projection` is neither "dot" nor "cosine", or `dtype` is unknown.
        ShapeMismatch: The matrices are not two-dimensional, do not fit, or `valid` has another length.
        ConfigError: `top_k` or `chunk` is below 1, or fewer than `top_k` tokens can be chosen.
        BadFile: A weight is NaN or infinite, or a product or norm overflows float32.

    Source:
        Gupta & Sica (2024) rank by the dot product; the moments are those of SAELens' feature statistics.

    Example:
        >>> W_U = torch.tensor([[9.0, 1.0, 0.0], [9.0, 0.0, 1.0]])
        >>> project(torch.tensor([[1.0, 0.0]]), W_U, top_k=2, projection="dot").indices.tolist()
        [[0, 1]]
        >>> project(torch.tensor([[1.0, 0.0]]), W_U, top_k=2, projection="cosine").indices.tolist()
        [[1, 0]]
    """
    _check_name(projection)
    return _stream(W_dec, W_U, top_k, (projection,), valid, chunk, dtype)[projection]


def project_both(
    W_dec: Tensor,
    W_U: Tensor,
    top_k: int = 10,
    *,
    valid: Tensor | None = None,
    chunk: int = 512,
    dtype: str = "auto",
) -> ProjectionPair:
    """`project` on both scales, from one matrix product; same arguments, same numbers, same errors.

    Skewness and kurtosis from bfloat16 products are the same up to their rounding only.

    Example:
        >>> pair = project_both(torch.eye(2), torch.tensor([[4.0, 1.0], [4.0, 0.0]]), top_k=1)
        >>> pair.dot.indices.flatten().tolist(), pair["cosine"].indices.flatten().tolist()
        ([0, 0], [1, 0])
    """
    both = _stream(W_dec, W_U, top_k, PROJECTIONS, valid, chunk, dtype)
    return ProjectionPair(dot=both["dot"], cosine=both["cosine"])


def _stream(
    W_dec: Tensor, W_U: Tensor, top_k: int, wanted: tuple[str, ...], valid: Tensor | None, chunk: int, dtype: str
) -> dict[str, Projection]:
    """Every wanted scale from one pass over the features."""
    _check_shapes(W_dec, W_U, valid)
    W_dec, W_U = W_dec.detach(), W_U.detach()
    _check_finite(W_U, "W_U")
    scales = _choosable(W_U, wanted, valid, top_k, chunk)
    block = max(1, min(_BLOCK, (W_U.shape[1] if valid is None else int(valid.sum())) // (4 * top_k)))
    tiles = UnembeddingTiles(W_U, valid, block, _product_dtype(dtype, W_dec, W_U))
    search = TopTokens(
        tiles, top_k, {name: (tiles.norms if name == "cosine" else None, mask) for name, mask in scales.items()}
    )

    d_sae, (n_tiles, width, _) = len(W_dec), tiles.tiles.shape
    fitting = _PRODUCT_BYTES // (n_tiles * width * tiles.tiles.element_size())
    n_rows = max(1, min(chunk, d_sae, max(_FEWEST_ROWS, fitting)))
    sums = TileMoments(tiles, n_rows, valid)
    products = torch.empty(n_tiles * n_rows * width, dtype=tiles.tiles.dtype, device=tiles.tiles.device)
    maxima = torch.empty(n_tiles, n_rows, width // block, device=tiles.tiles.device)
    moments = torch.empty(4, d_sae, dtype=torch.float64)
    indices = {name: torch.empty(d_sae, top_k, dtype=torch.int64) for name in wanted}
    weights = {name: torch.empty(d_sae, top_k) for name in wanted}
    for start in range(0, d_sae, n_rows):
        part = W_dec[start : start + n_rows].to(tiles.tiles.device)
        _check_finite(part, "W_dec")
        rows, n = Rows.of(part, tiles.tiles.dtype), len(part)
        here = slice(start, start + n)
        product = products[: n_tiles * n * width].view(n_tiles, n, width)
        sums.start()
        for i, tile in enumerate(tiles.tiles):
            sums.add(torch.mm(rows.unit, tile.T, out=product[i]), maxima[i, :n])
        found, change = search.find(product, maxima[:, :n].transpose(0, 1).flatten(1), rows)
        for name in wanted:
            weights[name][here], indices[name][here] = found[name]
        moments[:, here] = sums.result(rows, change)
    mean, std, skewness, kurtosis = moments
    return {name: Projection(name, indices[name], weights[name], mean, std, skewness, kurtosis) for name in wanted}


def _product_dtype(name: str, W_dec: Tensor, W_U: Tensor) -> torch.dtype:
    """In which dtype candidates are looked for."""
    if name not in PRODUCT_DTYPES:
        raise unknown_name("dtype", name, PRODUCT_DTYPES, at="dtype")
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    # On a GPU, and where little is to be computed, float32 is fast enough.
    if W_U.device.type != "cpu" or len(W_dec) * W_U.numel() < _LARGE or not torch.backends.mkldnn.is_available():
        return torch.float32
    return resolve_dtype("auto", W_U.device)


def _choosable(W_U: Tensor, wanted: tuple[str, ...], valid: Tensor | None, top_k: int, chunk: int) -> dict[str, Tensor]:
    """Per scale, bool [d_vocab], the tokens that can be chosen; checks that they are enough."""
    if chunk < 1:
        raise ConfigError(f"chunk must be at least 1. Got {chunk} instead.", at="chunk")
    every = torch.ones(W_U.shape[1], dtype=torch.bool, device=W_U.device) if valid is None else valid.to(W_U.device)
    masks = {}
    for name in wanted:
        masks[name] = every
        if name == "cosine":
            norms = torch.linalg.vector_norm(W_U, dim=0, dtype=torch.float32)
            if not bool(torch.isfinite(norms).all()):
                raise BadFile("the norm of a token's unembedding overflows float32.", at="W_U")
            # A column this small is the rounding left over from centring, and its direction is noise.
            masks[name] = every & (norms > torch.finfo(torch.float32).eps * norms.max())
        choosable = int(masks[name].sum())
        if not 1 <= top_k <= choosable:
            raise ConfigError(
                f"top_k must be from 1 to the {choosable} tokens that projection {name!r} can choose among. "
                f"Got {top_k} instead.",
                at="top_k",
                fix="ask for fewer top tokens, or mark more tokens as valid.",
            )
    return masks


def _check_name(projection: str) -> None:
    if projection not in PROJECTIONS:
        raise unknown_name("projection", projection, PROJECTIONS, at="projection")


def _check_shapes(W_dec: Tensor, W_U: Tensor, valid: Tensor | None) -> None:
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
    if not weights.numel():
        return
    # Neither a mask nor a copy as large as the weights, unless something is wrong.
    if not all(map(math.isfinite, torch.stack(torch.aminmax(weights)).tolist())):
        bad = int(weights.numel() - torch.isfinite(weights).sum())
        raise BadFile(f"{name} holds {bad} NaN or infinite values.", at=name, fix="get the weights again.")
