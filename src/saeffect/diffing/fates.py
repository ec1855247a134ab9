"""Kept, moved, gone, new: what became of the features, beside what becomes of them when only the seed changes.

Two SAEs of one model share some features and not others. So nothing here is judged by a fixed similarity: what
counts as kept, as a counterpart at all, and as a surprising drop is all read off the placebos, SAEs of the
control's model trained from other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.diffing.fate_counts import excess_paired, excess_unpaired
from saeffect.diffing.matched_null import NO_STRATUM, conformal_p, exchangeable_p, quantile_per_stratum, strata
from saeffect.diffing.matching import Matching, Neighbours
from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.stats.arguments import FloatArray, Resampling
from saeffect.stats.multiplicity import benjamini_hochberg

__all__ = ["FateRules", "Fates", "fates"]

NO_PLACEBO = "there is no placebo arm, so nobody knows how well two seeds of the same model match"
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FateRules:
    """What counts as what.

    Attributes:
        alpha: Highest q at which a drop (or a lack of any counterpart) is a finding.
        kept_quantile: A feature is kept if this share of the placebo's features of its stratum match worse.
        chance_quantile: A best match below this quantile of the placebo's second-best matches is no
            counterpart: unrelated features are as near.
        margin: A drop that counts for nothing, in units of similarity: SAEs differ a little as a whole.
        min_stratum: Fewest features among which ranks and quantiles are taken.
        traits: Columns of the feature tables by which features are matched to null features.
    """

    alpha: float = 0.05
    kept_quantile: float = 0.05
    chance_quantile: float = 0.95
    margin: float = 0.02
    min_stratum: int = 200
    traits: tuple[str, ...] = ("density", "decoder_norm")

    def __post_init__(self) -> None:
        for name in ("alpha", "kept_quantile", "chance_quantile"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie between 0 and 1. Got {getattr(self, name)} instead.", at=name)
        if not (self.margin >= 0 and math.isfinite(self.margin)):
            raise ConfigError(f"margin must be at least 0. Got {self.margin} instead.", at="margin")
        if self.min_stratum < 1 or not self.traits:
            raise ConfigError("min_stratum must be at least 1, and there must be a trait.", at="min_stratum, traits")


@dataclass(frozen=True, eq=False)
class Fates:
    """What became of every feature.

    Attributes:
        control: One row a control feature: `feature`, `match` (nearest treatment feature), `similarity`,
            `placebo_similarity` (mean of the placebos' best), `drop`, `stratum`, `kept_at`, `chance_at` (the
            thresholds of its stratum), `p`, `q`, `fate`, `reason`. The fate is "gone" (a drop with q at most
            alpha, to where unrelated features are as near), "moved" (such a drop, but a counterpart is left),
            "kept" (no such drop, and matched as well as between seeds), "unclear" (matched badly, but so are
            features of another seed), or "" where undefined.
        treatment: One row a treatment feature, the same without placebo_similarity and drop: "new" (fewer
            than expected of the placebo's features match the control so badly, q at most alpha, and nothing is
            near), "moved", "kept", "unclear".
        counts: One row per side and fate: `called` features by the tables above; `n_treatment` and
            `n_placebo` by similarity alone, the same rule for both SAEs; their difference `excess` with its
            interval `low`, `high`; `n_features`; `reason`. Where seeds match poorly no single feature can be
            called gone, but an excess can still show.
        drift: Median drop over control features. Far above the margin it says that the treatment's SAE
            matches worse as a whole, which with a single placebo cannot be told from a poor seed.
    """

    control: pd.DataFrame
    treatment: pd.DataFrame
    counts: pd.DataFrame
    drift: float


def fates(
    treatment: Matching,
    placebos: Sequence[Matching],
    *,
    control_features: pd.DataFrame,
    treatment_features: pd.DataFrame,
    placebo_features: Sequence[pd.DataFrame],
    rules: FateRules | None = None,
    resampling: Resampling | None = None,
) -> Fates:
    """Say which features were kept, moved, lost and added, relative to other seeds of the same model.

    A drop is judged feature by feature: if fine-tuning did nothing, the treatment's SAE is one more seed, and
    its similarity to a control feature is one of a kind with the placebos' (`exchangeable_p`). A new feature
    has no such partner, so it is ranked among the placebo's features like it (`conformal_p`). If the
    treatment's SAE shares the control's seed the former test errs on the side of "kept".

    Args:
        treatment: Control (`a`) against treatment (`b`), with at least two neighbours.
        placebos: Control against each placebo, by the same measure. May be empty.
        control_features: One row a feature with the columns `rules.traits`; density 0 means never fires.
        treatment_features: The same of the treatment.
        placebo_features: The same of each placebo.
        rules: The defaults if None.
        resampling: Seed and number of resamples of the intervals.

    Raises:
        ShapeMismatch: A table or matching is of another SAE, or measures differ.

    Source:
        This package's own; the statistics are in `matched_null`.
    """
    rules, resampling = rules or FateRules(), resampling or Resampling()
    _check(treatment, placebos, [control_features, treatment_features, *placebo_features])
    if not placebos:
        return _without_placebo(treatment)
    lost = _lost(treatment, placebos, control_features, rules)
    gained, levels = _gained(treatment, placebos, [treatment_features, *placebo_features], rules)
    rows = []
    n_defined = int(lost.defined.sum())
    for name in ("kept", "moved", "gone"):
        holds = np.array([_at(name, of_sae, lost) for of_sae in lost.similarity])[:, lost.defined]
        found = excess_paired(holds[0], holds[1:], resampling, f"control {name}")
        called = int((lost.table["fate"] == name).sum())
        rows.append(_row("control", name, called, holds[0].sum(), holds[1:].sum(axis=1).mean(), found, n_defined))
    for name in ("kept", "moved", "new"):
        apart = [_at(name, one.similarity[0], one)[one.defined] for one in levels]
        found = excess_unpaired(apart[0], apart[1:], resampling, f"treatment {name}")
        called = int((gained["fate"] == name).sum())
        shares = [one.mean() if len(one) else math.nan for one in apart[1:]]
        n_placebo = len(apart[0]) * float(np.mean(shares))
        rows.append(_row("treatment", name, called, apart[0].sum(), n_placebo, found, len(apart[0])))
    drop = lost.table["drop"].to_numpy()
    drift = float(np.nanmedian(drop)) if lost.defined.any() else math.nan
    return Fates(lost.table, gained, pd.DataFrame(rows), drift)


@dataclass(frozen=True, eq=False)
class _Side:
    """Similarities [n_saes, n], thresholds [n] and which features [n] have all of them."""

    similarity: FloatArray
    kept_at: FloatArray
    chance_at: FloatArray
    defined: BoolArray
    table: pd.DataFrame


def _lost(treatment: Matching, placebos: Sequence[Matching], features: pd.DataFrame, rules: FateRules) -> _Side:
    """The control's features: each has a similarity in every other SAE."""
    traits, reasons = _traits(features, rules)
    matchings = [treatment, *placebos]
    reasons = _first([reasons, *(_reasons(one.forward, one.measure) for one in matchings)])
    out = np.array([bool(why) for why in reasons])
    similarity = np.array([_best(one.forward, one.measure) for one in matchings])
    similarity[:, out] = np.nan
    traits[out] = np.nan
    groups = strata(traits, rules.min_stratum)
    times = len(placebos)
    pooled = np.tile(groups, times)
    kept_at = quantile_per_stratum(similarity[1:].ravel(), pooled, rules.kept_quantile, groups)
    others = np.concatenate([_second(one.forward, one.measure) for one in placebos])
    chance_at = quantile_per_stratum(others, pooled, rules.chance_quantile, groups)
    p, drop = exchangeable_p(similarity, groups, margin=rules.margin)
    defined = ~np.isnan(p) & ~np.isnan(chance_at)
    table = pd.DataFrame(
        {
            "feature": np.arange(len(groups)),
            "match": treatment.forward.match,
            "similarity": similarity[0],
            "placebo_similarity": similarity[1:].mean(axis=0),
            "drop": drop,
        }
    )
    side = _Side(similarity, np.fmax(kept_at, chance_at), chance_at, defined, table)
    return _judged(side, groups, p, reasons, "gone", rules)


