"""Fates of features (kept, moved, gone, new), judged against what another training seed alone does."""

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
_MARGIN = 0.02  # drop of similarity that does not count: SAEs differ a little as a whole


@dataclass(frozen=True, eq=False)
class Fates:
    """The fate of every feature.

    Attributes:
        control: One row a control feature: `feature`, `match` (nearest treatment feature), `similarity`,
            `placebo_similarity` (mean of the placebos' best), `drop`, `stratum`, `kept_at`, `chance_at` (the thresholds
            of its stratum), `p`, `q`, `fate`, `reason`. Fates: "gone" (a drop with q at most alpha, to the level
            of unrelated features), "moved" (such a drop, but a counterpart is left), "kept" (no such drop, and matched
            as well as between seeds), "unclear" (matched badly, as are features of another seed), "" where undefined.
        treatment: One row a treatment feature, the same without placebo_similarity and drop: "new" (it
            matches the control worse than the placebo's features do, q at most alpha, and has no counterpart), "moved",
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
    """Similarities [n_saes, n] of features, their thresholds [n], and which [n] have all of these."""

    similarity: FloatArray
    kept_at: FloatArray
    chance_at: FloatArray
    defined: BoolArray

    def reached(self, fate: str) -> BoolArray:
        """Bool [n_saes, n_defined]: features of this fate by their similarity alone."""
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
    """Which features were kept, moved, lost and added, relative to other seeds of the same model.

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
    control, control_levels = _judge_control(treatment, placebos, control_features, alpha)
    new_features = [treatment_features, *placebo_features]
    treatment_table, treatment_levels = _judge_treatment(treatment, placebos, new_features, alpha)
    rows = []
    for fate in ("kept", "moved", "gone"):
        reached = control_levels.reached(fate)
        excess = excess_paired(reached[0], reached[1:], resampling, f"control {fate}")
        called, n_placebo = int((control["fate"] == fate).sum()), reached[1:].sum(axis=1).mean()
        rows.append(_count_row("control", fate, called, reached[0].sum(), n_placebo, excess, reached.shape[1]))
    for fate in ("kept", "moved", "new"):
        first, *rest = [level.reached(fate)[0] for level in treatment_levels]  # the treatment, then the placebos
        excess = excess_unpaired(first, rest, resampling, f"treatment {fate}")
        called = int((treatment_table["fate"] == fate).sum())
        n_placebo = len(first) * float(np.mean([reached.mean() if len(reached) else math.nan for reached in rest]))
        rows.append(_count_row("treatment", fate, called, first.sum(), n_placebo, excess, len(first)))
    drift = float(np.nanmedian(control["drop"].to_numpy())) if control_levels.defined.any() else math.nan
    return Fates(control, treatment_table, pd.DataFrame(rows), drift)


def _judge_control(
    treatment: Matching, placebos: Sequence[Matching], features: pd.DataFrame, alpha: float
) -> tuple[pd.DataFrame, _Levels]:
    """The table of the control's features, and their similarities in every other SAE."""
    matchings = [treatment, *placebos]
    traits, reasons = _read_traits(features)
    reasons = _first_reasons([reasons, *(_missing_reasons(matching.forward) for matching in matchings)])
    excluded = np.array([bool(reason) for reason in reasons])
    similarity = np.array([matching.forward.best for matching in matchings])
    similarity[:, excluded], traits[excluded] = np.nan, np.nan
    groups = strata(traits, MIN_STRATUM)
    pooled = np.tile(groups, len(placebos))
    kept_at = quantile_per_stratum(similarity[1:].ravel(), pooled, _KEPT_QUANTILE, groups)
    runner_up = np.concatenate([matching.forward.runner_up for matching in placebos])
    chance_at = quantile_per_stratum(runner_up, pooled, _CHANCE_QUANTILE, groups)
    p, drop = exchangeable_p(similarity, groups, margin=_MARGIN)
    levels = _Levels(similarity, np.fmax(kept_at, chance_at), chance_at, ~np.isnan(p) & ~np.isnan(chance_at))
    columns = {"placebo_similarity": similarity[1:].mean(axis=0), "drop": drop}
    return _fate_table(treatment.forward, levels, columns, groups, p, reasons, "gone", alpha), levels


