"""The L1 SAE: a ReLU keeps features positive, a penalty keeps them few (the paper's)."""

from __future__ import annotations

from torch import Tensor

from saeffect.sae.base import SparseAutoencoder

__all__ = ["StandardSae"]


class StandardSae(SparseAutoencoder):
    """`feature_acts = relu(hidden_pre)`."""

    architecture = "standard"

    def activation(self, hidden_pre: Tensor) -> Tensor:
        return hidden_pre.relu()
