"""Choice of the dose by mean gain x fluency against the unsteered text, on prompts that the test does not use."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from saeffect.steering.placebos import PLACEBOS, STEERED, UNSTEERED

__all__ = ["RESPONSE_COLUMNS", "best_dose", "dose_response", "score_doses"]

RESPONSE_COLUMNS = (
    *("feature", "condition", "dose", "n", "n_undefined", "similarity", "gain", "distinct2", "perplexity", "fluency"),
    *("score", "direct_effect", "kl", "best"),
)


_MEASURES = ["similarity", "distinct2", "perplexity"]
_AVERAGED = ["similarity", "gain", "distinct2", "perplexity", "fluency", "score"]


def best_dose(scores: pd.DataFrame) -> float | None:
    """The dose of highest mean score over the steered rows (ties: the smaller); None if no score is above 0.
    `scores` is a table of `score_doses`, or several concatenated, one an arm; arms have equal weight.

    Example:
        >>> scores = pd.DataFrame({"condition": "steered", "dose": [0.2, 0.4, 0.8], "score": [0.1, 0.3, -0.2]})
        >>> best_dose(scores), best_dose(scores.tail(1))
        (0.4, None)
    """
    if scores.empty:
        return None
    means = scores[scores["condition"] == STEERED].groupby("dose")["score"].mean()
    gains = means[means > 0]
    return float(gains.idxmax()) if len(gains) else None


def score_doses(trials: pd.DataFrame) -> pd.DataFrame:
    """Gain and fluency of steered texts against the unsteered texts of the same prompt and noise, by dose.

    gain = steered minus unsteered similarity. fluency = geometric mean of two ratios, each at most 1: distinct-2 over
    the unsteered text's (low for loops), and the unsteered text's perplexity over the steered one's, both under the
    unsteered model (low for word salad). The score of a text is gain x fluency. A negative gain is not multiplied, or
    less fluent texts would score higher. A text without a known word has gain 0; features without any defined
    similarity are left out. One row per condition ("steered", then each placebo) and dose, ascending:
    condition, dose, n (texts), n_undefined (gain), and means over texts of similarity, distinct2, perplexity, fluency
    (where defined), gain and score.
    """
    return _mean_by(_with_scores(trials), ["condition", "dose"])


def dose_response(trials: pd.DataFrame, direct: pd.DataFrame | None = None) -> pd.DataFrame:
    """Influence and fluency cost of each feature by dose, from `run_trials` and `direct_effects` (None: NaN
    columns).

    One row per feature, condition ("steered", then its placebos) and dose: `RESPONSE_COLUMNS`. n texts, n_undefined and
    means as in `score_doses` (similarity is to the feature's top tokens, also for placebos), NaN for a feature without
    any similarity; direct_effect (on the feature's top tokens) and kl (nats, means over prompts); best: the feature's
    dose of highest score (ties: the smaller; none if no score is above 0; never a placebo's).
    """
    by = ["feature", "condition", "dose"]
    table = _mean_by(_with_scores(trials), by)
    table[["direct_effect", "kl"]] = math.nan
    if direct is not None:
        direct_means = direct.groupby(by)[["delta_logprob", "kl"]].mean()
        direct_means = direct_means.reindex(pd.MultiIndex.from_frame(table[by]))
        table[["direct_effect", "kl"]] = direct_means.to_numpy(dtype=np.float64)
    steered = table[table["condition"] == STEERED]
    highest = steered.groupby("feature")["score"].transform("max")
    best = steered[(steered["score"] == highest) & (highest > 0)].drop_duplicates("feature").index
    table["best"] = table.index.isin(best)
    return table[list(RESPONSE_COLUMNS)]


def _with_scores(trials: pd.DataFrame) -> pd.DataFrame:
    """All texts but the unsteered ones, with gain, fluency and score; NaN for features without any similarity."""
    keys = ["feature", "prompt", "sample"]
    unsteered = trials[trials["condition"] == UNSTEERED].set_index(keys)[_MEASURES].add_suffix("_before")
    rows = trials[trials["condition"] != UNSTEERED].join(unsteered, on=keys)
    distinct2_ratio = np.minimum(1.0, rows["distinct2"] / rows["distinct2_before"])
    perplexity_ratio = np.minimum(1.0, rows["perplexity_before"] / rows["perplexity"])
    gain = rows["similarity"] - rows["similarity_before"]
    rows["n"], rows["n_undefined"] = 1, gain.isna().astype(np.int64)
    rows["gain"] = gain.fillna(0.0)
    rows["fluency"] = np.sqrt(distinct2_ratio * perplexity_ratio)
    rows["score"] = rows["gain"] * rows["fluency"].fillna(0.0).where(rows["gain"] > 0, 1.0)
    undefined = ~rows["feature"].isin(trials.loc[trials["similarity"].notna(), "feature"])
    rows.loc[undefined, _AVERAGED] = math.nan
    return rows


def _mean_by(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    grouped = rows.groupby(by)
    table = grouped[["n", "n_undefined"]].sum().join(grouped[_AVERAGED].mean()).reset_index()
    rank = {name: i for i, name in enumerate((STEERED, *PLACEBOS))}
    return table.sort_values(by, key=lambda c: c.map(rank) if c.name == "condition" else c, ignore_index=True)
