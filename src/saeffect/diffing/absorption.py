"""Is a feature gone, or do others now speak for it?

A feature without a counterpart may have been absorbed: features of the other SAE fire where it fired, and their
decoder rows together point where its row pointed. Then the model still has what it stood for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from saeffect.diffing.coactivity import FiringLog
from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.stats.arguments import FloatArray

__all__ = ["AbsorptionRules", "absorption"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AbsorptionRules:
    """When a feature counts as absorbed.

    Attributes:
        n_candidates: Features that fire most often where it fired, to build its direction from.
        max_parents: Of those, the most that may be needed.
        min_active: Tokens on which the feature must have fired.
        min_coactive: Tokens that a candidate must share with it.
        min_lift: How many times as often as elsewhere a candidate must fire there: one that fires everywhere
            stands for nothing.
        min_recall: Share of its tokens on which a parent must fire.
        min_cosine: Between its decoder row and the best sum (no negative weights) of the parents' rows.
        alpha: Highest p of that cosine among those of other features' rows and the same candidates.
        n_null: Such other features, drawn at random.
        seed: Of that draw.
    """

    n_candidates: int = 16
    max_parents: int = 4
    min_active: int = 10
    min_coactive: int = 5
    min_lift: float = 2.0
    min_recall: float = 0.5
    min_cosine: float = 0.6
    alpha: float = 0.05
    n_null: int = 199
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_candidates", "max_parents", "min_active", "min_coactive", "n_null"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1. Got {getattr(self, name)} instead.", at=name)
        for name in ("min_recall", "min_cosine", "alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be above 0, at most 1. Got {getattr(self, name)} instead.", at=name)


def absorption(
    features: Sequence[int] | IntArray,
    *,
    control: FiringLog,
    treatment: FiringLog,
    W_dec_control: Tensor,
    W_dec_treatment: Tensor,
    rules: AbsorptionRules | None = None,
) -> pd.DataFrame:
    """Look for the parents of features that seem gone.

    Args:
        features: Control features without a counterpart.
        control: What the control's SAE did on a text.
        treatment: What the treatment's SAE did on the same tokens.
        W_dec_control: [d_sae_control, d_in].
        W_dec_treatment: [d_sae_treatment, d_in].
        rules: The defaults if None.

    Returns:
        One row a feature, in the order given: `feature`; `n_active`, tokens on which it fired; `absorbed`;
        `absorbed_by`, treatment features, the largest part first; `weights` of their unit rows in the sum;
        `recall`, the share of its tokens on which any of them fires; `recall_each`; `chance_recall`, the share
        of tokens on which one of them would fire if each fired as often as on the whole text, independently;
        `cosine` of the sum with its decoder row; `cosine_p`, rank of that cosine among those of other control
        features built from the same candidates; `reason`, why it is
        not called absorbed. Numbers are NaN where it fired too seldom or nothing fires with it.

    Raises:
        ShapeMismatch: Logs, decoders or feature numbers do not fit.

    Source:
        The idea of absorption: Chanin et al. (2024), A is for Absorption. The check is this package's own.
    """
    rules = rules or AbsorptionRules()
    wanted = np.asarray(features, dtype=np.int64)
    _check(wanted, control, treatment, W_dec_control, W_dec_treatment)
    fired_before = control.matrix().tocsc()
    fires_now = treatment.matrix().tocsr()
    n_tokens = max(1, treatment.n_tokens)
    density = np.bincount(fires_now.indices, minlength=treatment.d_sae) / n_tokens
    rng = np.random.default_rng(rules.seed)
    others = rng.permutation(control.d_sae)[: rules.n_null + 1]
    before, now = _unit(W_dec_control), _unit(W_dec_treatment)
    rows = []
    for feature in wanted.tolist():
        start, end = fired_before.indptr[feature : feature + 2]
        here = fires_now[np.sort(fired_before.indices[start:end])]
        row: dict[str, Any] = {"feature": feature, "n_active": int(end - start), **_NOTHING}
        if end - start < rules.min_active:
            row["reason"] = f"it fires on {end - start} tokens, and {rules.min_active} are needed"
        else:
            null = before[others[others != feature][: rules.n_null]]
            row |= _parents(before[feature], null, here, now, density, rules)
        rows.append(row)
    columns = ["feature", "n_active", *_NOTHING]
    return pd.DataFrame(rows, columns=columns).astype({"feature": "int64", "n_active": "int64", "absorbed": "bool"})


_NOTHING: dict[str, Any] = {
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


def _parents(
    row: FloatArray, null: FloatArray, here: Any, now: FloatArray, density: FloatArray, rules: AbsorptionRules
) -> dict[str, Any]:
    """Parents of one feature from what fires `here`, the tokens on which it fired (CSR [n_active, d_sae])."""
    together = np.bincount(here.indices, minlength=here.shape[1])
    recall = together / here.shape[0]
    possible = np.flatnonzero((together >= rules.min_coactive) & (recall >= rules.min_lift * density))
    if not len(possible):
        return {"reason": "no feature fires with it more often than elsewhere"}
    # Equals in order of their number, so that the choice is the same every time.
    candidates = possible[np.argsort(-recall[possible], kind="stable")][: rules.n_candidates]
    weights, cosine, chosen = _build(row, now[candidates], rules.max_parents)
    if not len(chosen):
        return {"cosine": 0.0, "cosine_p": 1.0, "recall": 0.0, "reason": "those that fire with it point elsewhere"}
    built_null = np.array([_build(other, now[candidates], rules.max_parents)[1] for other in null])
    cosine_p = (1 + int((built_null >= cosine - 1e-12).sum())) / (1 + len(null))
    parents = candidates[chosen]
    fires = np.diff(here[:, parents].indptr) > 0
    union = float(fires.mean())
    reasons = [
        (union >= rules.min_recall, f"they fire on {100 * union:.0f} % of its tokens only"),
        (cosine >= rules.min_cosine, f"their sum has a cosine of only {cosine:.2f} with it"),
        (cosine_p <= rules.alpha, "their sum fits other features as well"),
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


def _build(row: FloatArray, parts: FloatArray, max_parents: int) -> tuple[FloatArray, float, IntArray]:
    """The best sum of at most `max_parents` parts: weights, its cosine with the unit `row`, and which parts."""
    from scipy.optimize import nnls

    weights = nnls(parts.T, row)[0]
    chosen = np.argsort(-weights, kind="stable")[:max_parents]
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


def _check(
    wanted: IntArray, control: FiringLog, treatment: FiringLog, W_dec_control: Tensor, W_dec_treatment: Tensor
) -> None:
    if control.n_tokens != treatment.n_tokens:
        raise ShapeMismatch(
            f"the logs hold {control.n_tokens} and {treatment.n_tokens} tokens; they must be of the same text.",
            at="treatment",
        )
    for name, log, W_dec in (("control", control, W_dec_control), ("treatment", treatment, W_dec_treatment)):
        if W_dec.ndim != 2 or len(W_dec) != log.d_sae:
            raise ShapeMismatch(
                f"W_dec_{name} must be [{log.d_sae}, d_in]. Got {list(W_dec.shape)} instead.", at=f"W_dec_{name}"
            )
    if W_dec_control.shape[1] != W_dec_treatment.shape[1]:
        raise ShapeMismatch(
            f"the decoders are {W_dec_control.shape[1]} and {W_dec_treatment.shape[1]} wide.", at="W_dec_treatment"
        )
    if wanted.ndim != 1 or (len(wanted) and not (wanted.min() >= 0 and wanted.max() < control.d_sae)):
        raise ShapeMismatch(f"features must be numbers from 0 to {control.d_sae - 1}.", at="features")