def _judge_treatment(
    treatment: Matching, placebos: Sequence[Matching], features: Sequence[pd.DataFrame], alpha: float
) -> tuple[pd.DataFrame, list[_Levels]]:
    """The table of the treatment's features, and similarities to the control for treatment and placebos."""
    backward = [matching.backward for matching in (treatment, *placebos)]
    trait_values, trait_reasons = zip(*(_read_traits(frame) for frame in features), strict=True)
    reasons = [
        _first_reasons([of_traits, _missing_reasons(neighbours)])
        for of_traits, neighbours in zip(trait_reasons, backward, strict=True)
    ]
    excluded = np.array([bool(reason) for of_sae in reasons for reason in of_sae], dtype=bool)
    traits = np.concatenate(trait_values)
    similarity = np.concatenate([neighbours.best for neighbours in backward])
    similarity[excluded], traits[excluded] = np.nan, np.nan
    runner_up = np.concatenate([neighbours.runner_up for neighbours in backward])
    groups = strata(traits, len(backward) * MIN_STRATUM)
    n = treatment.n_b
    null, null_groups = similarity[n:], groups[n:]
    kept_at = quantile_per_stratum(null, null_groups, _KEPT_QUANTILE, groups)
    chance_at = quantile_per_stratum(runner_up[n:], null_groups, _CHANCE_QUANTILE, groups)
    defined = ~np.isnan(similarity) & ~np.isnan(kept_at) & ~np.isnan(chance_at)
    p = conformal_p(similarity[:n], groups[:n], null, null_groups, margin=_MARGIN)
    ends = np.cumsum([len(neighbours.indices) for neighbours in backward])[:-1]
    parts = [np.split(values, ends) for values in (similarity, np.fmax(kept_at, chance_at), chance_at, defined)]
    levels = [_Levels(values_of_sae[None], *thresholds) for values_of_sae, *thresholds in zip(*parts, strict=True)]
    return _fate_table(treatment.backward, levels[0], {}, groups[:n], p, reasons[0], "new", alpha), levels


def _fate_table(
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
    similarity = levels.similarity[0]
    p = np.where(levels.defined, p, np.nan)
    q = benjamini_hochberg(p)
    significant = levels.defined & (q <= alpha)
    fate = np.full(len(similarity), "unclear", dtype=object)
    fate[similarity >= levels.kept_at] = "kept"
    fate[significant] = "moved"
    fate[significant & (similarity < levels.chance_at)] = absent
    fate[~levels.defined] = ""
    no_chance_level = "the placebo has no second-best matches among features like it"
    reason = [text or ("" if known else no_chance_level) for text, known in zip(reasons, levels.defined, strict=True)]
    return pd.DataFrame(
        {
            "feature": np.arange(len(similarity)),
            "match": neighbours.match,
            "similarity": similarity,
            **columns,
            "stratum": groups,
            "kept_at": levels.kept_at,
            "chance_at": levels.chance_at,
            "p": p,
            "q": q,
            "fate": pd.Series(fate, dtype="str"),
            "reason": pd.Series(reason, dtype="str"),
        }
    )


def _without_placebo(treatment: Matching) -> Fates:
    def table(neighbours: Neighbours, *more: str) -> pd.DataFrame:
        nan = np.full(len(neighbours.indices), np.nan)
        levels = _Levels(neighbours.best[None], nan, nan, np.zeros(len(nan), dtype=bool))
        reasons = [reason or NO_PLACEBO for reason in _missing_reasons(neighbours)]
        groups = np.full(len(nan), NO_STRATUM)
        return _fate_table(neighbours, levels, dict.fromkeys(more, nan), groups, nan, reasons, "", alpha=0.0)

    fates_of = {"control": ("kept", "moved", "gone"), "treatment": ("kept", "moved", "new")}
    sizes = {"control": treatment.n_a, "treatment": treatment.n_b}
    rows = [
        _count_row(side, fate, math.nan, math.nan, math.nan, undefined(NO_PLACEBO), sizes[side])
        for side, names in fates_of.items()
        for fate in names
    ]
    control = table(treatment.forward, "placebo_similarity", "drop")
    return Fates(control, table(treatment.backward), pd.DataFrame(rows), math.nan)


def _count_row(
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


def _read_traits(features: pd.DataFrame) -> tuple[FloatArray, list[str]]:
    """Traits [n, n_traits], and why a feature cannot be compared with others like it."""
    missing = [name for name in TRAITS if name not in features.columns]
    if missing:
        raise ShapeMismatch(f"the feature table has no column {', '.join(missing)}.", at="traits")
    values = features[list(TRAITS)].to_numpy(dtype=np.float64, na_value=np.nan).copy()
    silent, unknown = features["density"].to_numpy() == 0, np.isnan(values).any(axis=1)
    reasons = [
        "it never fires on this text" if is_silent else "a trait is unknown" if is_unknown else ""
        for is_silent, is_unknown in zip(silent.tolist(), unknown.tolist(), strict=True)
    ]
    return values, reasons


def _missing_reasons(neighbours: Neighbours) -> list[str]:
    missing = np.isnan(neighbours.best)
    return [reason if is_missing else "" for reason, is_missing in zip(neighbours.reason, missing, strict=True)]


def _first_reasons(reasons: Sequence[Sequence[str]]) -> list[str]:
    """For each feature the first reason that is not empty."""
    return [next(filter(None, feature_reasons), "") for feature_reasons in zip(*reasons, strict=True)]
