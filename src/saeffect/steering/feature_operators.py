"""Setting what an SAE's features do: clamped to a value, or ablated; one feature a row, or several at once.

Adding a decoder row pushes every position alike. Setting a feature's activation pushes a position only as far
as the feature is not there already, and leaves alone what the SAE does not explain: with activation a, target t
and decoder row d, an activation x becomes x + (t - a) d. That equals decoding the changed activations and
putting the SAE's error back (Templeton et al. 2024, "Golden Gate Claude").

At the attention sink, most often a text's first token, the residual is tens of times longer than elsewhere. SAEs are
not trained on it, and what they read there (activations a hundred times a feature's maximum) means nothing: setting
features there would break the model's attention, not say anything. So longer activations than a limit are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.sae.base import SparseAutoencoder
from saeffect.steering.operators import AddVectors

__all__ = ["SetFeatures", "ablate", "add_features", "clamp"]

NO_FEATURE = -1
"""Fills up rows that set fewer features than others."""


@dataclass(frozen=True, eq=False)
class SetFeatures:
    """Sets features to given activations and keeps the SAE's error.

    Attributes:
        sae: In the units of the model's activations.
        features: Int64 `[n_rows, n_features]`, no feature twice in a row; -1 for none.
        targets: Feature activations, float32 `[n_rows, n_features]`, at least 0.
        along: Directions to push along in place of the features' own, float32 `[n_rows, n_features, d_in]`: a
            placebo is pushed as hard at each position as the feature would be, but elsewhere. None: their own.
        norm_limit: Activations with a longer Euclidean norm are left as they are; see `NormLimit` for the usual one.
    """

    sae: SparseAutoencoder
    features: Tensor
    targets: Tensor
    along: Tensor | None = None
    norm_limit: float = math.inf

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not self.features.numel() or self.features.shape != self.targets.shape:
            raise ShapeMismatch(
                f"features have shape {tuple(self.features.shape)}, targets {tuple(self.targets.shape)};"
                " expected both [rows, features], not empty."
            )
        if int(self.features.min()) < NO_FEATURE or int(self.features.max()) >= self.sae.cfg.d_sae:
            raise ShapeMismatch(
                f"features run from {int(self.features.min())} to {int(self.features.max())},"
                f" but the SAE has {self.sae.cfg.d_sae}."
            )
        ordered = self.features.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_FEATURE)).any()):
            raise ConfigError("a row sets the same feature twice.", at="features")
        if self.along is not None and self.along.shape != (*self.features.shape, self.sae.cfg.d_in):
            raise ShapeMismatch(
                f"directions to push along have shape {tuple(self.along.shape)};"
                f" expected {(*self.features.shape, self.sae.cfg.d_in)}."
            )
        if not bool(torch.isfinite(self.targets).all()) or bool((self.targets < 0).any()):
            raise ConfigError(
                "a target activation is negative, NaN or infinite; features are at least 0.",
                at="targets",
                fix="give a multiple of the feature's maximum that is at least 0.",
            )

    @property
    def n_rows(self) -> int:
        return len(self.features)

    def take(self, first: int, last: int) -> SetFeatures:
        along = None if self.along is None else self.along[first:last]
        return SetFeatures(self.sae, self.features[first:last], self.targets[first:last], along, self.norm_limit)

    @torch.no_grad()
    def apply(self, x: Tensor) -> Tensor:
        if x.shape[0] != self.n_rows:
            raise ShapeMismatch(f"activations of {x.shape[0]} rows met {self.n_rows} rows of features to set.")
        wide = torch.promote_types(x.dtype, torch.float32)
        at_sae = x.to(self.sae.W_dec.device)  # the SAE stays where it was loaded, whatever the model runs on
        features, targets = self.features.to(at_sae.device), self.targets.to(at_sae.device)
        known = features.clamp_min(0)
        # One position at a time over all rows: the activations of all features of a long prompt would not fit.
        change = torch.empty(*x.shape[:2], features.shape[1], device=at_sae.device)
        for position in range(x.shape[1]):
            acts = self.sae.encode(at_sae[:, position]).gather(1, known)
            change[:, position] = targets - acts
        change *= (features != NO_FEATURE)[:, None, :]
        change *= (at_sae.to(wide).norm(dim=-1) <= self.norm_limit)[:, :, None]
        along = self.sae.directions(known) if self.along is None else self.along.to(at_sae.device)
        moved = torch.einsum("rpf,rfd->rpd", change, along) * self.sae.output_scale(at_sae)
        return (x.to(wide) + moved.to(x.device, wide)).to(x.dtype)


def clamp(
    sae: SparseAutoencoder,
    features: Sequence[Sequence[int]],
    multiples: Sequence[float],
    max_acts: Tensor,
    *,
    norm_limit: float = math.inf,
) -> SetFeatures:
    """Set features to multiples of the largest activation that they showed on text.

    Args:
        sae: In the units of the model's activations.
        features: Which, for each row: one, or several at once.
        multiples: One a row, at least 0; Anthropic's demonstrations used 5 to 10.
        max_acts: Largest activation of every feature on text, float32 `[d_sae]`.
        norm_limit: As in `SetFeatures`.

    Raises:
        ConfigError: A feature that never fired has no maximum to multiply; or a negative multiple.
    """
    padded = _padded(features)
    if len(multiples) != len(padded):
        raise ShapeMismatch(f"{len(padded)} rows of features, but {len(multiples)} multiples.")
    maxima = max_acts[padded.clamp_min(0)].float()
    silent = (padded != NO_FEATURE) & ~(maxima > 0)
    if bool(silent.any()):
        raise ConfigError(
            f"feature {int(padded[silent][0])} never fired on the text, so it has no maximum to clamp it to.",
            at="features",
            fix="leave it out, or use more text.",
        )
    maxima = maxima.masked_fill(padded == NO_FEATURE, 0.0)
    targets = maxima * torch.tensor(list(multiples), dtype=torch.float32)[:, None]
    return SetFeatures(sae, padded, targets, norm_limit=norm_limit)


def ablate(sae: SparseAutoencoder, features: Sequence[Sequence[int]], *, norm_limit: float = math.inf) -> SetFeatures:
    """Switch features off wherever they are on; `norm_limit` as in `SetFeatures`."""
    padded = _padded(features)
    return SetFeatures(sae, padded, torch.zeros(padded.shape), norm_limit=norm_limit)


def add_features(
    sae: SparseAutoencoder, features: Sequence[Sequence[int]], coefficients: Sequence[Sequence[float]]
) -> AddVectors:
    """Add several decoder rows at once: `Σ_f coefficient_f · W_dec[f]`, for each row of the batch its own.

    Args:
        sae: Gives the decoder rows.
        features: Which, for each row.
        coefficients: The paper's multiplier, for each feature of each row.

    Raises:
        ShapeMismatch: Rows of features and of coefficients differ in length.
    """
    if [len(row) for row in features] != [len(row) for row in coefficients]:
        raise ShapeMismatch("each row needs as many coefficients as features.")
    padded = _padded(features)
    amounts = torch.zeros(padded.shape)
    for row, values in enumerate(coefficients):
        amounts[row, : len(values)] = torch.tensor(list(values), dtype=torch.float32)
    rows = sae.directions(padded.clamp_min(0)).detach().float()
    return AddVectors(torch.einsum("rf,rfd->rd", amounts, rows))


def _padded(features: Sequence[Sequence[int]]) -> Tensor:
    longest = max((len(row) for row in features), default=0)
    if not longest or not all(len(row) for row in features):
        raise ConfigError("every row must set at least one feature.", at="features")
    padded = torch.full((len(features), longest), NO_FEATURE, dtype=torch.int64)
    for row, some in enumerate(features):
        padded[row, : len(some)] = torch.tensor(list(some))
    return padded
