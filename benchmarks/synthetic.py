"""Activations of realistic structure from a seed, and SAE weights that already explain them.

An activation is a sparse sum of planted directions whose frequencies fall off like those of words, plus a little
noise, scaled so that the mean norm is sqrt(d_in). The start weights have the planted directions as decoder rows, their
transpose as encoder, and one negative bias for all features that is chosen so that `l0` features are active: steps
taken from there cost what steps in the middle of a training cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Planted", "l1_start", "topk_start"]

ACTIVE = 32  # planted directions a token


class Planted:
    """Directions and how often each is used.

    Args:
        d_in: Width of the activations.
        n_directions: Number of planted directions.
        seed: Of directions, and of the activations drawn from them.

    Attributes:
        directions: Float32 `[n_directions, d_in]`, rows of unit length.
        frequencies: Float32 `[n_directions]`, sum 1, falling off as 1 / (rank + 30) in a random order.
    """

    def __init__(self, d_in: int, n_directions: int, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n_directions, d_in, generator=self._generator)
        self.directions = directions.div_(directions.norm(dim=1, keepdim=True))
        ranks = torch.randperm(n_directions, generator=self._generator).float()
        frequencies = 1 / (ranks + 30)
        self.frequencies = frequencies / frequencies.sum()
        self._scale: float | None = None

    def activations(self, n_tokens: int) -> Tensor:
        """The next `n_tokens` activations, float32 `[n_tokens, d_in]`, of mean norm sqrt(d_in)."""
        d_in = self.directions.shape[1]
        draws = torch.multinomial(self.frequencies, n_tokens * ACTIVE, replacement=True, generator=self._generator)
        strengths = torch.randn(n_tokens, ACTIVE, generator=self._generator).mul_(0.5).exp_()
        x = torch.nn.functional.embedding_bag(
            draws.view(n_tokens, ACTIVE), self.directions, per_sample_weights=strengths, mode="sum"
        )
        noise = torch.randn(x.shape, generator=self._generator)
        x.add_(noise, alpha=0.1 * float(x.norm(dim=1).mean()) / math.sqrt(d_in))
        if self._scale is None:
            self._scale = math.sqrt(d_in) / float(x.norm(dim=1).mean())
        return x.mul_(self._scale)


def l1_start(planted: Planted, x: Tensor, l0: float) -> dict[str, Tensor]:
    """Weights of an L1 SAE with about `l0` active features a token on `x`, float32 `[n_tokens, d_in]`."""
    hidden_pre = (x[:512] @ planted.directions.T).flatten()
    keep = max(1, round(l0 * min(512, len(x))))
    threshold = float(hidden_pre.topk(keep, sorted=False).values.min())
    return _weights(planted, -threshold)


def topk_start(planted: Planted) -> dict[str, Tensor]:
    """Weights of a TopK SAE: the same without a bias, since k decides how many features are active."""
    return _weights(planted, 0.0)


def _weights(planted: Planted, bias: float) -> dict[str, Tensor]:
    d_sae, d_in = planted.directions.shape
    return {
        "W_enc": planted.directions.T.contiguous(),
        "b_enc": torch.full((d_sae,), bias),
        "W_dec": planted.directions.clone(),
        "b_dec": torch.zeros(d_in),
    }
