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

_EFFECT_COLUMNS = (
    *("feature", "n_pairs", "n_independent", "unsteered_mean", "steered_mean", "placebo_mean"),
    *("effect", "effect_low", "effect_high", "bootstrap_low", "bootstrap_high"),
    *("p", "q", "passed", "paper_pass", "direct_effect", "direct_placebo", "kl", "reversed_share"),
    *("shuffled_effect", "shuffled_low", "shuffled_high", "shuffled_p", "outcome", "placebo", "reason"),
)
# Column of a table of effects: column of the effect against the shuffled reference.
_SHUFFLED_NAMES = {
    "effect": "shuffled_effect",
    "effect_low": "shuffled_low",
    "effect_high": "shuffled_high",
    "p": "shuffled_p",
}
_OUTCOME_COLUMNS = (
    *("feature", "outcome", "placebo", "n_pairs", "n_independent", "effect", "low", "high", "p", "q", "reversed_share"),
    *("unsteered_mean", "steered_mean", "placebo_mean", "alternative", "unit", "declared", "primary", "reason"),
)
_KEYS = ["feature", "prompt", "sample"]
_NUMBER_COLUMNS = (
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
    similarity = OUTCOMES["similarity"].under(measure.operator)
    dose = _tested_dose(trials, dose)
    table = _effect_table(_make_pairs(trials, direct, measure, dose, placebo), measure, seed, obstacles)
    table["passed"] = table["q"] <= alpha
    texts = _make_pairs(trials, direct, similarity, dose, SHUFFLED)
    # Prompt 0, sample 0: the paper looks at one text of each kind.
    first_texts = {feature: pairs.values[:2, 0] for feature, pairs in texts.features()}
    higher, lower = (0, 1) if similarity.alternative == "less" else (1, 0)
    shuffled = _effect_table(texts, similarity, seed).set_index("feature")
    columns = {new: shuffled[name] for name, new in _SHUFFLED_NAMES.items()} | {
        "paper_pass": {feature: bool(values[higher] > values[lower]) for feature, values in first_texts.items()},
        "direct_effect": _direct_means(direct, dose, STEERED, "delta_logprob"),
        "direct_placebo": _direct_means(direct, dose, placebo, "delta_logprob"),
        "kl": _direct_means(direct, dose, STEERED, "kl"),
    }
    for name, values in columns.items():
        table[name] = table["feature"].map(values)
    table["paper_pass"] = table["paper_pass"].eq(True)
    return table.assign(outcome=measure.name, placebo=placebo)[list(_EFFECT_COLUMNS)]


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
    One row per outcome, placebo and feature: `_OUTCOME_COLUMNS`; effect has its 95 % interval low, high (Student's t),
    q is over the features of one outcome and placebo; declared is False for exploratory ones, primary marks the one
    test that decides what passes.
    """
    for name in declared:
        outcome_named(name)
    dose = _tested_dose(trials, dose)
    frames = []
    for measure in (outcome.under(operator) for outcome in OUTCOMES.values()):
        if direct is None if measure.direct else measure.column not in trials:
            continue
        controls = [*placebos, *([SHUFFLED] if f"{measure.column}_shuffled" in trials else [])]
        for placebo in controls:
            table = _effect_table(_make_pairs(trials, direct, measure, dose, placebo), measure, seed, obstacles)
            table = table.rename(columns={"effect_low": "low", "effect_high": "high"})
            is_primary = [measure.name, placebo] == [*declared[:1], *placebos[:1]]
            table = table.assign(outcome=measure.name, placebo=placebo, primary=is_primary)
            table = table.assign(alternative=measure.alternative, unit=measure.unit, declared=measure.name in declared)
            frames.append(table[list(_OUTCOME_COLUMNS)])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(_OUTCOME_COLUMNS))


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
    doses = sorted(trials.loc[trials["condition"] == STEERED, "dose"].unique().tolist())
    if not doses and dose is None:
        raise EmptySelection("there are no steered trials.", at="trials", fix="run the interventions first.")
    if dose is None and len(doses) == 1:
        return float(doses[0])
    if dose is None or (doses and dose not in doses):
        problem = "no dose was chosen" if dose is None else f"dose {dose} is not among them"
        raise ConfigError(f"the trials hold the doses {doses}, and {problem}.", at="dose", fix="give one of them.")
    return dose


@dataclass(frozen=True)
class _Pairs:
    """An outcome by pair of texts.

    Attributes:
        keys: Feature, prompt and sample, int64 [n_pairs, 3], ascending.
        values: Unsteered, steered and placebo, float64 [3, n_pairs]; NaN where missing.
        placebo: The third condition.
    """

    keys: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    placebo: str

    def features(self) -> Iterator[tuple[int, _Pairs]]:
        """Each feature and its pairs."""
        ids, starts = np.unique(self.keys[:, 0], return_index=True)
        for feature, start, stop in zip(ids.tolist(), starts, [*starts[1:], len(self.keys)], strict=True):
            yield feature, replace(self, keys=self.keys[start:stop], values=self.values[:, start:stop])


def _make_pairs(
    trials: pd.DataFrame, direct: pd.DataFrame | None, measure: Outcome, dose: float, placebo: str
) -> _Pairs:
    """An outcome by pair and condition; direct ones by prompt, unsteered 0. "shuffled" replaces the placebo."""
    source = trials
    if measure.direct:
        source = trials.head(0).assign(**{measure.column: math.nan}) if direct is None else direct.assign(sample=0)
    _check_columns(source, [measure.column])
    condition = source["condition"].map({UNSTEERED: 0, STEERED: 1, placebo: 2})
    at_dose = (source["dose"] == dose) | source["condition"].isin([UNSTEERED, "prompt"])  # these have no dose
    chosen = (at_dose & condition.notna()).to_numpy(dtype=bool)
    codes, trial_keys = condition.to_numpy(dtype=np.float64)[chosen].astype(np.int64), _keys(source)[chosen]
    # Direct effects are paired for the prompts of the trials, also where there is no effect.
    prompt_keys = np.unique(_keys(trials.assign(sample=0)), axis=0) if measure.direct else trial_keys[:0]
    keys, inverse = np.unique(np.concatenate([prompt_keys, trial_keys]), axis=0, return_inverse=True)
    prompt_pairs, pair = np.split(inverse.ravel(), [len(prompt_keys)])
    if len(np.unique(3 * pair + codes)) < len(pair):
        raise ShapeMismatch("a trial is there twice: same feature, prompt, sample, condition and dose.", at="trials")

    def by_condition(column: str) -> npt.NDArray[np.float64]:
        values = np.full((3, len(keys)), math.nan)
        values[codes, pair] = source[column].astype(np.float64).to_numpy()[chosen]
        return values

    values, shuffled_column = by_condition(measure.column), f"{measure.column}_shuffled"
    if measure.direct:
        values[0] = 0.0
        prompt_pairs = np.unique(prompt_pairs)
        keys, values = keys[prompt_pairs], values[:, prompt_pairs]
    if measure.logarithm:
        values = np.log(np.where(values > 0, values, math.nan))
    if placebo == SHUFFLED and shuffled_column in source:
        unsteered, steered, _ = by_condition(shuffled_column)
        values[2] = values[0] + steered - unsteered
    return _Pairs(keys, values, placebo)


def _keys(table: pd.DataFrame) -> npt.NDArray[np.int64]:
    return table[_KEYS].to_numpy(dtype=np.int64)


def _effect_table(pairs: _Pairs, measure: Outcome, seed: int, obstacles: Obstacles | None = None) -> pd.DataFrame:
    """One row a feature: the effect beyond the placebo over complete pairs; NaN for fewer than two."""
    by_feature: list[npt.NDArray[np.float64]] = []
    records = []
    for feature, feature_pairs in pairs.features():
        record, differences = _feature_effect(feature_pairs, measure)
        reasons = [(obstacles or {}).get((feature, condition)) for condition in (STEERED, pairs.placebo)]
        if any(reasons) and record["n_pairs"] == 0:
            record["reason"] = reasons[0] or reasons[1]
        records.append({"feature": feature, **record})
        by_feature.append(differences)
    table = pd.DataFrame(records, columns=["feature", "n_pairs", "n_independent", *_NUMBER_COLUMNS, "reason"])
    bootstrap, p = np.full((2, len(by_feature)), math.nan), np.full(len(by_feature), math.nan)
    sizes = np.array([len(differences) for differences in by_feature])
    for size in np.unique(sizes[sizes >= 2]):  # features with equally many differences at once
        positions = np.flatnonzero(sizes == size)
        values = np.stack([by_feature[i] for i in positions])
        bootstrap[:, positions] = bootstrap_means(values, seed=seed)
        p[positions] = sign_flip_many(values, alternative=measure.alternative, seed=seed)
    table["bootstrap_low"], table["bootstrap_high"] = bootstrap
    table["p"] = p
    table["q"] = benjamini_hochberg(table["p"].to_numpy(dtype=np.float64))
    return table


def _feature_effect(pairs: _Pairs, measure: Outcome) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """All columns but p and q, and the differences of the complete pairs."""
    complete = ~np.isnan(pairs.values).any(axis=0)
    values, prompts = pairs.values[:, complete], pairs.keys[complete, 1]
    by_pair = values[1] - values[2]
    differences = independent_values(by_pair, prompts)
    record: dict[str, Any] = {"n_pairs": len(by_pair), "n_independent": len(differences)}
    record |= dict.fromkeys(_NUMBER_COLUMNS, math.nan)
    record["reason"] = _missing_reason(pairs, len(by_pair), measure)
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
    expects_positive = overall > 0 if two_sided else measure.alternative == "greater"
    if two_sided and overall == 0:
        return math.nan  # an effect of 0 has no opposite direction
    # The mean of equal numbers can differ from 0 by rounding, which is no reversal.
    tie = 1e-12 * float(np.abs(differences).max())
    return float((by_prompt < -tie).mean() if expects_positive else (by_prompt > tie).mean())


def _missing_reason(pairs: _Pairs, n_complete: int, measure: Outcome) -> str:
    missing = np.isnan(pairs.values)
    n = missing.shape[1]
    for row, condition in enumerate((UNSTEERED, STEERED, pairs.placebo)):
        if not missing[row].all():
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