def _gained(
    treatment: Matching, placebos: Sequence[Matching], features: Sequence[pd.DataFrame], rules: FateRules
) -> tuple[pd.DataFrame, list[_Side]]:
    """The treatment's features, and as levels those of the treatment and each placebo: all against the control."""
    matchings = [treatment, *placebos]
    read = [_traits(frame, rules) for frame in features]
    reasons = [
        _first([why, _reasons(one.backward, one.measure)]) for (_, why), one in zip(read, matchings, strict=True)
    ]
    out = np.concatenate([np.array([bool(text) for text in why], dtype=bool) for why in reasons])
    traits = np.concatenate([values for values, _ in read])
    traits[out] = np.nan
    similarity = np.concatenate([_best(one.backward, one.measure) for one in matchings])
    similarity[out] = np.nan
    second = np.concatenate([_second(one.backward, one.measure) for one in matchings])
    groups = strata(traits, len(matchings) * rules.min_stratum)
    n = treatment.n_b
    null, null_groups = similarity[n:], groups[n:]
    kept_at = quantile_per_stratum(null, null_groups, rules.kept_quantile, groups)
    chance_at = quantile_per_stratum(second[n:], null_groups, rules.chance_quantile, groups)
    defined = ~np.isnan(similarity) & ~np.isnan(kept_at) & ~np.isnan(chance_at)
    p = conformal_p(similarity[:n], groups[:n], null, null_groups, margin=rules.margin)
    table = pd.DataFrame({"feature": np.arange(n), "match": treatment.backward.match, "similarity": similarity[:n]})
    sides, start = [], 0
    for one in matchings:
        part = slice(start, start + one.n_b)
        ends = np.fmax(kept_at, chance_at)[part]
        sides.append(_Side(similarity[None, part], ends, chance_at[part], defined[part], table))
        start += one.n_b
    return _judged(sides[0], groups[:n], p, reasons[0], "new", rules).table, sides


