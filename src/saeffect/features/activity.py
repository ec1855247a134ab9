"""How often and how strongly each feature fires, accumulated over batches of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, ShapeMismatch, unknown_name

__all__ = ["ActivityAccumulator"]


class ActivityAccumulator:
    """Streaming counts, sums and maxima of `feature_acts`, one a feature.

    A feature is *active* on a token where its activation is above 0. Counts, sums and maxima do not depend on
    how the tokens were cut into batches: activations are added one after the other, in float64.

    Args:
        d_sae: Number of features.
        sources: Names of the text sources that tokens may come from; each gets a density of its own.

    Raises:
        ConfigError: `d_sae` is below 1, or a source is named twice.

    Example:
        >>> activity = ActivityAccumulator(d_sae=2, sources=("general", "domain"))
        >>> activity.update(torch.tensor([[0.0, 2.0], [0.0, 4.0]]), ["general", "domain"])
        >>> activity.update(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), ["domain", "domain"])
        >>> activity.result()[["density", "mean_activation", "n_active", "density_domain"]].loc[1].tolist()
        [0.5, 3.0, 2.0, 0.3333333333333333]
    """

    def __init__(self, d_sae: int, sources: Sequence[str] = ("general", "domain")) -> None:
        if d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1. Got {d_sae} instead.", at="d_sae")
        if len(set(sources)) != len(sources):
            raise ConfigError(f"sources must differ. Got {list(sources)} instead.", at="sources")
        self.d_sae = d_sae
        self.sources = tuple(sources)
        self._codes = {name: code for code, name in enumerate(self.sources)}
        self._tokens = np.zeros(len(self.sources), dtype=np.int64)  # [n_sources]
        self._active = torch.zeros(len(self.sources), d_sae, dtype=torch.int64)
        self._sum = torch.zeros(d_sae, dtype=torch.float64)
        self._max = torch.zeros(d_sae, dtype=torch.float64)

    @property
    def n_tokens(self) -> int:
        """Tokens seen so far, over all sources."""
        return int(self._tokens.sum())

    def update(self, feature_acts: Tensor, sources: Sequence[str]) -> None:
        """Add a batch.

        Args:
            feature_acts: [n, d_sae], any float dtype. Values at or below 0 are inactive.
            sources: [n], the name of each token's source.

        Raises:
            ShapeMismatch: The shape is not [n, d_sae], or there are not n sources.
            UnknownName: A source was not named on creation.
            BadFile: An activation is NaN or plus infinity. The batch is then not counted at all.
        """
        if feature_acts.ndim != 2 or feature_acts.shape[1] != self.d_sae:
            raise ShapeMismatch(
                f"feature_acts must be [n, {self.d_sae}]. Got {list(feature_acts.shape)} instead.",
                at="feature_acts",
            )
        codes = self._encode(sources, len(feature_acts))
        acts = feature_acts.detach()
        if len(acts) == 0:
            return
        _check_finite(acts.amax(dim=0))  # a NaN anywhere in a column is its maximum
        row, feature = (acts > 0).nonzero(as_tuple=True)
        self._add(codes, row.cpu(), feature.cpu(), acts[row, feature].cpu().double())

    def update_sparse(self, indices: Tensor, values: Tensor, sources: Sequence[str]) -> None:
        """Add a batch that lists only the features that may be active, as TopK SAEs do.

        Args:
            indices: int64 [n, k], feature numbers; within a row no feature is active twice.
            values: [n, k], their activations, any float dtype; entries at or below 0 are padding.
            sources: [n], the name of each token's source.

        Raises:
            ShapeMismatch: The two shapes differ, or there are not n sources, or a feature is outside the SAE.
            UnknownName: A source was not named on creation.
            BadFile: An activation is NaN or infinite. The batch is then not counted at all.

        Example:
            >>> activity = ActivityAccumulator(d_sae=3, sources=("text",))
            >>> indices, values = torch.tensor([[2, 0], [2, 1]]), torch.tensor([[5.0, 0.0], [1.0, 2.0]])
            >>> activity.update_sparse(indices, values, ["text", "text"])
            >>> activity.result()["n_active"].tolist()
            [0, 1, 2]
        """
        if indices.ndim != 2 or indices.shape != values.shape:
            raise ShapeMismatch(
                f"indices and values must both be [n, k]. Got {list(indices.shape)} and {list(values.shape)} instead.",
                at="indices, values",
            )
        codes = self._encode(sources, len(indices))
        feature = indices.detach().cpu().long().flatten()
        value = values.detach().cpu().double().flatten()
        _check_finite(value)
        if len(feature) and not (int(feature.min()) >= 0 and int(feature.max()) < self.d_sae):
            raise ShapeMismatch(f"indices must be from 0 to {self.d_sae - 1}.", at="indices")
        row = torch.arange(len(codes)).repeat_interleave(indices.shape[1])
        active = value > 0
        self._add(codes, row[active], feature[active], value[active])

    def result(self) -> pd.DataFrame:
        """One row a feature, over all tokens so far.

        Returns:
            feature (int64); density, the share of tokens on which it is active; mean_activation over those
            tokens (NaN if n_active is 0); max_activation (0 if never active); n_active (int64); and
            density_<source>, the share of that source's tokens. Densities and the maximum are NaN where no
            token was seen. Activations are in the SAE's own units.
        """
        tokens, n_active = self.n_tokens, self._active.sum(dim=0).numpy()
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN that is wanted
            columns = {
                "feature": np.arange(self.d_sae, dtype=np.int64),
                "density": n_active / np.float64(tokens),
                "mean_activation": self._sum.numpy() / n_active,
                "max_activation": self._max.numpy() if tokens else np.full(self.d_sae, np.nan),
                "n_active": n_active,
            }
            for code, name in enumerate(self.sources):
                columns[f"density_{name}"] = self._active[code].numpy() / np.float64(self._tokens[code])
        return pd.DataFrame(columns)

    def _encode(self, sources: Sequence[str], n: int) -> Tensor:
        """Source names as int64 codes [n]."""
        if len(sources) != n:
            raise ShapeMismatch(f"{n} tokens need {n} sources. Got {len(sources)} instead.", at="sources")
        try:
            return torch.tensor([self._codes[name] for name in sources], dtype=torch.int64)
        except KeyError as error:
            raise unknown_name("source", error.args[0], self.sources, at="sources") from None

    def _add(self, codes: Tensor, row: Tensor, feature: Tensor, value: Tensor) -> None:
        """Count tokens of sources `codes` [n], and activations `value` [m] of `feature` at token `row`."""
        self._tokens += torch.bincount(codes, minlength=len(self.sources)).numpy()
        cell = codes[row] * self.d_sae + feature
        self._active += torch.bincount(cell, minlength=self._active.numel()).view_as(self._active)
        self._sum.index_add_(0, feature, value)
        self._max.scatter_reduce_(0, feature, value, "amax")


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise BadFile(
            "an activation is NaN or infinite.",
            at="feature_acts",
            fix="check the SAE's weights and the model's precision.",
        )
