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

from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, ShapeMismatch, unknown_name

__all__ = ["PROJECTIONS", "Projection", "ProjectionPair", "project", "project_both"]

PROJECTIONS = ("dot", "cosine")

# Rows whose moments are summed together in float64: few, so that the copies stay in the processor's cache.
_MOMENT_ROWS = 8


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
) -> Projection:
    """The `top_k` tokens that each decoder row promotes most.

    Holds `chunk × d_vocab` products at a time, never `d_sae × d_vocab`.

    Args:
        W_dec: [d_sae, d_in], any float dtype; computed in float32.
        W_U: [d_in, d_vocab], as `saeffect.models.unembedding` gives it (norm folded in, centred).
        top_k: How many tokens to keep.
        projection: "dot" or "cosine", see the module.
        valid: bool [d_vocab]; tokens where it is False are never chosen and do not count in the moments.
            Under "cosine" tokens whose unembedding is zero (up to float32 rounding of the largest) are not
            chosen either, since they have no direction; they do count in the moments.
        chunk: Features per matrix product. Changes memory, and results by float32 rounding at most.

    Raises:
        UnknownName: `projection` is neither "dot" nor "cosine".
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
    return _stream(W_dec, W_U, top_k, (projection,), valid, chunk)[projection]


def project_both(
    W_dec: Tensor, W_U: Tensor, top_k: int = 10, *, valid: Tensor | None = None, chunk: int = 512
) -> ProjectionPair:
    """`project` on both scales, from one matrix product; same arguments, same numbers, same errors.

    Example:
        >>> pair = project_both(torch.eye(2), torch.tensor([[4.0, 1.0], [4.0, 0.0]]), top_k=1)
        >>> pair.dot.indices.flatten().tolist(), pair["cosine"].indices.flatten().tolist()
        ([0, 0], [1, 0])
    """
    both = _stream(W_dec, W_U, top_k, PROJECTIONS, valid, chunk)
    return ProjectionPair(dot=both["dot"], cosine=both["cosine"])


def _stream(
    W_dec: Tensor, W_U: Tensor, top_k: int, wanted: tuple[str, ...], valid: Tensor | None, chunk: int
) -> dict[str, Projection]:
    """Every wanted scale from one pass over the features."""
    _check_shapes(W_dec, W_U, valid)
    W_dec, W_U = W_dec.detach(), W_U.detach()
    _check_finite(W_U, "W_U")
    W_U = W_U.float()
    d_sae, d_vocab = W_dec.shape[0], W_U.shape[1]
    norms = torch.linalg.vector_norm(W_U, dim=0) if "cosine" in wanted else None
    if norms is not None and not bool(torch.isfinite(norms).all()):
        raise BadFile("the norm of a token's unembedding overflows float32.", at="W_U")
    barred = _barred_tokens(d_vocab, norms, valid, top_k, chunk)
    kept = None if valid is None else valid.to(W_U.device).nonzero().flatten()

    buffer = torch.empty(min(chunk, d_sae), d_vocab, device=W_U.device)
    moments = torch.empty(4, d_sae, dtype=torch.float64)
    indices = {name: torch.empty(d_sae, top_k, dtype=torch.int64) for name in wanted}
    weights = {name: torch.empty(d_sae, top_k) for name in wanted}
    for start in range(0, d_sae, chunk):
        rows = W_dec[start : start + chunk].to(W_U.device)
        _check_finite(rows, "W_dec")
        here = slice(start, start + len(rows))
        product = torch.mm(rows.float(), W_U, out=buffer[: len(rows)])
        moments[:, here] = _moments(product, kept)
        if "dot" in wanted:
            product.index_fill_(1, barred["dot"], -torch.inf)
            weights["dot"][here], indices["dot"][here] = _top_k(product, top_k)
        if norms is not None:  # last, since it overwrites the product
            product.div_(norms).index_fill_(1, barred["cosine"], -torch.inf)
            weights["cosine"][here], indices["cosine"][here] = _top_k(product, top_k)
    mean, std, skewness, kurtosis = moments
    return {name: Projection(name, indices[name], weights[name], mean, std, skewness, kurtosis) for name in wanted}


def _barred_tokens(
    d_vocab: int, norms: Tensor | None, valid: Tensor | None, top_k: int, chunk: int
) -> dict[str, Tensor]:
    """Per scale, the ids of tokens that cannot be chosen; checks that enough others remain."""
    if chunk < 1:
        raise ConfigError(f"chunk must be at least 1. Got {chunk} instead.", at="chunk")
    device = None if norms is None else norms.device
    barred = torch.zeros(d_vocab, dtype=torch.bool, device=device) if valid is None else ~valid.to(device)
    masks = {"dot": barred}
    if norms is not None:
        # A column this small is the rounding left over from centring, and its direction is noise.
        masks["cosine"] = barred | (norms <= torch.finfo(torch.float32).eps * norms.max())
    for name, mask in masks.items():
        choosable = d_vocab - int(mask.sum())
        if not 1 <= top_k <= choosable:
            raise ConfigError(
                f"top_k must be from 1 to the {choosable} tokens that projection {name!r} can choose among. "
                f"Got {top_k} instead.",
                at="top_k",
                fix="ask for fewer top tokens, or mark more tokens as valid.",
            )
    return {name: mask.nonzero().flatten() for name, mask in masks.items()}


def _moments(product: Tensor, kept: Tensor | None) -> Tensor:
    """Mean, std, skewness and kurtosis of each row over the kept columns: float64 [4, n_rows].

    Two passes, the second about the mean, so that nothing cancels; a few rows at a time, since the float64
    copy of a whole chunk would be twice the chunk.
    """
    result = torch.empty(4, len(product), dtype=torch.float64)
    for start in range(0, len(product), _MOMENT_ROWS):
        rows = product[start : start + _MOMENT_ROWS]
        if kept is not None:
            rows = rows.index_select(1, kept)
        low, high = torch.aminmax(rows, dim=1)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise BadFile("the product of W_dec and W_U overflows float32.", at="W_dec, W_U")
        deviation = rows.double()
        mean = deviation.mean(dim=1)
        deviation -= mean[:, None]
        square = deviation * deviation
        variance = square.mean(dim=1)
        variance[low == high] = 0.0  # the mean of equal values can be off by a rounding
        third = torch.linalg.vecdot(square, deviation) / rows.shape[1]
        fourth = torch.linalg.vecdot(square, square) / rows.shape[1]
        undefined = torch.where(variance > 0, 0.0, torch.nan)
        shape = torch.stack([mean, variance.sqrt(), third / variance**1.5, fourth / variance**2])
        shape[2:] += undefined
        result[:, start : start + _MOMENT_ROWS] = shape
    return result


def _top_k(product: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and token ids of the `top_k` largest of each row; equal values in order of token id.

    `torch.topk` breaks ties as it likes. Sorting what it returns is enough unless the tie straddles the last
    place, which shows in the next value; only such rows are searched whole.
    """
    found = product.topk(min(top_k + 1, product.shape[1]), dim=1)
    indices, by_id = found.indices[:, :top_k].sort(dim=1)
    values = found.values[:, :top_k].gather(1, by_id)
    values, order = values.sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    if found.values.shape[1] > top_k:
        straddles = found.values[:, top_k] == found.values[:, top_k - 1]
        for row in straddles.nonzero().flatten().tolist():
            candidates = (product[row] >= found.values[row, top_k]).nonzero().flatten()
            _, order = product[row, candidates].sort(descending=True, stable=True)
            indices[row] = candidates[order[:top_k]]
    return values, indices


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
    if not bool(torch.isfinite(weights).all()):
        bad = int(weights.numel() - torch.isfinite(weights).sum())
        raise BadFile(f"{name} holds {bad} NaN or infinite values.", at=name, fix="get the weights again.")
