"""Choosing how strongly to steer, on prompts that the test does not use.

Too weak and nothing happens; too strong and the model babbles the top tokens, which is similar to them but
proves little. The score of a text is therefore *gain x fluency*, both against the unsteered text of the same
prompt and sampling noise, and the dose with the best mean score wins, if it is above 0.

A placebo at every dose shows what any push of that strength does to the same numbers. It has no say in the choice:
how far the feature speaks beyond a placebo is for the test to say, on other prompts.
"""

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


_MEASURED = ["similarity", "distinct2", "perplexity"]
_MEANS = ["similarity", "gain", "distinct2", "perplexity", "fluency", "score"]


def best_dose(scores: pd.DataFrame) -> float | None:
    """The dose of highest mean score over the steered rows, the smaller one of equals; None without a score above 0.

    Args:
        scores: As `score_doses` gives, of one arm or of several, one below the other: arms count alike.

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
    """Gain and fluency of steered texts against their unsteered twins, by dose.

    gain = steered minus unsteered similarity. fluency = geometric mean of two ratios, each at most 1:
    distinct-2 over the unsteered text's (falls when steering makes loops), and the unsteered text's
    perplexity over the steered one's, both under the unsteered model (falls when steering makes word salad,
    which never repeats itself and whose distinct-2 is fine). A text scores gain x fluency: a loop of top
    tokens has much gain and little fluency, an untouched text the reverse. A loss is not multiplied: it would
    shrink with the fluency, and of two losses the more broken text would score higher. Averaging products, not
    multiplying averages, keeps half of the texts from lending their gain to the other half's fluency. A text without a
    known word counts as no gain: steering broke it, or nothing can be shown. Left out are only features of which no
    text at all has a similarity, as their top tokens are unknown whatever is done.

    Returns:
        One row per condition ("steered", then each placebo) and dose, ascending: condition, dose, n (texts),
        n_undefined (those whose gain is undefined), and means of similarity, distinct2, perplexity, fluency (where
        defined), gain and score, of features that are not left out; NaN where all are.
    """
    return _means(_scored(trials), ["condition", "dose"])


def dose_response(trials: pd.DataFrame, direct: pd.DataFrame | None = None) -> pd.DataFrame:
    """How a feature's influence grows with the dose, and what it costs in fluency.

    Args:
        trials: As `run_trials` gives.
        direct: As `direct_effects` gives for the same features and doses; None leaves its columns NaN.

    Returns:
        One row per feature, condition ("steered", then each placebo of that feature) and dose, in that order:
        `RESPONSE_COLUMNS`. n texts, n_undefined as in `score_doses`; means over them of similarity (to the feature's
        top tokens, whatever was steered along), gain, distinct2, perplexity, fluency and score, NaN for a feature of
        which no text has a similarity; direct_effect (on the feature's top tokens) and kl (nats, means over
        prompts); best, whether it is the feature's own dose of highest score (the smaller one of equals; none where
        no score is above 0, and never a placebo's).
    """
    by = ["feature", "condition", "dose"]
    table = _means(_scored(trials), by)
    table[["direct_effect", "kl"]] = math.nan
    if direct is not None:
        rows = direct.groupby(by)[["delta_logprob", "kl"]].mean()
        found = rows.reindex(pd.MultiIndex.from_frame(table[by])).to_numpy(dtype=np.float64)
        table[["direct_effect", "kl"]] = found
    steered = table[table["condition"] == STEERED]
    highest = steered.groupby("feature")["score"].transform("max")
    first = steered[(steered["score"] == highest) & (highest > 0)].drop_duplicates("feature").index
    table["best"] = table.index.isin(first)
    return table[list(RESPONSE_COLUMNS)]


def _scored(trials: pd.DataFrame) -> pd.DataFrame:
    """The texts of every condition but unsteered, with gain, fluency and score, NaN in features that are left out."""
    keys = ["feature", "prompt", "sample"]
    twins = trials[trials["condition"] == UNSTEERED].set_index(keys)[_MEASURED].add_suffix("_before")
    rows = trials[trials["condition"] != UNSTEERED].join(twins, on=keys)
    repeats = np.minimum(1.0, rows["distinct2"] / rows["distinct2_before"])
    surprise = np.minimum(1.0, rows["perplexity_before"] / rows["perplexity"])
    gain = rows["similarity"] - rows["similarity_before"]
    rows["n"], rows["n_undefined"] = 1, gain.isna().astype(np.int64)
    rows["gain"] = gain.fillna(0.0)
    rows["fluency"] = np.sqrt(repeats * surprise)
    rows["score"] = rows["gain"] * rows["fluency"].fillna(0.0).where(rows["gain"] > 0, 1.0)
    unknown = ~rows["feature"].isin(trials.loc[trials["similarity"].notna(), "feature"])
    rows.loc[unknown, _MEANS] = math.nan
    return rows


def _means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    grouped = rows.groupby(by)
    table = grouped[["n", "n_undefined"]].sum().join(grouped[_MEANS].mean()).reset_index()
    rank = {name: i for i, name in enumerate((STEERED, *PLACEBOS))}
    return table.sort_values(by, key=lambda c: c.map(rank) if c.name == "condition" else c, ignore_index=True)
