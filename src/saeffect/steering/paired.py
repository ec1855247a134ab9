"""Pairs of texts that shared prompt and sampling noise, and what their differences say about each feature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.errors import ConfigError, EmptySelection, ShapeMismatch
from saeffect.stats import benjamini_hochberg, bootstrap_means, independent_values, sign_flip_many
from saeffect.stats.student import mean_interval
from saeffect.steering.measures import OutcomeMeasure
from saeffect.steering.placebo import STEERED, UNSTEERED

__all__ = ["SHUFFLED", "Obstacles", "paired_values", "summarise_pairs", "tested_dose"]

SHUFFLED = "shuffled"
"""The control that needs no texts: the same texts, measured against another feature's top tokens."""

Obstacles = Mapping[tuple[int, str], str]
"""Why a feature was not steered under a condition, by (feature, condition); see `saeffect.steering.obstacles`."""

_KEYS = ["feature", "prompt", "sample"]
_MEANS = ("unsteered_mean", "steered_mean", "placebo_mean")
_NUMBERS = (*_MEANS, "effect", "effect_low", "effect_high", "reversed_share")
_NO_DOSE = (UNSTEERED, "prompt")


def tested_dose(trials: pd.DataFrame, dose: float | None) -> float:
    """The dose given, or the only one in the trials.

    Raises:
        ConfigError: There are several and none is given, or not the one given.
        EmptySelection: No dose is given and nothing was steered.
    """
    found = sorted(trials.loc[trials["condition"] == STEERED, "dose"].unique().tolist())
    if not found and dose is None:
        raise EmptySelection("there are no steered trials.", at="trials", fix="run the interventions first.")
    if dose is None and len(found) == 1:
        return float(found[0])
    if dose is None or (found and dose not in found):
        said = "no dose was chosen" if dose is None else f"dose {dose} is not among them"
        raise ConfigError(f"the trials hold the doses {found}, and {said}.", at="dose", fix="give one of them.")
    return dose


def paired_values(
    trials: pd.DataFrame, direct: pd.DataFrame | None, measure: OutcomeMeasure, *, dose: float, placebo: str
) -> pd.DataFrame:
    """An outcome by pair and condition.

    Args:
        trials: As `run_trials` gives, with the outcome's column.
        direct: As `direct_effects` gives; None leaves its outcomes without values.
        measure: Which outcome.
        dose: At which dose.
        placebo: A condition of the trials, or "shuffled": what steering did to the similarity to another
            feature's top tokens stands in the placebo's place.

    Returns:
        Index feature, prompt, sample; columns unsteered, steered and the placebo's name, float64, NaN where
        there is none. Direct outcomes have one pair a prompt, sample 0, and 0 for unsteered.

    Raises:
        ShapeMismatch: A column is missing, or a trial is there twice.
    """
    columns = [UNSTEERED, STEERED, placebo]
    if measure.table == "direct":
        return _direct_pairs(trials, direct, measure.column, dose, placebo)
    needed = [*_KEYS, "condition", "dose", measure.column]
    missing = [name for name in needed if name not in trials]
    if missing:
        raise ShapeMismatch(f"the trials lack the column(s) {', '.join(missing)}.", at="trials")
    rows = trials[(trials["condition"].isin(_NO_DOSE) | (trials["dose"] == dose)) & trials["condition"].isin(columns)]
    if rows.duplicated([*_KEYS, "condition"]).any():
        raise ShapeMismatch("a trial is there twice: same feature, prompt, sample, condition and dose.", at="trials")
    wide = _wide(rows, measure.column, columns)
    if measure.logarithm:
        wide = np.log(wide.where(wide > 0))
    if placebo == SHUFFLED:
        other = f"{measure.column}_shuffled"
        if other in rows:
            gains = _wide(rows, other, columns)
            wide[SHUFFLED] = wide[UNSTEERED] + gains[STEERED] - gains[UNSTEERED]
    return wide


def _wide(rows: pd.DataFrame, column: str, conditions: list[str]) -> pd.DataFrame:
    wide = rows.set_index([*_KEYS, "condition"])[column].astype(np.float64).unstack("condition")
    return wide.reindex(columns=conditions).sort_index()


def _direct_pairs(
    trials: pd.DataFrame, direct: pd.DataFrame | None, column: str, dose: float, placebo: str
) -> pd.DataFrame:
    pairs = trials[["feature", "prompt"]].drop_duplicates()
    index = pd.MultiIndex.from_frame(pairs.assign(sample=0)[_KEYS]).sort_values()
    wide = pd.DataFrame(math.nan, index=index, columns=[UNSTEERED, STEERED, placebo])
    if direct is None:
        return wide
    for condition in (STEERED, placebo):
        rows = direct[(direct["condition"] == condition) & (direct["dose"] == dose)].assign(sample=0)
        if rows.duplicated(_KEYS).any():
            raise ShapeMismatch("a direct effect is there twice: same feature, prompt, condition and dose.")
        wide[condition] = rows.set_index(_KEYS)[column].reindex(index)
    wide[UNSTEERED] = 0.0
    return wide


