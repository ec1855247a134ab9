"""The comparison of a study's arms, all tables at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from saeffect.comparison import tables
from saeffect.comparison.arms import ArmTables, Roles, roles_of
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
from saeffect.stats.arguments import Resampling

__all__ = ["check_tests", "compare"]


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

    Raises `ConfigError` for other roles, or an arm whose name is not its key; `UnknownName` for a test that does not
    exist.
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
    """Raise `UnknownName`, which lists the tests that exist, for a declared test that does not."""
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
    differences = contrasts(arms, roles, min_matches=min_matches, resampling=resampling, tests=tests)
    over_seeds = seed_contrasts(arms, roles, min_matches=min_matches, resampling=resampling)
    if over_seeds:
        differences = pd.concat([differences, as_table(over_seeds, tests)], ignore_index=True)
    differences = add_noise_p(differences)
    judgements = judgement_table(differences)
    regression = effect_regression(arms, roles)
    return Comparison(
        table1=tables.table1(arms, min_matches=min_matches, resampling=resampling),
        table2=tables.table2(arms, resampling=resampling),
        contrasts=differences,
        judgements=judgements,
        match_counts=tables.match_counts(arms),
        weights=tables.weights(arms),
        activity=tables.activity(arms),
        design=design_check({name: arm.facts for name, arm in arms.items()}),
        calibration=calibration_table(
            arms,
            roles,
            {
                "contrasts": differences,
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
        power=power_table(arms, roles, differences, tests=tests, alpha=alpha, min_matches=min_matches),
        by_chance=chance_table(arms, roles, matches, alpha=alpha),
        regression=regression.terms,
        partial_residuals=regression.partial_residuals,
        matches=matches,
    )


def _check_names(arms: Mapping[str, ArmTables]) -> None:
    """Refuse an arm with two names or two roles: its numbers would end up in the wrong row."""
    for key, arm in arms.items():
        if key != arm.name or arm.role != arm.facts.role:
            raise ConfigError(
                f"arm {key!r} calls itself {arm.name!r} with role {arm.role!r}, its facts say role {arm.facts.role!r}.",
                at=f"arms.{key}",
                fix="give all of them the same name and role.",
            )
