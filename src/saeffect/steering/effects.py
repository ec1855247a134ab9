"""Effects of steering beyond placebo, one row a feature, with intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.errors import ConfigError, EmptySelection, ShapeMismatch
from saeffect.stats import benjamini_hochberg, bootstrap_means, independent_values, sign_flip_many
from saeffect.stats.student import mean_interval
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
    first = texts.groupby(level="feature").nth(0).droplevel(["prompt", "sample"])
    higher, lower = (UNSTEERED, STEERED) if similar.alternative == "less" else (STEERED, UNSTEERED)
    shuffled = _summary(texts, similar, seed).set_index("feature")
    beside = {new: shuffled[name] for name, new in _SHUFFLED.items()} | {
        "paper_pass": first[higher] > first[lower],
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


def _pairs(
    trials: pd.DataFrame, direct: pd.DataFrame | None, measure: Outcome, dose: float, placebo: str
) -> pd.DataFrame:
    """An outcome by pair (direct ones: by prompt, unsteered 0) and condition; "shuffled" replaces the placebo."""
    columns = [UNSTEERED, STEERED, placebo]
    source = trials
    if measure.direct:
        source = trials.head(0).assign(**{measure.column: math.nan}) if direct is None else direct.assign(sample=0)
    _check_columns(source, [measure.column])
    at_dose = (source["dose"] == dose) | source["condition"].isin([UNSTEERED, "prompt"])  # those have none
    rows = source[at_dose & source["condition"].isin(columns)]
    if rows.duplicated([*_KEYS, "condition"]).any():
        raise ShapeMismatch("a trial is there twice: same feature, prompt, sample, condition and dose.", at="trials")
    wide = _wide(rows, measure.column, columns)
    if measure.direct:
        pairs = trials[["feature", "prompt"]].drop_duplicates().assign(sample=0)
        wide = wide.reindex(pd.MultiIndex.from_frame(pairs[_KEYS]).sort_values())
        wide[UNSTEERED] = 0.0
    if measure.logarithm:
        wide = np.log(wide.where(wide > 0))
    other = f"{measure.column}_shuffled"
    if placebo == SHUFFLED and other in rows:
        gains = _wide(rows, other, columns)
        wide[SHUFFLED] = wide[UNSTEERED] + gains[STEERED] - gains[UNSTEERED]
    return wide


def _wide(rows: pd.DataFrame, column: str, conditions: list[str]) -> pd.DataFrame:
    wide = rows.set_index([*_KEYS, "condition"])[column].astype(np.float64).unstack("condition")
    return wide.reindex(columns=conditions).sort_index()


def _summary(wide: pd.DataFrame, measure: Outcome, seed: int, obstacles: Obstacles | None = None) -> pd.DataFrame:
    """One row a feature: the effect beyond the placebo over complete pairs; NaN for fewer than two."""
    placebo = str(wide.columns[2])
    kept: list[npt.NDArray[np.float64]] = []
    records = []
    for feature in wide.index.unique("feature").sort_values().tolist():
        record, differences = _one_feature(wide.loc[[feature]], placebo, measure)
        reasons = [(obstacles or {}).get((feature, condition)) for condition in (STEERED, placebo)]
        if any(reasons) and record["n_pairs"] == 0:
            record["reason"] = reasons[0] or reasons[1]
        records.append({"feature": int(feature), **record})
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


def _one_feature(group: pd.DataFrame, placebo: str, measure: Outcome) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """All columns but p and q, and the differences of the complete pairs."""
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


def _reversed_share(differences: pd.Series[float], measure: Outcome) -> float:
    """Share of prompts whose mean difference opposes the tested direction, or else the overall effect."""
    by_prompt = differences.groupby(level="prompt").mean()
    two_sided = measure.alternative == "two-sided"
    down = float(differences.mean()) > 0 if two_sided else measure.alternative == "greater"
    if two_sided and float(differences.mean()) == 0:
        return math.nan  # an effect of nothing has no way to go against
    # The mean of equal numbers can miss zero by a rounding error, which is no reversal.
    tie = 1e-12 * float(differences.abs().max())
    return float((by_prompt < -tie).mean() if down else (by_prompt > tie).mean())


def _reason(group: pd.DataFrame, placebo: str, n_complete: int, measure: Outcome) -> str:
    for condition in (UNSTEERED, STEERED, placebo):
        if not group[condition].isna().all():
            continue
        if measure.direct:
            return "no direct effect is defined: it was not measured, or there are no top tokens"
        if condition == SHUFFLED:
            return "no other feature's top tokens to measure against, or none of them is known"
        if not group.isna().all(axis=None):
            return f"no {condition} text has a {measure.name}: none was generated, or no word of it is known"
        if measure.name == "similarity":
            return "no similarity is defined: none of the top tokens is in the embedding, or no generated word"
        return f"no {measure.name} is defined: no generated word, or no top token that is a word"
    if n_complete < len(group):
        left_out = f"{measure.name} undefined in {len(group) - n_complete} of {len(group)} pairs, which are left out"
        return left_out if n_complete >= 2 else f"{left_out}; fewer than two pairs remain"
    return "" if n_complete >= 2 else "fewer than two pairs"
