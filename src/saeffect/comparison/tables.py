"""The paper's two tables with intervals, and the long tables behind its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables
from saeffect.comparison.measures import (
    FloatArray,
    IntArray,
    coherence_of,
    condition_similarities,
    effect_of,
    known_share,
    match_counts_of,
    pass_counts,
    placebo_of,
    scale_count,
    untested_reason,
    weights_of,
)
from saeffect.stats.bootstrap import bootstrap, cluster_bootstrap
from saeffect.stats.estimate import Estimate, undefined
from saeffect.stats.proportions import wilson
from saeffect.stats.arguments import LEVEL, Resampling

__all__ = ["activity", "match_counts", "table1", "table2", "weights"]

_STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}


def table1(arms: Mapping[str, ArmTables], *, min_matches: int, resampling: Resampling) -> pd.DataFrame:
    """Domain features, how many pass when steered, and the similarities: the paper's Table 1, one row an arm.

    Args:
        arms: The arms, in the order of the rows.
        min_matches: Top tokens in the vocabulary that make a feature count under a projection.
        resampling: Seed and number of resamples.

    Returns:
        Counts (`n_features`, `in_vocabulary`, `domain_features`, `matches_dot`, `matches_cosine`, `tested`,
        `passed`, `paper_passed`), shares from 0 to 1 (`pass_rate` with Wilson's interval, `paper_rate`), and
        means: cosine similarity of steered, unsteered and placebo trials, and effect of tested features.
        Their 95 % intervals resample whole features, with all their trials. NaN if nothing was tested; `reason` says
        why not.
    """
    rows = []
    for name, arm in arms.items():
        counts = pass_counts(arm)
        rate = _rate(counts.passed, counts.tested)
        row: dict[str, object] = {
            "arm": name,
            "role": arm.role,
            "n_features": arm.n_features,
            "in_vocabulary": int(arm.selection["in_vocabulary"].sum()),
            "domain_features": len(arm.domain),
            "matches_dot": scale_count(arm, "dot", min_matches),
            "matches_cosine": scale_count(arm, "cosine", min_matches),
            "tested": counts.tested,
            "passed": counts.passed,
            "pass_rate": rate.value,
            "pass_low": rate.low,
            "pass_high": rate.high,
            "paper_passed": counts.paper_passed,
            "paper_rate": _rate(counts.paper_passed, counts.paper_tested).value,
        }
        placebo = placebo_of(arm)
        for column, condition in (("steered", "steered"), ("unsteered", "unsteered"), ("placebo", placebo)):
            values, features = condition_similarities(arm, condition)
            mean = _clustered_mean(values, features, resampling, f"table1|{name}|{condition}")
            row |= {f"{column}_mean": mean.value, f"{column}_low": mean.low, f"{column}_high": mean.high}
        effects = effect_of(arm)
        effect = _clustered_mean(effects, np.arange(len(effects)), resampling, f"table1|{name}|effect")
        row |= {"effect_mean": effect.value, "effect_low": effect.low, "effect_high": effect.high}
        row["reason"] = untested_reason(arm)
        rows.append(row)
    return pd.DataFrame(rows)


def table2(arms: Mapping[str, ArmTables], *, resampling: Resampling) -> pd.DataFrame:
    """Coherence of the domain features: the paper's Table 2, one row an arm.

    Args:
        arms: The arms, in the order of the rows.
        resampling: Seed and number of resamples.

    Returns:
        `n_defined` and `n_undefined` count domain features with and without a coherence; mean and median with
        95 % bootstrap intervals over features, `minimum`, `maximum` and `range` are of the defined ones.
        `coverage_unique` and `coverage_total` are the shares (0 to 1) of top tokens that the word
        vectors have, each distinct token counted once, or every time. NaN where nothing is defined.
    """
    rows = []
    for name, arm in arms.items():
        values = coherence_of(arm)
        mean = _one_sample(values, "mean", resampling, f"table2|{name}|mean")
        median = _one_sample(values, "median", resampling, f"table2|{name}|median")
        low, high = (float(values.min()), float(values.max())) if len(values) else (float("nan"), float("nan"))
        coverage = known_share(arm)
        rows.append(
            {
                "arm": name,
                "role": arm.role,
                "n_defined": len(values),
                "n_undefined": len(arm.domain) - len(values),
                "mean": mean.value,
                "mean_low": mean.low,
                "mean_high": mean.high,
                "median": median.value,
                "median_low": median.low,
                "median_high": median.high,
                "minimum": low,
                "maximum": high,
                "range": high - low,
                "coverage_unique": arm.coverage_unique,
                "coverage_total": coverage.known / coverage.total if coverage.total else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def match_counts(arms: Mapping[str, ArmTables]) -> pd.DataFrame:
    """How many features have 0, 1, 2, ... top tokens in the vocabulary: the paper's Figure 1.

    Returns:
        `arm`, `matches` (0 to the number of top tokens), `n` features, their `share` of the arm's features.
    """
    deepest = max(int(arm.features["top_tokens"].map(len).max()) if arm.n_features else 0 for arm in arms.values())
    frames = []
    for name, arm in arms.items():
        counts = np.bincount(match_counts_of(arm), minlength=deepest + 1)
        share = counts / arm.n_features if arm.n_features else np.full(len(counts), np.nan)
        frames.append(pd.DataFrame({"arm": name, "matches": np.arange(len(counts)), "n": counts, "share": share}))
    return pd.concat(frames, ignore_index=True)


def weights(arms: Mapping[str, ArmTables]) -> pd.DataFrame:
    """Every top-token weight of every domain feature (the paper's "activations", its Figure 2).

    Returns:
        `arm`, `feature`, `rank` (0: the most promoted token), `weight` in units of the study's projection.
    """
    frames = []
    for name, arm in arms.items():
        found = weights_of(arm)
        frames.append(
            pd.DataFrame(
                {
                    "arm": pd.Series([name] * len(found.weight), dtype="str"),
                    "feature": found.feature,
                    "rank": found.rank,
                    "weight": found.weight,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def activity(arms: Mapping[str, ArmTables]) -> pd.DataFrame:
    """How often and how strongly each domain feature fires on the text.

    Returns:
        `arm`, `feature`, `density` (share of tokens), `mean_activation` (where active; NaN if never),
        `max_activation`.
    """
    columns = ["feature", "density", "mean_activation", "max_activation"]
    frames = []
    for name, arm in arms.items():
        rows = arm.of_domain(arm.features)[columns].copy()
        rows.insert(0, "arm", pd.Series([name] * len(rows), dtype="str"))
        frames.append(rows)
    return pd.concat(frames, ignore_index=True)


def _rate(k: int, n: int) -> Estimate:
    return wilson(k, n, level=LEVEL) if n else undefined("no feature was tested")


def _clustered_mean(values: FloatArray, features: IntArray, resampling: Resampling, name: str) -> Estimate:
    if not len(values):
        return undefined("nothing was measured")
    if len(np.unique(features)) < 2:
        return undefined("only one feature", len(values), float(values.mean()))
    seed = resampling.seed_for(name)
    return cluster_bootstrap(values, features, np.mean, n_boot=resampling.n_boot, level=LEVEL, seed=seed)


def _one_sample(values: FloatArray, statistic: str, resampling: Resampling, name: str) -> Estimate:
    function = _STATISTICS[statistic]
    if len(values) < 2:
        return undefined(
            "fewer than two features", len(values), float(function(values)) if len(values) else float("nan")
        )
    return bootstrap(values, function, n_boot=resampling.n_boot, level=LEVEL, seed=resampling.seed_for(name))
