"""The comparison of a study's arms, all tables at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from saeffect.comparison import tables
from saeffect.comparison.answer import Answer, answer
from saeffect.comparison.arms import ArmTables, roles_of
from saeffect.comparison.contrasts import contrasts
from saeffect.comparison.design import design_check
from saeffect.comparison.resampling import Resampling
from saeffect.errors import ConfigError

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that the comparison found; rows are ordered control, treatment, placebos.

    Attributes:
        table1: One row an arm: domain features, passing, similarities (`tables.table1`).
        table2: One row an arm: coherence of domain features (`tables.table2`).
        contrasts: One row per quantity and pair of arms (`contrasts.contrasts`).
        match_counts: Features by number of top tokens in the vocabulary (Figure 1).
        weights: Top-token weights of domain features (Figure 2).
        activity: Density and activation of domain features.
        design: How the arms differ besides the model (`design.design_check`).
        answer: The same in plain sentences.
    """

    table1: pd.DataFrame
    table2: pd.DataFrame
    contrasts: pd.DataFrame
    match_counts: pd.DataFrame
    weights: pd.DataFrame
    activity: pd.DataFrame
    design: pd.DataFrame
    answer: Answer


def compare(
    arms: Mapping[str, ArmTables],
    *,
    min_matches: int,
    alpha: float,
    seed: int,
    n_boot: int = 2_000,
    n_permutations: int = 10_000,
) -> Comparison:
    """Compare the arms of a study.

    The same input and seed give the same tables to the last digit. Intervals are at 95 % whatever `alpha` is.

    Args:
        arms: The arms by name: one control, one treatment, any number of placebos.
        min_matches: Top tokens in the vocabulary that make a feature count under a projection.
        alpha: Highest q at which the tested features were said to pass; for the words only.
        seed: Seed of every resample.
        n_boot: Resamples of an interval.
        n_permutations: Permutations of a test.

    Raises:
        ConfigError: Roles other than these, an arm whose name is not its key, or too few resamples.
    """
    _check_names(arms)
    limits = {"min_matches": (min_matches, 1), "n_boot": (n_boot, 40), "n_permutations": (n_permutations, 1)}
    for name, (value, least) in limits.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}. Got {value} instead.", at=f"comparison.{name}")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must lie between 0 and 1. Got {alpha} instead.", at="comparison.alpha")
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    ordered = {name: arms[name] for name in roles.ordered}
    resampling = Resampling(seed, n_boot, n_permutations)
    first = tables.table1(ordered, min_matches=min_matches, resampling=resampling)
    second = tables.table2(ordered, resampling=resampling)
    differences = contrasts(ordered, roles, min_matches=min_matches, resampling=resampling)
    design = design_check({name: arm.facts for name, arm in ordered.items()})
    return Comparison(
        table1=first,
        table2=second,
        contrasts=differences,
        match_counts=tables.match_counts(ordered),
        weights=tables.weights(ordered),
        activity=tables.activity(ordered),
        design=design,
        answer=answer(
            ordered,
            roles,
            table1=first,
            table2=second,
            contrasts=differences,
            design=design,
            min_matches=min_matches,
            alpha=alpha,
        ),
    )


def _check_names(arms: Mapping[str, ArmTables]) -> None:
    """Refuse an arm that goes by two names or two roles: its numbers would land in the wrong row."""
    for key, arm in arms.items():
        if key != arm.name or arm.role != arm.facts.role:
            raise ConfigError(
                f"arm {key!r} calls itself {arm.name!r} with role {arm.role!r}, its facts say role {arm.facts.role!r}.",
                at=f"arms.{key}",
                fix="give all of them the same name and role.",
            )