def _judged(side: _Side, groups: IntArray, p: FloatArray, reasons: list[str], absent: str, rules: FateRules) -> _Side:
    """The side with the columns from `stratum` to `reason` on its table."""
    p = np.where(side.defined, p, np.nan)
    q = benjamini_hochberg(p)
    own = side.similarity[0]
    found = side.defined & (q <= rules.alpha)
    fate = np.full(len(own), "unclear", dtype=object)
    fate[own >= side.kept_at] = "kept"
    fate[found] = "moved"
    fate[found & (own < side.chance_at)] = absent
    fate[~side.defined] = ""
    undefined = "the placebo has no second-best matches among features like it"
    why = [text or ("" if known else undefined) for text, known in zip(reasons, side.defined, strict=True)]
    columns = {"stratum": groups, "kept_at": side.kept_at, "chance_at": side.chance_at, "p": p, "q": q}
    table = side.table.assign(**columns, fate=pd.Series(fate, dtype="str"), reason=pd.Series(why, dtype="str"))
    return _Side(side.similarity, side.kept_at, side.chance_at, side.defined, table)


def _at(name: str, similarity: FloatArray, side: _Side) -> BoolArray:
    """Which features are on this level by their similarity alone."""
    with np.errstate(invalid="ignore"):
        if name == "kept":
            return np.asarray(similarity >= side.kept_at)
        if name == "moved":
            return np.asarray((similarity >= side.chance_at) & (similarity < side.kept_at))
        return np.asarray(similarity < side.chance_at)


def _traits(features: pd.DataFrame, rules: FateRules) -> tuple[FloatArray, list[str]]:
    missing = [name for name in rules.traits if name not in features.columns]
    if missing:
        raise ShapeMismatch(f"the feature table has no column {', '.join(missing)}.", at="traits")
    values = features[list(rules.traits)].to_numpy(dtype=np.float64, na_value=np.nan).copy()
    unknown = np.isnan(values).any(axis=1)
    silent = features["density"].to_numpy() == 0 if "density" in features.columns else np.zeros(len(features), bool)
    reasons = [
        "it never fires on this text" if dead else "a trait is unknown" if nan else ""
        for dead, nan in zip(silent.tolist(), unknown.tolist(), strict=True)
    ]
    return values, reasons


