"""Absorption: features of the other SAE that together fire where a lost feature fired and write what it wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from saeffect.diffing.pair import SaeView
from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import FloatArray

__all__ = ["absorption"]

IntArray = npt.NDArray[np.int64]

_CANDIDATES = 16  # features that fire most often where it fired, to build its direction from
_MAX_PARENTS = 4  # of those, the most that may be needed
_MIN_ACTIVE = 10  # tokens on which the feature must have fired
_MIN_COACTIVE = 5  # tokens that a candidate must share with it
_MIN_LIFT = 2.0  # times as often as elsewhere a candidate must fire there: one that fires everywhere stands for nothing
_MIN_RECALL = 0.5  # share of its tokens on which a parent must fire
_MIN_COSINE = 0.6  # between its decoder row and the best sum (no negative weights) of the parents' rows
_ALPHA = 0.05  # highest p of that cosine among those of other features' rows and the same candidates
_NULL_FEATURES = 199  # such other features, drawn at random
_EMPTY: dict[str, Any] = {
    "absorbed": False,
    "absorbed_by": [],
    "weights": [],
    "recall": math.nan,
    "recall_each": [],
    "chance_recall": math.nan,
    "cosine": math.nan,
    "cosine_p": math.nan,
    "reason": "",
}


def absorption(
    features: Sequence[int] | IntArray, control: SaeView, treatment: SaeView, *, seed: int = 0
) -> pd.DataFrame:
    """Look for the parents of control features without a counterpart (idea: Chanin et al. 2024, A is for Absorption).

    The SAEs need firing logs of the same tokens; `seed` is for the draw of features to compare with.

    Returns:
        One row a feature, in the order given: `feature`; `n_active`, tokens on which it fired; `absorbed`;
        `absorbed_by`, treatment features, the largest part first; `weights` of their unit rows in the sum; `recall`,
        the share of its tokens on which any of them fires; `recall_each`; `chance_recall`, `recall` if each fired
        independently at its overall density; `cosine` of the sum with its decoder row; `cosine_p`, rank of that cosine
        among those of other control features built from the same candidates; `reason`, why it is not called absorbed.
        Numbers are NaN where it fired too seldom or nothing fires with it.

    Raises `ShapeMismatch` if the logs are missing or of different text, or the decoders differ in width.
    """
    if control.firing is None or treatment.firing is None or control.firing.n_tokens != treatment.firing.n_tokens:
        raise ShapeMismatch("both SAEs' logs are needed, and they must be of the same text.", at="treatment")
    if control.W_dec.shape[1] != treatment.W_dec.shape[1]:
        raise ShapeMismatch(
            f"the decoders are {control.W_dec.shape[1]} and {treatment.W_dec.shape[1]} wide.", at="treatment"
        )
    fired_before, fires_now = control.firing.matrix().tocsc(), treatment.firing.matrix().tocsr()
    density = np.bincount(fires_now.indices, minlength=treatment.firing.d_sae) / max(1, treatment.firing.n_tokens)
    others = np.random.default_rng(seed).permutation(control.firing.d_sae)[: _NULL_FEATURES + 1]
    before, now = _unit(control.W_dec), _unit(treatment.W_dec)
    rows = []
    for feature in np.asarray(features, dtype=np.int64).tolist():
        start, end = fired_before.indptr[feature : feature + 2]
        here = fires_now[np.sort(fired_before.indices[start:end])]
        row: dict[str, Any] = {"feature": feature, "n_active": int(end - start), **_EMPTY}
        if end - start < _MIN_ACTIVE:
            row["reason"] = f"it fires on {end - start} tokens, and {_MIN_ACTIVE} are needed"
        else:
            null = before[others[others != feature][:_NULL_FEATURES]]
            row |= _parents(before[feature], null, here, now, density)
        rows.append(row)
    columns = ["feature", "n_active", *_EMPTY]
    return pd.DataFrame(rows, columns=columns).astype({"feature": "int64", "n_active": "int64", "absorbed": "bool"})


def _parents(row: FloatArray, null: FloatArray, here: Any, now: FloatArray, density: FloatArray) -> dict[str, Any]:
    """Parents of one feature from what fires `here`, the tokens on which it fired (CSR [n_active, d_sae])."""
    together = np.bincount(here.indices, minlength=here.shape[1])
    recall = together / here.shape[0]
    possible = np.flatnonzero((together >= _MIN_COACTIVE) & (recall >= _MIN_LIFT * density))
    if not len(possible):
        return {"reason": "no feature fires with it more often than elsewhere"}
    # Ties by number, so that the choice is reproducible.
    candidates = possible[np.argsort(-recall[possible], kind="stable")][:_CANDIDATES]
    weights, cosine, chosen = _build(row, now[candidates])
    if not len(chosen):
        return {"cosine": 0.0, "cosine_p": 1.0, "recall": 0.0, "reason": "those that fire with it point elsewhere"}
    built_null = np.array([_build(other, now[candidates])[1] for other in null])
    cosine_p = (1 + int((built_null >= cosine - 1e-12).sum())) / (1 + len(null))
    parents = candidates[chosen]
    union = float((np.diff(here[:, parents].indptr) > 0).mean())
    reasons = [
        (union >= _MIN_RECALL, f"they fire on {100 * union:.0f} % of its tokens only"),
        (cosine >= _MIN_COSINE, f"their sum has a cosine of only {cosine:.2f} with it"),
        (cosine_p <= _ALPHA, "their sum fits other features as well"),
    ]
    reason = next((text for holds, text in reasons if not holds), "")
    return {
        "absorbed": not reason,
        "absorbed_by": parents.tolist(),
        "weights": weights.tolist(),
        "recall": union,
        "recall_each": recall[parents].tolist(),
        "chance_recall": float(1 - np.prod(1 - density[parents])),
        "cosine": cosine,
        "cosine_p": cosine_p,
        "reason": reason,
    }


def _build(row: FloatArray, parts: FloatArray) -> tuple[FloatArray, float, IntArray]:
    """The best sum of at most `_MAX_PARENTS` parts: weights, its cosine with the unit `row`, and which parts."""
    from scipy.optimize import nnls

    weights = nnls(parts.T, row)[0]
    chosen = np.argsort(-weights, kind="stable")[:_MAX_PARENTS]
    chosen = chosen[weights[chosen] > 1e-9]
    if not len(chosen):
        return np.empty(0), 0.0, chosen
    weights = nnls(parts[chosen].T, row)[0]
    order = np.argsort(-weights, kind="stable")
    order = order[weights[order] > 1e-9]
    chosen, weights = chosen[order], weights[order]
    total = weights @ parts[chosen]
    length = float(np.linalg.norm(total))
    return weights, float(total @ row / length) if length > 0 else 0.0, chosen


def _unit(W_dec: Tensor) -> FloatArray:
    rows: FloatArray = W_dec.detach().double().cpu().numpy()
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
