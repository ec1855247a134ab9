"""From trials to one line a feature: what steering did beyond placebo, and whether that could be luck."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.errors import ConfigError, EmptySelection, ShapeMismatch
from saeffect.stats import benjamini_hochberg, bootstrap, sign_flip_many
from saeffect.steering.placebo import STEERED, UNSTEERED

__all__ = ["effects"]

_KEYS = ["feature", "prompt", "sample"]


def effects(
    trials: pd.DataFrame,
    direct: pd.DataFrame | None = None,
    *,
    alpha: float = 0.05,
    seed: int = 0,
    dose: float | None = None,
    placebo: str = "random",
) -> pd.DataFrame:
    """Effect of each feature on the similarity of texts to its top tokens.

    Pairs are prompts x samples: steered, placebo and unsteered text of a pair shared prompt and sampling
    noise. The effect is the mean of (steered - unsteered) - (placebo - unsteered). Pairs in which one of the
    three similarities is undefined are left out and counted in `reason`.

    Args:
        trials: As `run_trials` gives.
        direct: As `direct_effects` gives; None leaves its columns NaN.
        alpha: Share of false findings among the passed features that is put up with.
        seed: For random sign patterns and the bootstrap.
        dose: Which dose is tested; not needed when the trials hold one.
        placebo: The condition to compare with.

    Returns:
        One row a feature, by number: feature; n_pairs; unsteered_mean, steered_mean, placebo_mean (cosine
        similarities over the pairs); effect with its 95 % bootstrap interval effect_low, effect_high; p
        (one-sided sign-flip test that the effect is above 0); q (Benjamini-Hochberg over these features);
        passed (q <= alpha); paper_pass (the paper's rule: the first steered text is more similar than the
        first unsteered one); direct_effect, direct_placebo (nats, means over prompts); kl (nats, steered);
        reason ("" when all is defined). Fewer than two pairs: NaN.

    Raises:
        ConfigError: The trials hold several doses and `dose` is not given, or not the one given; `alpha` is
            not between 0 and 1.
        EmptySelection: There are no steered trials.
        ShapeMismatch: A column is missing, or a trial is there twice.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must be between 0 and 1. Got {alpha}.", at="alpha")
    missing = [name for name in (*_KEYS, "condition", "dose", "similarity") if name not in trials]
    if missing:
        raise ShapeMismatch(f"the trials lack the column(s) {', '.join(missing)}.", at="trials")
    dose = _the_dose(trials, dose)
    pairs = _pairs(trials, dose, placebo)
    records = []
    kept: list[npt.NDArray[np.float64]] = []
    for feature in trials["feature"].drop_duplicates().sort_values().tolist():
        record, differences = _one_feature(pairs.loc[[feature]], placebo, seed)
        records.append({"feature": feature, **record, **_direct(direct, feature, dose, placebo)})
        kept.append(differences)
    table = pd.DataFrame(records)
    table["p"] = _p_values(kept, seed)
    table["q"] = benjamini_hochberg(table["p"].to_numpy(dtype=np.float64))
    table["passed"] = table["q"] <= alpha
    order = ["feature", "n_pairs", "unsteered_mean", "steered_mean", "placebo_mean", "effect", "effect_low"]
    order += [
        "effect_high",
        "p",
        "q",
        "passed",
        "paper_pass",
        "direct_effect",
        "direct_placebo",
        "kl",
        "reason",
    ]
    return table[order]


def _the_dose(trials: pd.DataFrame, dose: float | None) -> float:
    found = sorted(trials.loc[trials["condition"] == STEERED, "dose"].unique().tolist())
    if not found:
        raise EmptySelection("there are no steered trials.", at="trials", fix="run the interventions first.")
    if dose is None and len(found) == 1:
        return float(found[0])
    if dose is None or dose not in found:
        said = "no dose was chosen" if dose is None else f"dose {dose} is not among them"
        raise ConfigError(f"the trials hold the doses {found}, and {said}.", at="dose", fix="give one of them.")
    return dose


