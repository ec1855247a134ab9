"""How well an SAE reconstructs: small pure functions, each tested by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import ShapeMismatch, Undefined

__all__ = ["ReconstructionSums", "ce_loss_score", "explained_variance"]


def explained_variance(sae_in: Tensor, sae_out: Tensor) -> float:
    """Share of the variance about the mean that the reconstruction keeps.

    Args:
        sae_in: Activations `[n_tokens, d_in]`, any float dtype; summed in float64.
        sae_out: Reconstructions of the same rows.

    Returns:
        Dimensionless, at most 1; 0 for predicting the mean; negative when worse than that.

    Raises:
        ShapeMismatch: The two shapes differ.
        Undefined: All rows of `sae_in` are equal.

    Source:
        R² pooled over tokens and dimensions.

    Example:
        >>> explained_variance(torch.tensor([[2., 0.], [0., 4.]]), torch.tensor([[2., 1.], [0., 3.]]))
        0.8
    """
    sums = ReconstructionSums(sae_in.shape[-1])
    sums.add(sae_in, sae_out)
    return sums.explained_variance()


def ce_loss_score(clean: float, sae: float, zero: float) -> float:
    """Share of the loss that the hook's activation saves which its reconstruction saves too.

    Args:
        clean: Cross-entropy of the model as it is, nats a token.
        sae: The same with the SAE's output in place of the activation.
        zero: The same with zeros in its place.

    Returns:
        (zero - sae) / (zero - clean): 1 is perfect, 0 no better than zeros.

    Raises:
        Undefined: Zeroing the hook does not change the loss.

    Example:
        >>> ce_loss_score(clean=3.0, sae=3.5, zero=8.0)
        0.9
    """
    if zero == clean:
        raise Undefined("zeroing the hook does not change the loss, so there is nothing to save.")
    return (zero - sae) / (zero - clean)


@dataclass
class _Sums:
    tokens: int
    squared_in: float
    squared_error: float
    squared_out: float
    active: float


class ReconstructionSums:
    """Explained variance, l2 ratio and l0 over any number of batches, exactly as over one.

    Args:
        d_in: Width of the activations.

    Example:
        >>> sums = ReconstructionSums(2)
        >>> sums.add(torch.tensor([[2., 0.], [0., 4.]]), torch.tensor([[2., 1.], [0., 3.]]))
        >>> sums.explained_variance()
        0.8
    """

    def __init__(self, d_in: int) -> None:
        self._sums = _Sums(0, 0.0, 0.0, 0.0, 0.0)
        self._total = torch.zeros(d_in, dtype=torch.float64)
        self._ratio = 0.0

    def add(self, sae_in: Tensor, sae_out: Tensor, feature_acts: Tensor | None = None) -> None:
        """Take in a batch `[n_tokens, d_in]` (and its feature activations `[n_tokens, d_sae]`, for l0).

        Raises:
            ShapeMismatch: The shapes differ.
        """
        if sae_in.shape != sae_out.shape or sae_in.ndim != 2:
            raise ShapeMismatch(
                f"activations have shape {tuple(sae_in.shape)} and reconstructions {tuple(sae_out.shape)};"
                " expected the same [n_tokens, d_in]."
            )
        x, y = sae_in.double(), sae_out.double()
        s = self._sums
        s.tokens += len(x)
        s.squared_in += float(x.square().sum())
        s.squared_out += float(y.square().sum())
        s.squared_error += float((x - y).square().sum())
        self._total += x.sum(0)
        self._ratio += float((y.norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)).sum())
        if feature_acts is not None:
            s.active += float((feature_acts > 0).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens taken in so far."""
        return self._sums.tokens

    def explained_variance(self) -> float:
        """See `explained_variance`.

        Raises:
            Undefined: No tokens, or all of them equal.
        """
        s = self._sums
        about_mean = s.squared_in - float(self._total.square().sum()) / s.tokens if s.tokens else 0.0
        if about_mean <= 1e-12 * s.squared_in or not s.tokens:
            raise Undefined("all activations are equal, so there is no variance to explain.")
        return 1.0 - s.squared_error / about_mean

    def l2_ratio(self) -> float:
        """Mean over tokens of the reconstruction's norm over the input's; below 1 the SAE shrinks."""
        return self._ratio / self._sums.tokens if self._sums.tokens else float("nan")

    def l0(self) -> float:
        """Mean number of active features a token."""
        return self._sums.active / self._sums.tokens if self._sums.tokens else float("nan")
