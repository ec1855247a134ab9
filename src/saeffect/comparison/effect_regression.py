"""Regression of the effect of steering on coherence, activity, decoder norm and arm (the paper's question)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.stats.regression import ols_robust

__all__ = ["EffectRegression", "effect_regression"]

_PROPERTIES = ("coherence", "log10_density", "decoder_norm")
# Decoder rows of unit length differ by rounding alone.
_FLAT = 1e-4


@dataclass(frozen=True, eq=False)
class EffectRegression:
    """The fit, and partial residuals to plot.

    Attributes:
        terms: One row a term (`intercept`, the properties, `arm <name>`, 1 for that arm's features): `term`, `estimate`
            (cosine similarity per unit of the term), `low`, `high`, `p`, `n` features, `errors` ("HC3" or "clustered by
            SAE"), `reason` (why a number is NaN, or which noise an interval leaves out), `n_left_out` features.
        partial_residuals: One row a feature and property: `feature`, `arm`, `term`, `x`, and `residual` (including the
            term's part), whose slope is the estimate.
    """

    terms: pd.DataFrame
    partial_residuals: pd.DataFrame


def effect_regression(arms: Mapping[str, ArmTables], roles: Roles) -> EffectRegression:
    """Regress the effect of each steered feature on its properties (activity is log10 of the density) and its arm.

    Features without an effect, a coherence or an activity are left out; so is a property that is the same in every
    feature. Errors are clustered by SAE where there are more SAEs than terms. Otherwise features are independent (HC3),
    and every arm but the control has a term. Source: `ols_robust`; partial residuals: Larsen & McCleary (1972).
    """
    data = _feature_rows(arms, roles)
    usable = data.dropna(subset=["effect", *_PROPERTIES]).reset_index(drop=True)
    # With a term for every arm the residuals of each arm sum to 0, which leaves no spread between arms.
    clustered = usable["arm"].nunique() > len(_PROPERTIES) + 2
    dummies = [f"arm {name}" for name in ([roles.treatment] if clustered else roles.ordered[1:])]
    columns = [*_PROPERTIES, *dummies]
    flat = [name for name in columns if _is_flat(usable[name].to_numpy(dtype=np.float64))]
    terms = [name for name in columns if name not in flat]
    X = usable[terms].astype(np.float64)
    fit = ols_robust(usable["effect"].to_numpy(), X, usable["arm"].tolist() if clustered else None)
    fit.insert(len(fit.columns) - 1, "errors", "clustered by SAE" if clustered else "HC3")
    partial = _partial_residuals(usable, X, fit)
    if clustered:
        treatment_term = fit["term"] == f"arm {roles.treatment}"
        fit.loc[treatment_term, ["low", "high", "p"]] = np.nan
        fit.loc[treatment_term, "reason"] = (
            "the treatment has one steered SAE, so nothing shows how much another would differ"
        )
    else:  # beside an interval the reason is a remark
        arm_terms = fit["term"].str.startswith("arm ") & fit["low"].notna()
        fit.loc[arm_terms, "reason"] = "one SAE an arm: the interval does not hold the noise of SAE training"
    left_out = len(data) - len(usable)
    if flat:
        fit = pd.concat([fit, _flat_rows(flat, usable, str(fit["errors"].iloc[0]))], ignore_index=True)
    order = {name: i for i, name in enumerate(["intercept", *columns])}
    fit = fit.sort_values("term", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    if not len(usable):
        reason = "nothing was steered" if not len(data) else "no steered feature has an effect and all properties"
        fit["reason"] = reason
    fit["n_left_out"] = left_out
    return EffectRegression(fit, partial)


def _feature_rows(arms: Mapping[str, ArmTables], roles: Roles) -> pd.DataFrame:
    """One row a steered feature: its effect, its properties, and a 0/1 column for every arm but the control."""
    columns = ["feature", "arm", "effect", *_PROPERTIES]
    frames = [pd.DataFrame(columns=columns)]
    for name in roles.ordered:
        arm = arms[name]
        if arm.effects is None or arm.effects.empty:
            continue
        present = [column for column in ("density", "decoder_norm") if column in arm.features]
        rows = arm.effects[["feature", "effect"]].merge(arm.coherence[["feature", "coherence"]], "left", "feature")
        rows = rows.merge(arm.features[["feature", *present]], "left", "feature").assign(arm=name)
        density = rows["density"].to_numpy(dtype=np.float64)
        rows["log10_density"] = np.log10(np.where(density > 0, density, np.nan))
        if "decoder_norm" not in rows:  # optional column: constant, so left out as flat
            rows["decoder_norm"] = 1.0
        frames.append(rows[columns])
    data = pd.concat(frames[1:] or frames, ignore_index=True)
    for name in roles.ordered[1:]:
        data[f"arm {name}"] = (data["arm"] == name).astype(np.float64)
    return data.astype(dict.fromkeys(("effect", *_PROPERTIES), np.float64))


def _is_flat(values: np.ndarray) -> bool:
    return not len(values) or bool(np.ptp(values) <= _FLAT * max(1e-300, float(np.abs(values).max())))


def _flat_rows(flat: list[str], usable: pd.DataFrame, errors: str) -> pd.DataFrame:
    reasons = [
        f"no usable feature of {name.removeprefix('arm ')}"
        if name.startswith("arm ") and not usable[name].any()
        else f"{name} is the same in every feature"
        for name in flat
    ]
    undefined = dict.fromkeys(("estimate", "low", "high", "p"), np.nan)
    return pd.DataFrame({"term": flat, **undefined, "n": len(usable), "errors": errors, "reason": reasons})


def _partial_residuals(usable: pd.DataFrame, X: pd.DataFrame, fit: pd.DataFrame) -> pd.DataFrame:
    estimates = fit.set_index("term")["estimate"]
    names = [name for name in X.columns if name in _PROPERTIES]
    if estimates.isna().any() or not names:
        kinds = {"feature": "float64", "arm": "str", "term": "str", "x": "float64", "residual": "float64"}
        return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})
    slopes = estimates[list(X.columns)].to_numpy()
    residual = usable["effect"].to_numpy() - estimates["intercept"] - X.to_numpy() @ slopes
    residuals = {name: residual + estimates[name] * X[name].to_numpy() for name in names}
    frames = [usable[["feature", "arm"]].assign(term=name, x=X[name], residual=residuals[name]) for name in names]
    return pd.concat(frames, ignore_index=True)
