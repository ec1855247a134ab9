"""Effects of steering beyond placebo, one row a feature, with intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.errors import ConfigError, EmptySelection, ShapeMismatch
from saeffect.stats.bootstrap import bootstrap_means
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.stats.permutation import sign_flip_many
from saeffect.stats.student import independent_values, mean_interval
from saeffect.steering.outcomes import OUTCOMES, Outcome, outcome_named
from saeffect.steering.placebos import PLACEBOS, SHUFFLED, STEERED, UNSTEERED

__all__ = ["Obstacles", "effects", "outcome_effects"]

Obstacles = Mapping[tuple[int, str], str]
"""Why a feature was not steered under a condition, by (feature, condition); see `saeffect.steering.obstacles`."""

_ORDER = (
    *("feature", "n_pairs", "n_independent", "unsteered_mean", "steered_mean", "placebo_mean"),
    *("effect", "effect_low", "effect_high", "bootstrap_low", "bootstrap_high"),
    *("p", "q", "passed", "paper_pass", "direct_effect", "direct_placebo", "kl", "reversed_share"),
    *("shuffled_effect", "shuffled_low", "shuffled_high", "shuffled_p", "outcome", "placebo", "reason"),
)
# Names in the summary: names beside the primary effect.
_SHUFFLED = {
    "effect": "shuffled_effect",
    "effect_low": "shuffled_low",
    "effect_high": "shuffled_high",
    "p": "shuffled_p",
}
_LONG = (
    *("feature", "outcome", "placebo", "n_pairs", "n_independent", "effect", "low", "high", "p", "q", "reversed_share"),
    *("unsteered_mean", "steered_mean", "placebo_mean", "alternative", "unit", "declared", "primary", "reason"),
)
_KEYS = ["feature", "prompt", "sample"]
_NUMBERS = (
    *("unsteered_mean", "steered_mean", "placebo_mean", "effect", "effect_low", "effect_high", "reversed_share"),
)


def effects(
    trials: pd.DataFrame,
    direct: pd.DataFrame | None = None,
    *,
    alpha: float = 0.05,
    seed: int = 0,
    dose: float | None = None,
    placebo: str = "random",
    outcome: str | Outcome = "similarity",
    obstacles: Obstacles | None = None,
) -> pd.DataFrame:
    """Effect of each feature on the primary outcome: the mean over pairs (prompts x samples) of (steered -
    unsteered) - (placebo - unsteered). The texts of a pair share prompt and sampling noise. Pairs with an undefined
    value are left out and counted in `reason`. With six prompts or more, the samples of a prompt are averaged first,
    since they are not independent.

    `direct` is as `direct_effects` gives (None: NaN columns); `alpha` the FDR level; `seed` for random sign patterns
    and resamples; `dose` the tested one, optional when the trials hold one; `outcome` a name in `OUTCOMES` or, for an
    ablation, `outcome_named("similarity").under("ablate")`, for effects below 0; `obstacles` as
    `saeffect.steering.obstacles` gives.

    One row a feature, by number: feature; n_pairs; n_independent (units of test and interval: prompts, or pairs with
    fewer than six prompts); unsteered_mean, steered_mean, placebo_mean; effect with its 95 % interval (Student's t)
    effect_low, effect_high; bootstrap_low, bootstrap_high (95 %, expanded percentiles, 2,000 resamples); p (sign-flip
    test: effect above 0, for an ablation below 0, two-sided for outcomes without a direction); q (Benjamini-Hochberg
    over these features); passed (q <= alpha); paper_pass (the paper's rule: the first steered text is more similar than
    the first unsteered one, after an ablation less); direct_effect, direct_placebo (nats, means over prompts); kl
    (nats, steered); reversed_share (of prompts whose mean effect opposes the tested direction, or else the overall
    effect); shuffled_effect, _low, _high, _p (how much more steering raised the similarity to the feature's own top
    tokens than to those of another, see `score_texts`); outcome; placebo; reason ("" when all is defined). NaN for
    fewer than two pairs.

    ConfigError: several doses and none given, or not that one; `alpha` is not between 0 and 1. EmptySelection: no
    steered trials, and no dose given. ShapeMismatch: a column is missing, or a trial is repeated. UnknownName: no such
    outcome.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must be between 0 and 1. Got {alpha}.", at="alpha")
    measure = outcome_named(outcome) if isinstance(outcome, str) else outcome
    similar = OUTCOMES["similarity"].under(measure.operator)
    dose = _tested_dose(trials, dose)
    table = _summary(_pairs(trials, direct, measure, dose, placebo), measure, seed, obstacles)
    table["passed"] = table["q"] <= alpha
    texts = _pairs(trials, direct, similar, dose, SHUFFLED)
    # Prompt 0, sample 0: the paper looks at one text of each kind.
    first = {feature: own.values[:2, 0] for feature, own in texts.features()}
    higher, lower = (0, 1) if similar.alternative == "less" else (1, 0)
    shuffled = _summary(texts, similar, seed).set_index("feature")
    beside = {new: shuffled[name] for name, new in _SHUFFLED.items()} | {
        "paper_pass": {feature: bool(pair[higher] > pair[lower]) for feature, pair in first.items()},
        "direct_effect": _direct_means(direct, dose, STEERED, "delta_logprob"),
        "direct_placebo": _direct_means(direct, dose, placebo, "delta_logprob"),
        "kl": _direct_means(direct, dose, STEERED, "kl"),
    }
    for name, values in beside.items():
        table[name] = table["feature"].map(values)
    table["paper_pass"] = table["paper_pass"].eq(True)
    return table.assign(outcome=measure.name, placebo=placebo)[list(_ORDER)]


def outcome_effects(
    trials: pd.DataFrame,
    direct: pd.DataFrame | None = None,
    *,
    declared: Sequence[str] = ("similarity",),
    placebos: Sequence[str] = tuple(PLACEBOS),
    seed: int = 0,
    dose: float | None = None,
    operator: str = "add",
    obstacles: Obstacles | None = None,
) -> pd.DataFrame:
    """Effect of each feature on every measured outcome, against every control; arguments and errors as in `effects`.

    `trials` are as `run_trials` and `score_texts` give; outcomes without a column are left out. `declared` are the
    outcomes declared before the run, `placebos` the conditions to compare with, each the primary one first. If the
    trials have it, similarity is also compared with "shuffled": the same texts against another feature's top tokens.
    One row per outcome, placebo and feature: `_LONG`; effect has its 95 % interval low, high (Student's t), q is over
    the features of one outcome and placebo; declared is False for exploratory ones, primary marks the one test that
    decides what passes.
    """
    for name in declared:
        outcome_named(name)
    dose = _tested_dose(trials, dose)
    frames = []
    for measure in (plain.under(operator) for plain in OUTCOMES.values()):
        if direct is None if measure.direct else measure.column not in trials:
            continue
        controls = [*placebos, *([SHUFFLED] if f"{measure.column}_shuffled" in trials else [])]
        for placebo in controls:
            table = _summary(_pairs(trials, direct, measure, dose, placebo), measure, seed, obstacles)
            table = table.rename(columns={"effect_low": "low", "effect_high": "high"})
            is_primary = [measure.name, placebo] == [*declared[:1], *placebos[:1]]
            table = table.assign(outcome=measure.name, placebo=placebo, primary=is_primary)
            table = table.assign(alternative=measure.alternative, unit=measure.unit, declared=measure.name in declared)
            frames.append(table[list(_LONG)])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(_LONG))