def _pairs(trials: pd.DataFrame, dose: float, placebo: str) -> pd.DataFrame:
    """Similarities by feature, prompt and sample (rows) and condition (columns, absent ones NaN)."""
    at_dose = (trials["condition"] == UNSTEERED) | (trials["dose"] == dose)
    rows = trials[at_dose & trials["condition"].isin([UNSTEERED, STEERED, placebo])]
    if rows.duplicated([*_KEYS, "condition"]).any():
        raise ShapeMismatch("a trial is there twice: same feature, prompt, sample, condition and dose.", at="trials")
    wide = rows.set_index([*_KEYS, "condition"])["similarity"].unstack("condition")
    return wide.reindex(columns=[UNSTEERED, STEERED, placebo]).sort_index()


def _one_feature(group: pd.DataFrame, placebo: str, seed: int) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """The feature's columns but p and q, and the differences of its complete pairs."""
    complete = group.dropna()
    first = group.iloc[0]  # prompt 0, sample 0: the paper looks at one text of each kind
    differences = (complete[STEERED] - complete[placebo]).to_numpy(dtype=np.float64)
    record: dict[str, Any] = {
        "n_pairs": len(complete),
        "unsteered_mean": math.nan,
        "steered_mean": math.nan,
        "placebo_mean": math.nan,
        "effect": math.nan,
        "effect_low": math.nan,
        "effect_high": math.nan,
        "paper_pass": bool(first[STEERED] > first[UNSTEERED]),
        "reason": _reason(group, placebo, len(complete)),
    }
    if len(complete) < 2:
        return record, np.empty(0)
    interval = bootstrap(differences, seed=seed)
    record |= {
        "unsteered_mean": float(complete[UNSTEERED].mean()),
        "steered_mean": float(complete[STEERED].mean()),
        "placebo_mean": float(complete[placebo].mean()),
        "effect": float(differences.mean()),
        "effect_low": interval.low,
        "effect_high": interval.high,
    }
    record["reason"] = "; ".join(filter(None, [record["reason"], interval.reason]))
    return record, differences


def _reason(group: pd.DataFrame, placebo: str, n_complete: int) -> str:
    for condition in (UNSTEERED, STEERED, placebo):
        if group[condition].isna().all():
            if not group.isna().all(axis=None):
                return f"no {condition} text has a similarity: none was generated, or no word of it is known"
            return "no similarity is defined: none of the top tokens is in the embedding, or no generated word"
    if n_complete < len(group):
        said = f"similarity undefined in {len(group) - n_complete} of {len(group)} pairs, which are left out"
        return said if n_complete >= 2 else f"{said}; fewer than two pairs remain"
    return "" if n_complete >= 2 else "fewer than two pairs"


def _p_values(kept: list[npt.NDArray[np.float64]], seed: int) -> npt.NDArray[np.float64]:
    """One-sided sign-flip p of each feature; features with equally many pairs are tested together."""
    p = np.full(len(kept), math.nan)
    sizes = np.array([len(differences) for differences in kept])
    for size in np.unique(sizes[sizes >= 2]):
        where = np.flatnonzero(sizes == size)
        p[where] = sign_flip_many(np.stack([kept[i] for i in where]), alternative="greater", seed=seed)
    return p


def _direct(direct: pd.DataFrame | None, feature: int, dose: float, placebo: str) -> dict[str, float]:
    nothing = {"direct_effect": math.nan, "direct_placebo": math.nan, "kl": math.nan}
    if direct is None:
        return nothing
    rows = direct[(direct["feature"] == feature) & (direct["dose"] == dose)]
    steered, random = (rows[rows["condition"] == condition] for condition in (STEERED, placebo))
    return {
        "direct_effect": float(steered["delta_logprob"].mean()),
        "direct_placebo": float(random["delta_logprob"].mean()),
        "kl": float(steered["kl"].mean()),
    }
