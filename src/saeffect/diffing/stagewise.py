"""Stage-wise diffing: how far each feature turned when the control's SAE was trained further on the fine-tuned
model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.diffing.matched_null import MIN_STRATUM, NO_STRATUM, TRAITS, exchangeable_p, strata
from saeffect.diffing.pair import ModelPair
from saeffect.errors import BadFile, ShapeMismatch
from saeffect.sae.base import SparseAutoencoder
from saeffect.stats.arguments import FloatArray
from saeffect.stats.multiplicity import benjamini_hochberg

__all__ = ["measure", "rotations", "stagewise"]

NO_NULL = "no SAE was trained on from the same start on the same model, so nobody knows what training alone does"
_ROWS = 4096  # converted to float64 at a time


def measure(pair: ModelPair) -> dict[str, pd.DataFrame]:
    """stagewise: as `stagewise` gives it, where the treatment's SAE was trained on from the control's."""
    start, treatment = pair.control.sae, pair.treatment.sae
    shape = pair.control.W_dec.shape
    if start is None or treatment is None or not pair.treatment.warm_started or pair.treatment.W_dec.shape != shape:
        return {}
    nulls = [view.sae for view in pair.others if view.warm_started and view.sae and view.W_dec.shape == shape]
    return {"stagewise": stagewise(start, treatment, nulls, pair.control.features)}


def rotations(start: SparseAutoencoder, end: SparseAutoencoder) -> pd.DataFrame:
    """What changed in each feature between two SAEs that number their features alike (Bricken et al. 2024).

    One row a feature: `feature`; `decoder_rotation` and `encoder_rotation`, in degrees (0 to 180, exact for tiny ones);
    `bias_change`, end minus start of b_enc (of a gated SAE b_gate), NaN where there is none; `norm_ratio` of the
    decoder rows, end over start. `ShapeMismatch`: the SAEs differ in shape; `BadFile`: a weight is NaN or infinite.
    """
    biases = _bias(start), _bias(end)
    pairs = {"W_dec": (start.W_dec, end.W_dec), "W_enc": (start.W_enc, end.W_enc), "b_enc": biases}
    for name, pair in pairs.items():
        shapes = [None if weights is None else list(weights.shape) for weights in pair]
        if shapes[0] != shapes[1]:
            raise ShapeMismatch(
                f"the SAEs' {name} differ in shape: {shapes[0]} and {shapes[1]}.",
                at=name,
                fix="stage-wise diffing needs an SAE trained on from the other's weights.",
            )
        if any(weights is not None and not bool(torch.isfinite(weights).all()) for weights in pair):
            raise BadFile(f"{name} holds NaN or infinity.", at=name)
    n = len(start.W_dec)
    norms = [_to_numpy(torch.linalg.vector_norm(sae.W_dec.detach().double(), dim=1)) for sae in (start, end)]
    bias = np.full(n, np.nan)
    if biases[0] is not None and biases[1] is not None:
        bias = _to_numpy(biases[1].detach().double() - biases[0].detach().double())
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
    start: SparseAutoencoder,
    treatment: SparseAutoencoder,
    nulls: Sequence[SparseAutoencoder],
    features: pd.DataFrame,
) -> pd.DataFrame:
    """Which features turned further than further training alone turns them; those that turned most first.

    The null is the same warm start on the control's model (`nulls`, perhaps none): p compares a feature's rotation with
    the same feature's under the nulls (`exchangeable_p`), since rarely firing features drift in any training.
    `features` has one row a feature of `start` with `TRAITS`; those of density 0 are not tested. Errors as in
    `rotations`.

    The columns of `rotations`; `null_rotation` (mean of the nulls, degrees); `excess_rotation`; `percentile`, the share
    (0 to 100) of null rotations in the feature's stratum that are no larger; `p`; `q`; `reason` where these are NaN.
    """
    table = rotations(start, treatment)
    rotation = table["decoder_rotation"].to_numpy()
    all_rotations = np.array([rotation, *(rotations(start, sae)["decoder_rotation"].to_numpy() for sae in nulls)])
    traits = features[list(TRAITS)].to_numpy(dtype=np.float64, na_value=np.nan).copy()
    silent, undefined = traits[:, 0] == 0, np.isnan(all_rotations).any(axis=0)
    reason = np.where(undefined, "a decoder row is zero", np.where(silent, "it never fires on this text", ""))
    null_rotation, percentile, p = np.full((3, len(table)), np.nan)
    if not nulls:
        reason = np.where(undefined, reason, NO_NULL)
    else:
        traits[silent] = np.nan
        groups = np.where(undefined, NO_STRATUM, strata(traits, MIN_STRATUM))
        null_rotation = all_rotations[1:].mean(axis=0)
        for group in np.unique(groups[groups != NO_STRATUM]):
            members = groups == group
            null = np.sort(all_rotations[1:, members].ravel())
            percentile[members] = 100 * np.searchsorted(null, rotation[members], side="right") / len(null)
        # The test is for low numbers, so rotations are negated.
        p, _ = exchangeable_p(-all_rotations, groups)
        unmatched = (groups == NO_STRATUM) & (reason == "")
        reason = np.where(unmatched, "its density or decoder norm is unknown", reason)
    table = table.assign(
        null_rotation=null_rotation,
        excess_rotation=rotation - null_rotation,
        percentile=percentile,
        p=p,
        q=benjamini_hochberg(p),
        reason=pd.Series(reason, dtype="str"),
    )
    return table.sort_values("decoder_rotation", ascending=False, kind="stable", na_position="last", ignore_index=True)


def _bias(sae: SparseAutoencoder) -> Tensor | None:
    bias: Tensor | None = getattr(sae, "b_enc", None)
    return getattr(sae, "b_gate", None) if bias is None else bias


def _angle(first: Tensor, second: Tensor) -> FloatArray:
    """Degrees between rows of equal number; NaN where one is 0."""
    parts = []
    for start in range(0, len(first), _ROWS):
        u, v = (rows[start : start + _ROWS].detach().double() for rows in (first, second))
        u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
        # The arc cosine of a number near 1 has half as many digits.
        angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
        parts.append(_to_numpy(angle) * (180 / math.pi))
    return np.concatenate(parts) if parts else np.empty(0)


def _to_numpy(values: Tensor) -> FloatArray:
    result: FloatArray = values.cpu().numpy()
    return result