def _check_columns(trials: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in trials]
    if missing:
        raise ShapeMismatch(f"the trials lack the column(s) {', '.join(missing)}.", at="trials")


def _direct_means(direct: pd.DataFrame | None, dose: float, condition: str, column: str) -> pd.Series[float]:
    if direct is None:
        return pd.Series(dtype=np.float64)
    rows = direct[(direct["dose"] == dose) & (direct["condition"] == condition)]
    return rows.groupby("feature")[column].mean()


def _tested_dose(trials: pd.DataFrame, dose: float | None) -> float:
    _check_columns(trials, (*_KEYS, "condition", "dose", "similarity"))
    found = sorted(trials.loc[trials["condition"] == STEERED, "dose"].unique().tolist())
    if not found and dose is None:
        raise EmptySelection("there are no steered trials.", at="trials", fix="run the interventions first.")
    if dose is None and len(found) == 1:
        return float(found[0])
    if dose is None or (found and dose not in found):
        said = "no dose was chosen" if dose is None else f"dose {dose} is not among them"
        raise ConfigError(f"the trials hold the doses {found}, and {said}.", at="dose", fix="give one of them.")
    return dose


@dataclass(frozen=True)
class _Pairs:
    """An outcome by pair of texts.

    Attributes:
        keys: Feature, prompt and sample, int64 [n_pairs, 3], ascending.
        values: Unsteered, steered and placebo, float64 [3, n_pairs]; NaN where there is none.
        placebo: The third condition.
    """

    keys: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    placebo: str

    def features(self) -> Iterator[tuple[int, _Pairs]]:
        """Each feature and its pairs."""
        found, starts = np.unique(self.keys[:, 0], return_index=True)
        for feature, begin, end in zip(found.tolist(), starts, [*starts[1:], len(self.keys)], strict=True):
            yield feature, replace(self, keys=self.keys[begin:end], values=self.values[:, begin:end])


