"""How well an SAE rebuilds activations that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saeffect.lm.activations import ActivationSource
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.metrics import ReconstructionSums

__all__ = ["SaeQuality", "training_quality"]


@dataclass(frozen=True)
class SaeQuality:
    """Reconstruction on held-out activations.

    Attributes:
        explained_variance: See `saeffect.sae.metrics`.
        l2_ratio: Mean norm out over norm in.
        l0: Mean active features a token.
        dead_share: Share of features that fire on none of the tokens.
        mean_log10_density: Mean over features of log10(firing rate + 1e-10).
        n_tokens: Tokens measured on.
    """

    explained_variance: float
    l2_ratio: float
    l0: float
    dead_share: float
    mean_log10_density: float
    n_tokens: int


@torch.inference_mode()
def training_quality(sae: SparseAutoencoder, source: ActivationSource, *, max_tokens: int = 200_000) -> SaeQuality:
    """Measure an SAE (saved scale) on activations that it has not seen."""
    sums = ReconstructionSums(sae.cfg.d_in)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    for x in source.sample(max_tokens).split(1024):
        feature_acts = sae.encode(x)
        sums.add(x, sae(x), feature_acts)
        fired += (feature_acts > 0).sum(0)
    density = fired.double() / sums.n_tokens
    return SaeQuality(
        sums.explained_variance(),
        sums.l2_ratio(),
        sums.l0(),
        float((fired == 0).double().mean()),
        float((density + 1e-10).log10().mean()),
        sums.n_tokens,
    )
