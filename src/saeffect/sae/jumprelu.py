"""JumpReLU SAE: a feature is off until it passes a threshold of its own (Rajamanoharan et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saeffect.sae.base import SaeConfig, SparseAutoencoder

__all__ = ["JumpReluSae"]


class JumpReluSae(SparseAutoencoder):
    """`feature_acts = hidden_pre` where above `threshold` (float32 `[d_sae]`) and 0, else 0."""

    architecture = "jumprelu"

    def __init__(self, cfg: SaeConfig) -> None:
        super().__init__(cfg)
        self.threshold = nn.Parameter(torch.zeros(cfg.d_sae))

    def activation(self, hidden_pre: Tensor) -> Tensor:
        return hidden_pre.relu() * (hidden_pre > self.threshold)
