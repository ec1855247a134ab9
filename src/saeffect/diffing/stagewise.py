"""How far each feature turned when an SAE was trained on from the control's: feature i stays feature i.

Stage-wise diffing: the control's SAE is the start, and training goes on with the fine-tuned model's
activations. Features keep their numbers, so no matching is needed. What training on alone does is the null: the
same warm start on the same model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from saeffect.diffing.matched_null import NO_STRATUM, exchangeable_p, strata
from saeffect.errors import BadFile, ConfigError, ShapeMismatch
from saeffect.stats.arguments import FloatArray
from saeffect.stats.multiplicity import benjamini_hochberg

__all__ = ["HasWeights", "SaeWeights", "rotations", "stagewise"]

NO_NULL = "no SAE was trained on from the same start on the same model, so nobody knows what training alone does"
_TRAITS = ("density", "decoder_norm")


class HasWeights(Protocol):
    """Any SAE; `SparseAutoencoder` is one. Its `b_enc` [d_sae] is looked for, or a gated one's `b_gate`."""

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae]."""

    @property
    def W_dec(self) -> Tensor:
        """[d_sae, d_in]."""


@dataclass(frozen=True, eq=False)
class SaeWeights:
    """Weights without an SAE around them: `W_enc` [d_in, d_sae], `b_enc` [d_sae] or None, `W_dec` [d_sae, d_in]."""

    W_enc: Tensor
    b_enc: Tensor | None
    W_dec: Tensor


def rotations(start: HasWeights, end: HasWeights) -> pd.DataFrame:
    """What changed in each feature between two SAEs that number their features alike.

    Returns:
        One row a feature: `feature`; `decoder_rotation` and `encoder_rotation`, the angles in degrees (0 to
        180) between the decoder rows and between the encoder columns; `bias_change`, end minus start of b_enc (of a
        gated SAE b_gate: when it is on), NaN where there is none; `norm_ratio` of the decoder rows, end over start.
        NaN where a vector is 0.

    Raises:
        ShapeMismatch: The SAEs differ in shape.
        BadFile: A weight is NaN or infinite.

    Source:
        Bricken et al. (2024), Stage-wise model diffing. Angles after Kahan, exact for tiny ones too.

    Example:
        >>> a = SaeWeights(torch.eye(2), None, torch.eye(2))
        >>> b = SaeWeights(torch.eye(2), None, torch.tensor([[0.0, 3.0], [0.0, 1.0]]))
        >>> rotations(a, b)[["decoder_rotation", "norm_ratio"]].to_numpy().tolist()
        [[90.0, 3.0], [0.0, 1.0]]
    """
    biases = _bias(start), _bias(end)
    pairs = {"W_dec": (start.W_dec, end.W_dec), "W_enc": (start.W_enc, end.W_enc), "b_enc": biases}
    for name, (first, second) in pairs.items():
        shapes = [None if one is None else list(one.shape) for one in (first, second)]
        if shapes[0] != shapes[1]:
            raise ShapeMismatch(
                f"the SAEs' {name} differ in shape: {shapes[0]} and {shapes[1]}.",
                at=name,
                fix="stage-wise diffing needs an SAE trained on from the other's weights.",
            )
        if any(one is not None and not bool(torch.isfinite(one).all()) for one in (first, second)):
            raise BadFile(f"{name} holds NaN or infinity.", at=name)
    n = len(start.W_dec)
    norms = [_array(torch.linalg.vector_norm(one.W_dec.detach().double(), dim=1)) for one in (start, end)]
    bias = np.full(n, np.nan)
    if biases[0] is not None and biases[1] is not None:
        bias = _array(biases[1].detach().double() - biases[0].detach().double())
    return pd.DataFrame(
        {
            "feature": np.arange(n),
            "decoder_rotation": _angle(start.W_dec, end.W_dec),
            "encoder_rotation": _angle(start.W_enc.T, end.W_enc.T),
            "bias_change": bias,
            "norm_ratio": norms[1] / np.where(norms[0] > 0, norms[0], np.nan),
        }
    )


def stagewise(
    start: HasWeights,
    treatment: HasWeights,
    nulls: Sequence[HasWeights],
    *,
    features: pd.DataFrame | None = None,
    min_stratum: int = 200,
    margin: float = 0.0,
) -> pd.DataFrame:
    """Which features turned further than training on alone turns them, those that turned most first.

    p compares a feature's rotation with the same feature's under the nulls (`exchangeable_p`): seldom firing
    features, which drift in any training, do not stand out for that.

    Args:
        start: The SAE that all others were trained on from.
        treatment: Trained on with the fine-tuned model's activations.
        nulls: Trained on with the control's, as long and with the same settings; may be empty.
        features: One row a feature of `start` with `density` and `decoder_norm`, to compare like with like. If
            None all features are compared with all. Features of density 0 are not tested.
        min_stratum: Fewest features to compare among.
        margin: Degrees of rotation beyond the nulls' that count for nothing.

    Returns:
        The columns of `rotations`; `null_rotation` (mean of the nulls, degrees); `excess_rotation`;
        `percentile`, the share (0 to 100) of null rotations in the feature's stratum that are no larger; `p`;
        `q` (Benjamini-Hochberg); `reason` where these are NaN. Sorted by `decoder_rotation`, largest first,
        undefined ones last.

    Raises:
        ShapeMismatch: SAEs or `features` do not fit `start`.
        BadFile: A weight is NaN or infinite.
        ConfigError: `margin` is negative.
    """
    if not margin >= 0:
        raise ConfigError(f"margin must be at least 0. Got {margin} instead.", at="margin")
    table = rotations(start, treatment)
    n = len(table)
    groups, silent = _groups(features, n, min_stratum)
    own = table["decoder_rotation"].to_numpy()
    turned = np.array([own, *(rotations(start, one)["decoder_rotation"].to_numpy() for one in nulls)])
    undefined = np.isnan(turned).any(axis=0)
    reason = np.where(undefined, "a decoder row is zero", np.where(silent, "it never fires on this text", ""))
    columns: dict[str, FloatArray] = {name: np.full(n, np.nan) for name in ("null_rotation", "percentile", "p")}
    if not nulls:
        reason = np.where(undefined, reason, NO_NULL)
    else:
        groups = np.where(undefined, NO_STRATUM, groups)
        columns["null_rotation"] = turned[1:].mean(axis=0)
        columns["percentile"] = _percentile(turned, groups)
        # The test is for low numbers: little rotation is much similarity.
        columns["p"], _ = exchangeable_p(-turned, groups, margin=margin)
        unlike = (groups == NO_STRATUM) & (reason == "")
        reason = np.where(unlike, "its density or decoder norm is unknown", reason)
    table["null_rotation"] = columns["null_rotation"]
    table["excess_rotation"] = own - columns["null_rotation"]
    table["percentile"] = columns["percentile"]
    table["p"] = columns["p"]
    table["q"] = benjamini_hochberg(columns["p"])
    table["reason"] = pd.Series(reason, dtype="str")
    return table.sort_values("decoder_rotation", ascending=False, kind="stable", na_position="last", ignore_index=True)


def _bias(sae: HasWeights) -> Tensor | None:
    """What is added to the pre-activations, [d_sae]."""
    found: Tensor | None = getattr(sae, "b_enc", None)
    return getattr(sae, "b_gate", None) if found is None else found


def _angle(first: Tensor, second: Tensor, chunk: int = 4096) -> FloatArray:
    """Degrees between rows of equal number; NaN where one is 0."""
    parts = []
    for begin in range(0, len(first), chunk):
        u, v = (one[begin : begin + chunk].detach().double() for one in (first, second))
        lengths = [one.norm(dim=1, keepdim=True) for one in (u, v)]
        u, v = u / lengths[0], v / lengths[1]
        # An arc cosine of nearly 1 would lose half of its digits.
        angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
        parts.append(_array(angle) * (180 / math.pi))
    return np.concatenate(parts) if parts else np.empty(0)


def _array(values: Tensor) -> FloatArray:
    result: FloatArray = values.cpu().numpy()
    return result


def _groups(
    features: pd.DataFrame | None, n: int, min_stratum: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Stratum of each feature, and which never fire."""
    if features is None:
        return np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
    if len(features) != n or not set(_TRAITS) <= set(features.columns):
        raise ShapeMismatch(
            f"features must have {n} rows and the columns {', '.join(_TRAITS)}. Got {len(features)} rows instead.",
            at="features",
        )
    traits = features[list(_TRAITS)].to_numpy(dtype=np.float64, na_value=np.nan).copy()
    silent = np.asarray(traits[:, 0] == 0)
    traits[silent] = np.nan
    return strata(traits, min_stratum), silent


def _percentile(turned: FloatArray, groups: npt.NDArray[np.int64]) -> FloatArray:
    result = np.full(turned.shape[1], np.nan)
    for group in np.unique(groups[groups != NO_STRATUM]):
        members = groups == group
        null = np.sort(turned[1:, members].ravel())
        result[members] = 100 * np.searchsorted(null, turned[0, members], side="right") / len(null)
    return result
