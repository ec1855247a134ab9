"""The comparison of a study's arms: the paper's two tables with intervals, those behind its figures, and all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from saeffect.comparison.arms import (
    ArmTables,
    Roles,
    coherence_of,
    condition_similarities,
    effect_of,
    match_counts_of,
    pass_counts,
    placebo_of,
    roles_of,
    scale_count,
    top_token_coverage,
    untested_reason,
    weights_of,
)
from saeffect.comparison.calibration import calibration_table, chance_table
from saeffect.comparison.contrasts import as_table, contrasts
from saeffect.comparison.design import design_check
from saeffect.comparison.effect_regression import effect_regression
from saeffect.comparison.findings import Comparison, MatchTables
from saeffect.comparison.judgement import PRIMARY, add_noise_p, judgement_table
from saeffect.comparison.power import power_table
from saeffect.comparison.quantities import declarable
from saeffect.comparison.seeds import seed_contrasts
from saeffect.errors import ConfigError, unknown_name
from saeffect.stats.arguments import FloatArray, IntArray, Resampling
from saeffect.stats.bootstrap import Average, bootstrap, cluster_bootstrap
from saeffect.stats.estimate import Estimate, undefined
from saeffect.stats.proportions import wilson

__all__ = ["activity", "check_tests", "compare", "match_counts", "table1", "table2", "weights"]


def compare(
    arms: Mapping[str, ArmTables],
    *,
    min_matches: int,
    alpha: float,
    seed: int,
    n_boot: int = 2_000,
    n_permutations: int = 10_000,
    tests: Sequence[str] = PRIMARY,
    matches: MatchTables | None = None,
) -> Comparison:
    """Compare the arms of a study: all tables but the threats and the words (`saeffect.report.with_answer`).

    The same input and seed give the same tables to the last digit. Intervals are at 95 % whatever `alpha` is, the
    highest q of findings about single features. `arms` by name: one control, one treatment, any number of placebos.
    `tests` is what was declared before the run (`quantities.declarable`); all else is exploration.

    Raises `ConfigError` for other roles, or an arm whose name is not its key; `UnknownName` for an unknown test.
    """
    _check_names(arms)
    limits = {"min_matches": (min_matches, 1), "n_boot": (n_boot, 40), "n_permutations": (n_permutations, 1)}
    for name, (value, least) in limits.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}. Got {value} instead.", at=f"comparison.{name}")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must lie between 0 and 1. Got {alpha} instead.", at="comparison.alpha")
    check_tests(tests)
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    ordered = {name: arms[name] for name in roles.ordered}
    return _tables(ordered, roles, tests, (min_matches, alpha), Resampling(seed, n_boot, n_permutations), matches)


def check_tests(tests: Sequence[str]) -> None:
    """Raise `UnknownName`, which lists the valid tests, for an unknown declared test."""
    for name in tests:
        if name not in declarable():
            raise unknown_name("test", name, declarable(), at="comparison.tests")


def _tables(
    arms: dict[str, ArmTables],
    roles: Roles,
    tests: Sequence[str],
    thresholds: tuple[int, float],
    resampling: Resampling,
    matches: MatchTables | None,
) -> Comparison:
    min_matches, alpha = thresholds
    matches = matches or MatchTables()
    contrast_table = contrasts(arms, roles, min_matches=min_matches, resampling=resampling, tests=tests)
    seed_rows = seed_contrasts(arms, roles, min_matches=min_matches, resampling=resampling)
    if seed_rows:
        contrast_table = pd.concat([contrast_table, as_table(seed_rows, tests)], ignore_index=True)
    contrast_table = add_noise_p(contrast_table)
    judgements = judgement_table(contrast_table)
    regression = effect_regression(arms, roles)
    return Comparison(
        table1=table1(arms, min_matches=min_matches, resampling=resampling),
        table2=table2(arms, resampling=resampling),
        contrasts=contrast_table,
        judgements=judgements,
        match_counts=match_counts(arms),
        weights=weights(arms),
        activity=activity(arms),
        design=design_check({name: arm.facts for name, arm in arms.items()}),
        calibration=calibration_table(
            arms,
            roles,
            {
                "contrasts": contrast_table,
                "judgements": judgements,
                "fates_null": matches.fates_null,
                "cross_activity": matches.cross_activity,
                "regression": regression.terms,
            },
            tests=tests,
            alpha=alpha,
            min_matches=min_matches,
            resampling=resampling,
        ),
        power=power_table(arms, roles, contrast_table, tests=tests, alpha=alpha, min_matches=min_matches),
        by_chance=chance_table(arms, roles, matches, alpha=alpha),
        regression=regression.terms,
        partial_residuals=regression.partial_residuals,
        matches=matches,
    )


def _check_names(arms: Mapping[str, ArmTables]) -> None:
    """Raise if an arm has two names or two roles: its numbers would end up in the wrong row."""
    for key, arm in arms.items():
        if key != arm.name or arm.role != arm.facts.role:
            raise ConfigError(
                f"arm {key!r} calls itself {arm.name!r} with role {arm.role!r}, its facts say role {arm.facts.role!r}.",
                at=f"arms.{key}",
                fix="give all of them the same name and role.",
            )


def table1(arms: Mapping[str, ArmTables], *, min_matches: int, resampling: Resampling) -> pd.DataFrame:
    """Domain features, how many pass when steered, and the similarities: the paper's Table 1, one row an arm.

    Counts; shares from 0 to 1 (`pass_rate` with Wilson's interval, `paper_rate`); means of cosine similarity by
    condition and of the effect, with 95 % intervals that resample whole features. NaN if nothing was tested; `reason`
    says why.
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
    most_matches = max(int(arm.features["top_tokens"].map(len).max()) if arm.n_features else 0 for arm in arms.values())
    frames = []
    for name, arm in arms.items():
        counts = np.bincount(match_counts_of(arm), minlength=most_matches + 1)
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
    """The tables of all arms as one, with the arm in the first column."""
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