def _pairs(trials: pd.DataFrame, direct: pd.DataFrame | None, measure: Outcome, dose: float, placebo: str) -> _Pairs:
    """An outcome by pair (direct ones: by prompt, unsteered 0) and condition; "shuffled" replaces the placebo."""
    source = trials
    if measure.direct:
        source = trials.head(0).assign(**{measure.column: math.nan}) if direct is None else direct.assign(sample=0)
    _check_columns(source, [measure.column])
    places = source["condition"].map({UNSTEERED: 0, STEERED: 1, placebo: 2})
    at_dose = (source["dose"] == dose) | source["condition"].isin([UNSTEERED, "prompt"])  # those have none
    chosen = (at_dose & places.notna()).to_numpy(dtype=bool)
    place, given = places.to_numpy(dtype=np.float64)[chosen].astype(np.int64), _keys(source)[chosen]
    wanted = np.unique(_keys(trials.assign(sample=0)), axis=0) if measure.direct else given[:0]
    found = np.unique(np.concatenate([wanted, given]), axis=0, return_inverse=True)
    keys, pair = found[0], found[1].ravel()[len(wanted) :]
    if len(np.unique(3 * pair + place)) < len(pair):
        raise ShapeMismatch("a trial is there twice: same feature, prompt, sample, condition and dose.", at="trials")

    def wide(column: str) -> npt.NDArray[np.float64]:
        values = np.full((3, len(keys)), math.nan)
        values[place, pair] = source[column].astype(np.float64).to_numpy()[chosen]
        return values

    values, other = wide(measure.column), f"{measure.column}_shuffled"
    if measure.direct:
        values[0] = 0.0
        kept = np.unique(found[1].ravel()[: len(wanted)])
        keys, values = keys[kept], values[:, kept]
    if measure.logarithm:
        values = np.log(np.where(values > 0, values, math.nan))
    if placebo == SHUFFLED and other in source:
        unsteered, steered, _ = wide(other)
        values[2] = values[0] + steered - unsteered
    return _Pairs(keys, values, placebo)


def _keys(table: pd.DataFrame) -> npt.NDArray[np.int64]:
    return table[_KEYS].to_numpy(dtype=np.int64)


