"""The numbers that are read off one arm; tables and quantities are made of these and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables
from saeffect.stats.arguments import FloatArray, IntArray

__all__ = [
    "PassCounts",
    "activity_of",
    "coherence_of",
    "condition_similarities",
    "direct_effect_of",
    "effect_of",
    "match_counts_of",
    "pass_counts",
    "placebo_of",
    "scale_count",
    "steered_minus_placebo",
    "top_token_coverage",
    "untested_reason",
    "weights_of",
]


@dataclass(frozen=True)
class PassCounts:
    """How many features were tested and passed, by our test and by the paper's rule.

    A feature counts as tested when its p is defined. `paper_tested` is how many of those the paper's
    rule could judge.
    """

    tested: int
    passed: int
    paper_tested: int
    paper_passed: int


def scale_count(arm: ArmTables, scale: Literal["dot", "cosine"], min_matches: int) -> int:
    """Features with at least `min_matches` top tokens in the vocabulary under one projection."""
    return int((arm.selection[f"matches_{scale}"] >= min_matches).sum())


def pass_counts(arm: ArmTables) -> PassCounts:
    """Tested and passing features of an arm; all 0 where nothing was steered."""
    if arm.effects is None:
        return PassCounts(0, 0, 0, 0)
    tested = arm.effects[arm.effects["p"].notna()]
    passed, by_paper = (tested[column].eq(True).fillna(False) for column in ("passed", "paper_pass"))
    return PassCounts(len(tested), int(passed.sum()), int(tested["paper_pass"].notna().sum()), int(by_paper.sum()))


def untested_reason(arm: ArmTables) -> str:
    """Why no effect of steering could be tested in an arm; "" where one was."""
    if pass_counts(arm).tested:
        return ""
    if not len(arm.domain):
        return f"{arm.name} has no domain feature"
    if arm.effects is None or arm.effects.empty:
        return arm.unsteered or f"no feature of {arm.name} was steered"
    reasons = arm.effects["reason"].replace("", pd.NA).dropna() if "reason" in arm.effects else pd.Series(dtype=str)
    n = len(arm.effects)
    said = f"{'the one feature' if n == 1 else f'none of the {n} features'} steered in {arm.name} has "
    said += "no effect that is defined" if n == 1 else "an effect that is defined"
    return said + (f": {reasons.mode().iloc[0]}" if len(reasons) else "")


def coherence_of(arm: ArmTables) -> FloatArray:
    """Defined coherences of the domain features, in feature order; float64 [n_defined]."""
    return _finite(arm.of_domain(arm.coherence)["coherence"])


def top_token_coverage(arm: ArmTables, *, domain_only: bool = False) -> float:
    """Share of features' top tokens that the word vectors have, repeats counted; NaN without tokens."""
    features, coherence = arm.features, arm.coherence
    if domain_only:
        features, coherence = arm.of_domain(features), arm.of_domain(coherence)
    total = int(features["top_tokens"].map(len).sum())
    return int(coherence["n_known"].sum()) / total if total else float("nan")


def weights_of(arm: ArmTables) -> pd.DataFrame:
    """Top-token weights of the domain features: what the paper calls their activations.

    One row a token: `feature`, `rank` (0: the token that the feature promotes most), `weight`. Weights that are not
    finite are left out.
    """
    rows = arm.of_domain(arm.features)
    lists = [np.asarray(list(weights), dtype=np.float64) for weights in rows["top_weights"]]
    table = pd.DataFrame(
        {
            "feature": np.repeat(rows["feature"].to_numpy(dtype=np.int64), [len(weights) for weights in lists]),
            "rank": np.concatenate([np.arange(len(weights)) for weights in lists] or [np.empty(0, dtype=np.int64)]),
            "weight": np.concatenate(lists or [np.empty(0)]),
        }
    )
    return table[np.isfinite(table["weight"])].reset_index(drop=True)


def match_counts_of(arm: ArmTables) -> IntArray:
    """Top tokens in the vocabulary, every feature of the arm: int64 [n_features]."""
    counts: IntArray = arm.selection.sort_values("feature")["matches"].to_numpy(dtype=np.int64)
    return counts


def activity_of(arm: ArmTables, column: Literal["density", "mean_activation"]) -> FloatArray:
    """Density (share of tokens) or mean activation where active, of domain features; finite values only."""
    return _finite(arm.of_domain(arm.features)[column])


def effect_of(arm: ArmTables) -> FloatArray:
    """Effect of steering beyond the placebo direction, per tested feature, in cosine similarity."""
    return np.empty(0) if arm.effects is None else _finite(arm.effects.sort_values("feature")["effect"])


def direct_effect_of(arm: ArmTables) -> FloatArray:
    """Direct effect beyond that of the placebo direction, per tested feature, in nats.

    Taken from the direct-effects table: mean over prompts and doses, steered minus placebo; finite only.
    """
    if arm.direct_effects is None or arm.direct_effects.empty:
        return np.empty(0)
    means = arm.direct_effects.pivot_table(
        index="feature", columns="condition", values="delta_logprob", aggfunc="mean", sort=True
    )
    placebo = placebo_of(arm)
    if not {"steered", placebo} <= set(means.columns):
        return np.empty(0)
    return _finite(means["steered"] - means[placebo])


def placebo_of(arm: ArmTables) -> str:
    """The condition that steering was tested against, as the arm's effects say; "" where nothing was steered."""
    return "" if arm.effects is None or arm.effects.empty else str(arm.effects["placebo"].iloc[0])


def steered_minus_placebo(arm: ArmTables) -> pd.Series[Any]:
    """How much more similar a steered text is than its placebo, which shares prompt and sampling noise with it.

    Returns:
        Difference in cosine similarity, indexed by feature, prompt and sample (its mean over doses); only where both
        are defined, so empty where nothing was steered or that placebo was not run.
    """
    placebo, trials = placebo_of(arm), arm.interventions
    if trials is None:
        return pd.Series(dtype=np.float64)
    wide = trials[trials["condition"].isin(["steered", placebo])].pivot_table(
        index=["feature", "prompt", "sample"], columns="condition", values="similarity", aggfunc="mean"
    )
    wide = wide.reindex(columns=["steered", placebo])
    return (wide["steered"] - wide[placebo]).dropna()


def condition_similarities(arm: ArmTables, condition: str) -> tuple[FloatArray, IntArray]:
    """Similarity of every trial of one condition, with the feature that each belongs to (its cluster)."""
    if arm.interventions is None:
        return np.empty(0), np.empty(0, dtype=np.int64)
    trials = arm.interventions
    rows = trials[(trials["condition"] == condition) & trials["similarity"].notna()]
    rows = rows.sort_values("feature", kind="stable")
    return rows["similarity"].to_numpy(dtype=np.float64), rows["feature"].to_numpy(dtype=np.int64)


def _finite(values: pd.Series[Any]) -> FloatArray:
    array: FloatArray = values.to_numpy(dtype=np.float64)
    return array[np.isfinite(array)]
