"""Choosing how strongly to steer, on prompts that the test does not use.

Too weak and nothing happens; too strong and the model babbles the top tokens, which is similar to them but
proves little. The score of a text is therefore *gain x fluency*, both against the unsteered text of the same
prompt and sampling noise, and the dose with the best mean score wins.

A placebo at every dose shows what any push of that strength does to the same numbers. It has no say in the choice:
what is sought is the dose at which the feature speaks best, and how far it speaks beyond a placebo is for the test
to say, on other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from torch import Tensor

from saeffect.errors import ConfigError, Undefined
from saeffect.steering.generate import Progress
from saeffect.steering.outcomes import TextVectors
from saeffect.steering.placebo import PLACEBOS, STEERED, UNSTEERED
from saeffect.steering.plan import Site, SteeringPlan
from saeffect.steering.trials import run_trials

__all__ = ["RESPONSE_COLUMNS", "DoseChoice", "choose_dose", "dose_response", "score_doses"]

RESPONSE_COLUMNS = (
    *("feature", "condition", "dose", "n", "similarity", "gain", "distinct2", "perplexity", "fluency", "score"),
    *("direct_effect", "kl", "best"),
)


_MEASURED = ["similarity", "distinct2", "perplexity"]


@dataclass(frozen=True, eq=False)
class DoseChoice:
    """The chosen dose and what it was chosen from.

    Attributes:
        dose: In units of the site's mean norm.
        table: One row per condition and dose, see `score_doses`.
        features: Which features were tried.
        prompts: On which prompts.
        reason: What speaks against trusting the choice, else "".
    """

    dose: float
    table: pd.DataFrame
    features: tuple[int, ...]
    prompts: tuple[str, ...]
    reason: str = ""


def choose_dose(
    site: Site,
    W_dec: Tensor,
    features: pd.DataFrame,
    search: SteeringPlan,
    *,
    test_prompts: Sequence[str],
    vectors: TextVectors,
    progress: Progress | None = None,
) -> DoseChoice:
    """Try some doses on a few features and keep the best.

    Args:
        site: Model, hook and unit of doses.
        W_dec: Decoder, `[d_sae, d_model]`.
        features: A few rows of the feature table: feature and top_tokens.
        search: The doses to try, the search prompts, and the placebos to run beside the features, in the same
            batches; they have no say in the choice.
        test_prompts: The prompts of the test, none of which may be among the search prompts: a strength
            fitted to the very prompts it is tested on would flatter the effect.
        vectors: Where the texts' vectors come from.
        progress: Called with rows done and in all.

    Returns:
        The dose with the highest mean of gain x fluency, the smaller one of equals; see `score_doses`.

    Raises:
        ConfigError: A search prompt is a test prompt too (letter case and spacing aside).
        Undefined: No text got a similarity, so nothing can be chosen.
    """
    test = {_plain(prompt) for prompt in test_prompts}
    shared = [prompt for prompt in search.prompts if _plain(prompt) in test]
    if shared:
        raise ConfigError(
            f"{len(shared)} prompt(s) of the dose search are test prompts too, such as {shared[0]!r}.",
            at="search prompts",
            fix="give the search prompts of its own, or set the dose yourself.",
        )
    plan = replace(search, perplexity=True)
    trials = run_trials(site, W_dec, features, plan, vectors=vectors, progress=progress)
    table = score_doses(trials)
    steered = table[table["condition"] == STEERED]
    scored = steered.dropna(subset="score")
    if scored.empty:
        raise Undefined(
            "no text of the dose search has a similarity to its feature's top tokens.",
            at="dose search",
            fix="use features whose top tokens are words of the embedding, or set the dose yourself.",
        )
    best = scored.sort_values(["score", "dose"], ascending=[False, True], kind="stable").iloc[0]
    reason = ""
    if best["score"] <= 0:
        reason = "no dose made texts more similar to the features' top tokens"
    elif len(steered) > 1 and best["dose"] in (steered["dose"].min(), steered["dose"].max()):
        reason = "the best dose is at the edge of those tried; one beyond may be better"
    tried = tuple(sorted(int(f) for f in features["feature"]))
    return DoseChoice(float(best["dose"]), table, tried, plan.prompts, reason)


def score_doses(trials: pd.DataFrame) -> pd.DataFrame:
    """Gain and fluency of steered texts against their unsteered twins, by dose.

    gain = steered minus unsteered similarity. fluency = geometric mean of two ratios, each at most 1:
    distinct-2 over the unsteered text's (falls when steering makes loops), and the unsteered text's
    perplexity over the steered one's, both under the unsteered model (falls when steering makes word salad,
    which never repeats itself and whose distinct-2 is fine). A text scores gain x fluency: a loop of top
    tokens has much gain and little fluency, an untouched text the reverse. Averaging products, not
    multiplying averages, keeps half of the texts from lending their gain to the other half's fluency.

    Args:
        trials: As `run_trials` gives, with perplexity.

    Returns:
        One row per condition ("steered", then each placebo) and dose, ascending: condition, dose, n (texts
        scored), and means over these of similarity, gain, distinct2, perplexity, fluency and score. Texts whose
        gain or fluency is undefined are left out.
    """
    return _means(_scored(trials), ["condition", "dose"])


def dose_response(trials: pd.DataFrame, direct: pd.DataFrame | None = None) -> pd.DataFrame:
    """How a feature's influence grows with the dose, and what it costs in fluency.

    Args:
        trials: As `run_trials` gives, with perplexity.
        direct: As `direct_effects` gives for the same features and doses; None leaves its columns NaN.

    Returns:
        One row per feature, condition ("steered", then each placebo of that feature) and dose, in that order:
        `RESPONSE_COLUMNS`. n texts scored; means over them of similarity (to the feature's top tokens, whatever
        was steered along), gain, distinct2, perplexity, fluency and score as in `score_doses`, NaN for n = 0;
        direct_effect (on the feature's top tokens) and kl (nats, means over prompts); best, whether it is the
        feature's own dose of highest score (the smaller one of equals; none where no score is defined, and
        never a placebo's).
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
    first = steered[steered["score"] == highest].drop_duplicates("feature").index
    table["best"] = table.index.isin(first)
    return table[list(RESPONSE_COLUMNS)]


def _scored(trials: pd.DataFrame) -> pd.DataFrame:
    """The texts of every condition but unsteered, with gain, fluency, score, and n = 1 where these are defined."""
    keys = ["feature", "prompt", "sample"]
    twins = trials[trials["condition"] == UNSTEERED].set_index(keys)[_MEASURED].add_suffix("_before")
    rows = trials[trials["condition"] != UNSTEERED].join(twins, on=keys)
    repeats = np.minimum(1.0, rows["distinct2"] / rows["distinct2_before"])
    surprise = np.minimum(1.0, rows["perplexity_before"] / rows["perplexity"])
    rows["gain"] = rows["similarity"] - rows["similarity_before"]
    rows["fluency"] = np.sqrt(repeats * surprise)
    rows["score"] = rows["gain"] * rows["fluency"]
    return rows.assign(n=rows["score"].notna().astype(np.int64))


def _means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    columns = ["similarity", "gain", "distinct2", "perplexity", "fluency", "score"]
    means = rows[rows["n"] == 1].groupby(by)[columns].mean()
    table = rows.groupby(by)[["n"]].sum().join(means).reset_index()
    rank = {name: i for i, name in enumerate((STEERED, *PLACEBOS))}
    return table.sort_values(by, key=lambda c: c.map(rank) if c.name == "condition" else c, ignore_index=True)


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
