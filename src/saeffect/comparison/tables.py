"""The paper's two tables with intervals, and the long tables behind its figures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from saeffect.comparison.arms import (
    ArmTables,
    coherence_of,
    condition_similarities,
    effect_of,
    match_counts_of,
    pass_counts,
    placebo_of,
    scale_count,
    top_token_coverage,
    untested_reason,
    weights_of,
)
from saeffect.stats.arguments import FloatArray, IntArray, Resampling
from saeffect.stats.bootstrap import Average, bootstrap, cluster_bootstrap
from saeffect.stats.estimate import Estimate, undefined
from saeffect.stats.proportions import wilson

__all__ = ["activity", "match_counts", "table1", "table2", "weights"]


def table1(arms: Mapping[str, ArmTables], *, min_matches: int, resampling: Resampling) -> pd.DataFrame:
    """Domain features, how many pass when steered, and the similarities: the paper's Table 1, one row an arm.

    Counts; shares from 0 to 1 (`pass_rate` with Wilson's interval, `paper_rate`); means of cosine similarity by
    condition and of the effect, whose 95 % intervals resample whole features, with all their trials. NaN if nothing was
    tested; `reason` says why.
    """
    rows = []
    for name, arm in arms.items():
        counts = pass_counts(arm)
        rate = wilson(counts.passed, counts.tested)
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
            "paper_rate": counts.paper_passed / counts.paper_tested if counts.paper_tested else float("nan"),
        }
        for column, condition in (("steered", "steered"), ("unsteered", "unsteered"), ("placebo", placebo_of(arm))):
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

    `n_defined` and `n_undefined` count domain features; mean and median have 95 % bootstrap intervals over features.
    `coverage_unique` and `coverage_total` are the shares (0 to 1) of top tokens that the word vectors have, each
    distinct token counted once, or every time.
    """
    rows = []
    for name, arm in arms.items():
        values = coherence_of(arm)
        mean = _average(values, "mean", resampling, f"table2|{name}|mean")
        median = _average(values, "median", resampling, f"table2|{name}|median")
        low, high = (float(values.min()), float(values.max())) if len(values) else (float("nan"), float("nan"))
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
                "coverage_total": top_token_coverage(arm, domain_only=True),
            }
        )
    return pd.DataFrame(rows)


def match_counts(arms: Mapping[str, ArmTables]) -> pd.DataFrame:
    """How many features (`n`, and `share` of the arm's) have 0, 1, 2, ... top tokens in the vocabulary: Figure 1."""
    deepest = max(int(arm.features["top_tokens"].map(len).max()) if arm.n_features else 0 for arm in arms.values())
    frames = []
    for name, arm in arms.items():
        counts = np.bincount(match_counts_of(arm), minlength=deepest + 1)
        share = counts / arm.n_features if arm.n_features else np.full(len(counts), np.nan)
        frames.append(pd.DataFrame({"arm": name, "matches": np.arange(len(counts)), "n": counts, "share": share}))
    return pd.concat(frames, ignore_index=True)


def weights(arms: Mapping[str, ArmTables]) -> pd.DataFrame:
    """Every top-token weight of every domain feature (the paper's "activations", its Figure 2), see `weights_of`."""
    return _stacked({name: weights_of(arm) for name, arm in arms.items()})


def activity(arms: Mapping[str, ArmTables]) -> pd.DataFrame:
    """How often (`density`) and how strongly (`mean_activation` where active, `max_activation`) each domain feature
    fires.
    """
    columns = ["feature", "density", "mean_activation", "max_activation"]
    return _stacked({name: arm.of_domain(arm.features)[columns] for name, arm in arms.items()})


def _stacked(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of the arms below each other, with the arm in the first column."""
    frames = []
    for name, table in tables.items():
        rows = table.copy()
        rows.insert(0, "arm", pd.Series([name] * len(rows), dtype="str"))
        frames.append(rows)
    return pd.concat(frames, ignore_index=True)


def _clustered_mean(values: FloatArray, features: IntArray, resampling: Resampling, name: str) -> Estimate:
    if len(np.unique(features)) == 1:
        return undefined("only one feature", len(values), float(values.mean()))
    seed = resampling.seed_for(name)
    return cluster_bootstrap(values, features, n_boot=resampling.n_boot, seed=seed)


def _average(values: FloatArray, statistic: Average, resampling: Resampling, name: str) -> Estimate:
    return bootstrap(values, statistic, n_boot=resampling.n_boot, seed=resampling.seed_for(name))