def summarise_pairs(
    wide: pd.DataFrame, measure: OutcomeMeasure, *, seed: int, obstacles: Obstacles | None = None
) -> pd.DataFrame:
    """One row a feature: what steering did beyond the placebo, over its complete pairs.

    Args:
        wide: As `paired_values` gives.
        measure: The outcome: its alternative is tested.
        seed: For random sign patterns.
        obstacles: Why rows are missing, for the reasons.

    Returns:
        feature, n_pairs, n_independent, unsteered_mean, steered_mean, placebo_mean, effect, effect_low, effect_high,
        bootstrap_low, bootstrap_high, p, q, reversed_share, reason; see `effects`. NaN with a reason for fewer than
        two complete pairs.
    """
    placebo = str(wide.columns[2])
    kept: list[npt.NDArray[np.float64]] = []
    records = []
    for feature in wide.index.unique("feature").sort_values().tolist():
        record, differences = _one_feature(wide.loc[[feature]], placebo, measure)
        why = (obstacles or {}).get((feature, STEERED)) or (obstacles or {}).get((feature, placebo))
        if why and record["n_pairs"] == 0:
            record["reason"] = why
        records.append({"feature": int(feature), **record})
        kept.append(differences)
    table = pd.DataFrame(records, columns=["feature", "n_pairs", "n_independent", *_NUMBERS, "reason"])
    table["bootstrap_low"], table["bootstrap_high"] = _bootstrapped(kept, seed)
    table["p"] = _p_values(kept, measure.alternative, seed)
    table["q"] = benjamini_hochberg(table["p"].to_numpy(dtype=np.float64))
    return table


def _one_feature(
    group: pd.DataFrame, placebo: str, measure: OutcomeMeasure
) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """The feature's columns but p and q, and the differences of its complete pairs."""
    complete = group.dropna()
    by_pair = complete[STEERED] - complete[placebo]
    differences = independent_values(by_pair, by_pair.index.get_level_values("prompt"))
    record: dict[str, Any] = {"n_pairs": len(complete), "n_independent": len(differences)}
    record |= dict.fromkeys(_NUMBERS, math.nan)
    record["reason"] = _reason(group, placebo, len(complete), measure)
    if len(differences) < 2:
        return record, np.empty(0)
    interval = mean_interval(differences)
    record |= {
        "unsteered_mean": float(complete[UNSTEERED].mean()),
        "steered_mean": float(complete[STEERED].mean()),
        "placebo_mean": float(complete[placebo].mean()),
        "effect": float(differences.mean()),
        "effect_low": interval.low,
        "effect_high": interval.high,
        "reversed_share": _reversed_share(by_pair, measure),
    }
    record["reason"] = "; ".join(filter(None, [record["reason"], interval.reason]))
    return record, differences


def _reversed_share(differences: pd.Series[float], measure: OutcomeMeasure) -> float:
    """Share of prompts whose mean difference goes the other way than expected, or against the overall effect."""
    by_prompt = differences.groupby(level="prompt").mean()
    two_sided = measure.alternative == "two-sided"
    down = float(differences.mean()) > 0 if two_sided else measure.alternative == "greater"
    if two_sided and float(differences.mean()) == 0:
        return math.nan  # an effect of nothing has no way to go against
    # The mean of equal numbers can miss zero by a rounding error, which is no reversal.
    tie = 1e-12 * float(differences.abs().max())
    return float((by_prompt < -tie).mean() if down else (by_prompt > tie).mean())


def _reason(group: pd.DataFrame, placebo: str, n_complete: int, measure: OutcomeMeasure) -> str:
    for condition in (UNSTEERED, STEERED, placebo):
        if not group[condition].isna().all():
            continue
        if measure.table == "direct":
            return "no direct effect is defined: it was not measured, or there are no top tokens"
        if condition == SHUFFLED:
            return "no other feature's top tokens to measure against, or none of them is known"
        if not group.isna().all(axis=None):
            return f"no {condition} text has a {measure.name}: none was generated, or no word of it is known"
        if measure.name == "similarity":
            return "no similarity is defined: none of the top tokens is in the embedding, or no generated word"
        return f"no {measure.name} is defined: no generated word, or no top token that is a word"
    if n_complete < len(group):
        said = f"{measure.name} undefined in {len(group) - n_complete} of {len(group)} pairs, which are left out"
        return said if n_complete >= 2 else f"{said}; fewer than two pairs remain"
    return "" if n_complete >= 2 else "fewer than two pairs"


def _bootstrapped(kept: list[npt.NDArray[np.float64]], seed: int) -> npt.NDArray[np.float64]:
    """Ends of each feature's bootstrap interval, [2, n_features]."""
    ends = np.full((2, len(kept)), math.nan)
    for where in _of_one_size(kept):
        ends[:, where] = bootstrap_means(np.stack([kept[i] for i in where]), seed=seed)
    return ends


def _of_one_size(kept: list[npt.NDArray[np.float64]]) -> Iterator[npt.NDArray[np.intp]]:
    """Features with equally many differences, two or more, are resampled and tested together."""
    sizes = np.array([len(differences) for differences in kept])
    for size in np.unique(sizes[sizes >= 2]):
        yield np.flatnonzero(sizes == size)


def _p_values(kept: list[npt.NDArray[np.float64]], alternative: str, seed: int) -> npt.NDArray[np.float64]:
    """Sign-flip p of each feature."""
    p = np.full(len(kept), math.nan)
    for where in _of_one_size(kept):
        p[where] = sign_flip_many(np.stack([kept[i] for i in where]), alternative=alternative, seed=seed)
    return p