def _summary(pairs: _Pairs, measure: Outcome, seed: int, obstacles: Obstacles | None = None) -> pd.DataFrame:
    """One row a feature: the effect beyond the placebo over complete pairs; NaN for fewer than two."""
    kept: list[npt.NDArray[np.float64]] = []
    records = []
    for feature, own in pairs.features():
        record, differences = _one_feature(own, measure)
        reasons = [(obstacles or {}).get((feature, condition)) for condition in (STEERED, pairs.placebo)]
        if any(reasons) and record["n_pairs"] == 0:
            record["reason"] = reasons[0] or reasons[1]
        records.append({"feature": feature, **record})
        kept.append(differences)
    table = pd.DataFrame(records, columns=["feature", "n_pairs", "n_independent", *_NUMBERS, "reason"])
    bootstrap, p = np.full((2, len(kept)), math.nan), np.full(len(kept), math.nan)
    sizes = np.array([len(differences) for differences in kept])
    for size in np.unique(sizes[sizes >= 2]):  # equally many differences are resampled and tested together
        where = np.flatnonzero(sizes == size)
        values = np.stack([kept[i] for i in where])
        bootstrap[:, where] = bootstrap_means(values, seed=seed)
        p[where] = sign_flip_many(values, alternative=measure.alternative, seed=seed)
    table["bootstrap_low"], table["bootstrap_high"] = bootstrap
    table["p"] = p
    table["q"] = benjamini_hochberg(table["p"].to_numpy(dtype=np.float64))
    return table


def _one_feature(own: _Pairs, measure: Outcome) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """All columns but p and q, and the differences of the complete pairs."""
    complete = ~np.isnan(own.values).any(axis=0)
    values, prompts = own.values[:, complete], own.keys[complete, 1]
    by_pair = values[1] - values[2]
    differences = independent_values(by_pair, prompts)
    record: dict[str, Any] = {"n_pairs": len(by_pair), "n_independent": len(differences)}
    record |= dict.fromkeys(_NUMBERS, math.nan)
    record["reason"] = _reason(own, len(by_pair), measure)
    if len(differences) < 2:
        return record, np.empty(0)
    interval = mean_interval(differences)
    record |= {
        "unsteered_mean": float(values[0].mean()),
        "steered_mean": float(values[1].mean()),
        "placebo_mean": float(values[2].mean()),
        "effect": float(differences.mean()),
        "effect_low": interval.low,
        "effect_high": interval.high,
        "reversed_share": _reversed_share(by_pair, prompts, measure),
    }
    record["reason"] = "; ".join(filter(None, [record["reason"], interval.reason]))
    return record, differences


def _reversed_share(differences: npt.NDArray[np.float64], prompts: npt.NDArray[np.int64], measure: Outcome) -> float:
    """Share of prompts whose mean difference opposes the tested direction, or else the overall effect."""
    by_prompt = independent_values(differences, prompts, min_clusters=1)
    overall = float(differences.mean())
    two_sided = measure.alternative == "two-sided"
    down = overall > 0 if two_sided else measure.alternative == "greater"
    if two_sided and overall == 0:
        return math.nan  # an effect of nothing has no way to go against
    # The mean of equal numbers can miss zero by a rounding error, which is no reversal.
    tie = 1e-12 * float(np.abs(differences).max())
    return float((by_prompt < -tie).mean() if down else (by_prompt > tie).mean())


def _reason(own: _Pairs, n_complete: int, measure: Outcome) -> str:
    missing = np.isnan(own.values)
    n = missing.shape[1]
    for place, condition in enumerate((UNSTEERED, STEERED, own.placebo)):
        if not missing[place].all():
            continue
        if measure.direct:
            return "no direct effect is defined: it was not measured, or there are no top tokens"
        if condition == SHUFFLED:
            return "no other feature's top tokens to measure against, or none of them is known"
        if not missing.all():
            return f"no {condition} text has a {measure.name}: none was generated, or no word of it is known"
        if measure.name == "similarity":
            return "no similarity is defined: none of the top tokens is in the embedding, or no generated word"
        return f"no {measure.name} is defined: no generated word, or no top token that is a word"
    if n_complete < n:
        left_out = f"{measure.name} undefined in {n - n_complete} of {n} pairs, which are left out"
        return left_out if n_complete >= 2 else f"{left_out}; fewer than two pairs remain"
    return "" if n_complete >= 2 else "fewer than two pairs"
