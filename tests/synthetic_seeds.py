"""Further SAEs for the arms of a made-up study, so that the noise of SAE training can be seen in it."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from saeffect.comparison.arms import ArmTables
from synthetic_study import synthetic_arms


def synthetic_seeds(arms: dict[str, ArmTables], n: int = 2, n_features: int = 400) -> dict[str, ArmTables]:
    """The arms with `n` further SAEs of control and treatment each, drawn as their own were from other seeds."""
    others = [synthetic_arms(seed=100 + i, n_features=n_features) for i in range(n)]
    found = dict(arms)
    for role in ("control", "treatment"):
        tables = [
            one[role].features.merge(one[role].coherence, on="feature").merge(one[role].selection, on="feature")
            for one in others
        ]
        seeds = [table.assign(sae=f"{role}-{i}") for i, table in enumerate(tables)]
        found[role] = replace(arms[role], seeds=pd.concat(seeds, ignore_index=True))
    return found