def _comparable(neighbours: Neighbours, measure: str) -> BoolArray:
    # To correlate with nobody is to be at 0, not to be unknown.
    return np.asarray(neighbours.alone & (measure == "activation correlation"))


def _best(neighbours: Neighbours, measure: str) -> FloatArray:
    return np.where(_comparable(neighbours, measure), 0.0, neighbours.best)


def _second(neighbours: Neighbours, measure: str) -> FloatArray:
    if measure != "activation correlation" or neighbours.similarity.shape[1] < 2:
        return neighbours.runner_up
    known = ~np.isnan(_best(neighbours, measure))
    return np.where(known & np.isnan(neighbours.runner_up), 0.0, neighbours.runner_up)


def _reasons(neighbours: Neighbours, measure: str) -> list[str]:
    fine = _comparable(neighbours, measure)
    return ["" if ok else why for ok, why in zip(fine.tolist(), neighbours.reason, strict=True)]


def _first(reasons: Sequence[Sequence[str]]) -> list[str]:
    """For each feature the first reason that is not empty."""
    return [next((why for why in of_feature if why), "") for of_feature in zip(*reasons, strict=True)]


def _row(
    side: str, fate: str, called: float, n_treatment: float, n_placebo: float, found: object, n_features: int
) -> dict[str, object]:
    return {
        "side": side,
        "fate": fate,
        "called": called,
        "n_treatment": float(n_treatment),
        "n_placebo": float(n_placebo),
        "excess": getattr(found, "value", math.nan),
        "low": getattr(found, "low", math.nan),
        "high": getattr(found, "high", math.nan),
        "n_features": n_features,
        "reason": getattr(found, "reason", NO_PLACEBO),
    }


def _without_placebo(treatment: Matching) -> Fates:
    def table(neighbours: Neighbours, extra: tuple[str, ...]) -> pd.DataFrame:
        n = len(neighbours.indices)
        frame = pd.DataFrame(
            {
                "feature": np.arange(n),
                "match": neighbours.match,
                "similarity": _best(neighbours, treatment.measure),
                **{name: np.full(n, np.nan) for name in extra},
                "stratum": np.full(n, NO_STRATUM),
                **{name: np.full(n, np.nan) for name in ("kept_at", "chance_at", "p", "q")},
            }
        )
        reasons = _reasons(neighbours, treatment.measure)
        why = pd.Series([text or NO_PLACEBO for text in reasons], dtype="str")
        return frame.assign(fate=pd.Series([""] * n, dtype="str"), reason=why)

    rows = [
        _row(side, fate, math.nan, math.nan, math.nan, None, n)
        for side, names, n in (
            ("control", ("kept", "moved", "gone"), treatment.n_a),
            ("treatment", ("kept", "moved", "new"), treatment.n_b),
        )
        for fate in names
    ]
    control = table(treatment.forward, ("placebo_similarity", "drop"))
    return Fates(control, table(treatment.backward, ()), pd.DataFrame(rows), math.nan)


def _check(treatment: Matching, placebos: Sequence[Matching], features: Sequence[pd.DataFrame]) -> None:
    for one in placebos:
        if one.measure != treatment.measure or one.n_a != treatment.n_a:
            raise ShapeMismatch(
                f"a placebo matching is of {one.n_a} features by {one.measure}, the treatment's of "
                f"{treatment.n_a} by {treatment.measure}.",
                at="placebos",
                fix="match the control against every arm by one measure.",
            )
    sizes = [treatment.n_a, treatment.n_b, *(one.n_b for one in placebos)]
    if [len(frame) for frame in features] != sizes:
        raise ShapeMismatch(
            f"feature tables have {[len(frame) for frame in features]} rows, the matchings {sizes} features.",
            at="features",
        )
