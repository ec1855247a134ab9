"""Kept, moved, gone, new: what became of the features, judged by what a change of seed alone does to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from saeffect.diffing.matched_null import (
    MIN_STRATUM,
    NO_STRATUM,
    TRAITS,
    conformal_p,
    excess_paired,
    excess_unpaired,
    exchangeable_p,
    quantile_per_stratum,
    strata,
)
from saeffect.diffing.matching import Matching, Neighbours
from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import BoolArray, FloatArray, IntArray, Resampling
from saeffect.stats.estimate import Estimate, undefined
from saeffect.stats.multiplicity import benjamini_hochberg

__all__ = ["Fates", "fates"]

NO_PLACEBO = "there is no placebo arm, so nobody knows how well two seeds of the same model match"

_KEPT_QUANTILE = 0.05  # a feature is kept if this share of the placebo's features of its stratum match worse
# A best match below this quantile of the placebo's second-best matches (unrelated features) is no counterpart.
_CHANCE_QUANTILE = 0.95
_MARGIN = 0.02  # of similarity, a drop that counts for nothing: SAEs differ a little as a whole


@dataclass(frozen=True, eq=False)
class Fates:
    """What became of every feature.

    Attributes:
        control: One row a control feature: `feature`, `match` (nearest treatment feature), `similarity`,
            `placebo_similarity` (mean of the placebos' best), `drop`, `stratum`, `kept_at`, `chance_at` (the thresholds
            of its stratum), `p`, `q`, `fate`, `reason`. Fates: "gone" (a drop with q at most alpha, to where unrelated
            features are as near), "moved" (such a drop, but a counterpart is left), "kept" (no such drop, and matched
            as well as between seeds), "unclear" (matched badly, but so are features of another seed), "" where
            undefined.
        treatment: One row a treatment feature, the same without placebo_similarity and drop: "new" (fewer than expected
            of the placebo's features match the control so badly, q at most alpha, and nothing is near), "moved",
            "kept", "unclear".
        counts: One row per side and fate: `called` features by the tables above; `n_treatment` and `n_placebo` by
            similarity alone, the same rule for both SAEs; their difference `excess` with its interval `low`, `high`;
            `n_features`; `reason`. An excess can show even where seeds match too poorly to call single features gone.
        drift: Median drop over control features. Far above the margin, the treatment's SAE matches worse as a whole.
    """

    control: pd.DataFrame
    treatment: pd.DataFrame
    counts: pd.DataFrame
    drift: float


@dataclass(frozen=True, eq=False)
class _Levels:
    """Similarities [n_saes, n] of some features, their thresholds [n], and which [n] have all of these."""

    similarity: FloatArray
    kept_at: FloatArray
    chance_at: FloatArray
    defined: BoolArray

    def reached(self, fate: str) -> BoolArray:
        """Bool [n_saes, n_defined]: features on this level by their similarity alone."""
        similarity = self.similarity[:, self.defined]
        kept_at, chance_at = self.kept_at[self.defined], self.chance_at[self.defined]
        if fate == "kept":
            return np.asarray(similarity >= kept_at)
        if fate == "moved":
            return np.asarray((similarity >= chance_at) & (similarity < kept_at))
        return np.asarray(similarity < chance_at)


def fates(
    treatment: Matching,
    placebos: Sequence[Matching],
    *,
    control_features: pd.DataFrame,
    treatment_features: pd.DataFrame,
    placebo_features: Sequence[pd.DataFrame],
    alpha: float = 0.05,
    resampling: Resampling | None = None,
) -> Fates:
    """Say which features were kept, moved, lost and added, relative to other seeds of the same model.

    A drop is judged by feature: without an effect, the treatment's SAE is one more seed, exchangeable with the placebos
    (`exchangeable_p`). If it shares the control's seed, the test errs towards "kept". A new feature is ranked among
    similar features of the placebo (`conformal_p`).

    `treatment` matches the control (`a`) with the treatment (`b`), with at least two neighbours; `placebos` (perhaps
    none) by the same measure. Tables have one row a feature with `TRAITS` (density 0: never fires), else
    `ShapeMismatch`.
    """
    if not placebos:
        return _without_placebo(treatment)
    resampling = resampling or Resampling()
    control, lost = _lost(treatment, placebos, control_features, alpha)
    gained, levels = _gained(treatment, placebos, [treatment_features, *placebo_features], alpha)
    rows = []
    for fate in ("kept", "moved", "gone"):
        holds = lost.reached(fate)
        excess = excess_paired(holds[0], holds[1:], resampling, f"control {fate}")
        called, n_placebo = int((control["fate"] == fate).sum()), holds[1:].sum(axis=1).mean()
        rows.append(_count("control", fate, called, holds[0].sum(), n_placebo, excess, holds.shape[1]))
    for fate in ("kept", "moved", "new"):
        own, *others = [level.reached(fate)[0] for level in levels]
        excess = excess_unpaired(own, others, resampling, f"treatment {fate}")
        called = int((gained["fate"] == fate).sum())
        n_placebo = len(own) * float(np.mean([holds.mean() if len(holds) else math.nan for holds in others]))
        rows.append(_count("treatment", fate, called, own.sum(), n_placebo, excess, len(own)))
    drift = float(np.nanmedian(control["drop"].to_numpy())) if lost.defined.any() else math.nan
    return Fates(control, gained, pd.DataFrame(rows), drift)


def _lost(
    treatment: Matching, placebos: Sequence[Matching], features: pd.DataFrame, alpha: float
) -> tuple[pd.DataFrame, _Levels]:
    """The control's features: each has a similarity in every other SAE."""
    matchings = [treatment, *placebos]
    traits, reasons = _traits(features)
    reasons = _first([reasons, *(_reasons(matching.forward) for matching in matchings)])
    out = np.array([bool(why) for why in reasons])
    similarity = np.array([matching.forward.best for matching in matchings])
    similarity[:, out], traits[out] = np.nan, np.nan
    groups = strata(traits, MIN_STRATUM)
    pooled = np.tile(groups, len(placebos))
    kept_at = quantile_per_stratum(similarity[1:].ravel(), pooled, _KEPT_QUANTILE, groups)
    second = np.concatenate([matching.forward.runner_up for matching in placebos])
    chance_at = quantile_per_stratum(second, pooled, _CHANCE_QUANTILE, groups)
    p, drop = exchangeable_p(similarity, groups, margin=_MARGIN)
    levels = _Levels(similarity, np.fmax(kept_at, chance_at), chance_at, ~np.isnan(p) & ~np.isnan(chance_at))
    columns = {"placebo_similarity": similarity[1:].mean(axis=0), "drop": drop}
    return _judged(treatment.forward, levels, columns, groups, p, reasons, "gone", alpha), levels


def _gained(
    treatment: Matching, placebos: Sequence[Matching], features: Sequence[pd.DataFrame], alpha: float
) -> tuple[pd.DataFrame, list[_Levels]]:
    """The treatment's features, and as levels those of the treatment and each placebo, all against the control."""
    backward = [matching.backward for matching in (treatment, *placebos)]
    read = [_traits(frame) for frame in features]
    reasons = [_first([why, _reasons(found)]) for (_, why), found in zip(read, backward, strict=True)]
    out = np.concatenate([np.array([bool(text) for text in why], dtype=bool) for why in reasons])
    traits = np.concatenate([values for values, _ in read])
    similarity = np.concatenate([found.best for found in backward])
    similarity[out], traits[out] = np.nan, np.nan
    second = np.concatenate([found.runner_up for found in backward])
    groups = strata(traits, len(backward) * MIN_STRATUM)
    n = treatment.n_b
    null, null_groups = similarity[n:], groups[n:]
    kept_at = quantile_per_stratum(null, null_groups, _KEPT_QUANTILE, groups)
    chance_at = quantile_per_stratum(second[n:], null_groups, _CHANCE_QUANTILE, groups)
    defined = ~np.isnan(similarity) & ~np.isnan(kept_at) & ~np.isnan(chance_at)
    p = conformal_p(similarity[:n], groups[:n], null, null_groups, margin=_MARGIN)
    ends = np.cumsum([len(found.indices) for found in backward])[:-1]
    parts = [np.split(values, ends) for values in (similarity, np.fmax(kept_at, chance_at), chance_at, defined)]
    levels = [_Levels(own[None], *others) for own, *others in zip(*parts, strict=True)]
    return _judged(treatment.backward, levels[0], {}, groups[:n], p, reasons[0], "new", alpha), levels


def _judged(
    neighbours: Neighbours,
    levels: _Levels,
    columns: dict[str, FloatArray],
    groups: IntArray,
    p: FloatArray,
    reasons: list[str],
    absent: str,
    alpha: float,
) -> pd.DataFrame:
    """The table of one side; `columns` go behind the similarity."""
    own = levels.similarity[0]
    p = np.where(levels.defined, p, np.nan)
    q = benjamini_hochberg(p)
    found = levels.defined & (q <= alpha)
    fate = np.full(len(own), "unclear", dtype=object)
    fate[own >= levels.kept_at] = "kept"
    fate[found] = "moved"
    fate[found & (own < levels.chance_at)] = absent
    fate[~levels.defined] = ""
    unknown = "the placebo has no second-best matches among features like it"
    why = [text or ("" if known else unknown) for text, known in zip(reasons, levels.defined, strict=True)]
    return pd.DataFrame(
        {
            "feature": np.arange(len(own)),
            "match": neighbours.match,
            "similarity": own,
            **columns,
            "stratum": groups,
            "kept_at": levels.kept_at,
            "chance_at": levels.chance_at,
            "p": p,
            "q": q,
            "fate": pd.Series(fate, dtype="str"),
            "reason": pd.Series(why, dtype="str"),
        }
    )


def _without_placebo(treatment: Matching) -> Fates:
    def table(neighbours: Neighbours, *more: str) -> pd.DataFrame:
        nan = np.full(len(neighbours.indices), np.nan)
        levels = _Levels(neighbours.best[None], nan, nan, np.zeros(len(nan), dtype=bool))
        reasons = [why or NO_PLACEBO for why in _reasons(neighbours)]
        groups = np.full(len(nan), NO_STRATUM)
        return _judged(neighbours, levels, dict.fromkeys(more, nan), groups, nan, reasons, "", alpha=0.0)

    fates_of = {"control": ("kept", "moved", "gone"), "treatment": ("kept", "moved", "new")}
    sizes = {"control": treatment.n_a, "treatment": treatment.n_b}
    rows = [
        _count(side, fate, math.nan, math.nan, math.nan, undefined(NO_PLACEBO), sizes[side])
        for side, names in fates_of.items()
        for fate in names
    ]
    control = table(treatment.forward, "placebo_similarity", "drop")
    return Fates(control, table(treatment.backward), pd.DataFrame(rows), math.nan)


def _count(
    side: str, fate: str, called: float, n_treatment: float, n_placebo: float, excess: Estimate, n_features: int
) -> dict[str, object]:
    return {
        "side": side,
        "fate": fate,
        "called": called,
        "n_treatment": float(n_treatment),
        "n_placebo": float(n_placebo),
        "excess": excess.value,
        "low": excess.low,
        "high": excess.high,
        "n_features": n_features,
        "reason": excess.reason,
    }


def _traits(features: pd.DataFrame) -> tuple[FloatArray, list[str]]:
    """Traits [n, n_traits], and why a feature cannot be compared with others like it."""
    missing = [name for name in TRAITS if name not in features.columns]
    if missing:
        raise ShapeMismatch(f"the feature table has no column {', '.join(missing)}.", at="traits")
    values = features[list(TRAITS)].to_numpy(dtype=np.float64, na_value=np.nan).copy()
    silent, unknown = features["density"].to_numpy() == 0, np.isnan(values).any(axis=1)
    reasons = [
        "it never fires on this text" if dead else "a trait is unknown" if nan else ""
        for dead, nan in zip(silent.tolist(), unknown.tolist(), strict=True)
    ]
    return values, reasons


def _reasons(neighbours: Neighbours) -> list[str]:
    return [why if nan else "" for why, nan in zip(neighbours.reason, np.isnan(neighbours.best), strict=True)]


def _first(reasons: Sequence[Sequence[str]]) -> list[str]:
    """For each feature the first reason that is not empty."""
    return [next((why for why in of_feature if why), "") for of_feature in zip(*reasons, strict=True)]
