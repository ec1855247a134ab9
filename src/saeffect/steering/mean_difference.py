"""The difference of two means: the vector that needs no SAE, which an SAE's feature must beat to be worth it.

Wu et al. (2025, AxBench) found this simple vector ahead of SAE features in steering.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saeffect.errors import ShapeMismatch

__all__ = ["MeanDifferences"]


class MeanDifferences:
    """For each feature: mean activation of the model where the feature fires, minus that on general text.

    Args:
        features: Which features.
        d_model: Width of the activations.
    """

    def __init__(self, features: Sequence[int], d_model: int) -> None:
        self.features = tuple(int(f) for f in features)
        self._there = torch.zeros(len(self.features), d_model, dtype=torch.float64)
        self._n_there = torch.zeros(len(self.features), dtype=torch.int64)
        self._general = torch.zeros(d_model, dtype=torch.float64)
        self._n_general = 0

    def add(self, x: Tensor, feature_acts: Tensor, general: Tensor) -> None:
        """Take in some tokens.

        Args:
            x: Activations of the model, `[n_tokens, d_model]`, any float dtype.
            feature_acts: Of the features in order, `[n_tokens, n_features]`.
            general: Which tokens are of the text to compare with, bool `[n_tokens]`.

        Raises:
            ShapeMismatch: The shapes do not fit.
        """
        if feature_acts.shape != (len(x), len(self.features)) or general.shape != (len(x),):
            raise ShapeMismatch(
                f"{len(x)} tokens, but activations of shape {tuple(feature_acts.shape)} for"
                f" {len(self.features)} features and a mask of {tuple(general.shape)}."
            )
        wide, fires = x.double(), feature_acts > 0
        self._there += fires.double().T @ wide
        self._n_there += fires.sum(dim=0)
        self._general += wide[general].sum(dim=0)
        self._n_general += int(general.sum())

    def vector(self, feature: int) -> Tensor | str:
        """The difference, float32 `[d_model]`; or why there is none."""
        place = self.features.index(int(feature))
        n = int(self._n_there[place])
        if not n or not self._n_general:
            return "the feature never fired on the text" if not n else "there is no text to compare with"
        found = self._there[place] / n - self._general / self._n_general
        if not float(found.norm()) > 0:
            return "the two means are equal"
        return found.float()
