"""The smallest true differences that the tests of this study detect in four cases of five."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles, steered_minus_placebo
from saeffect.comparison.judgement import ALL_SEEDS, ALPHA
from saeffect.comparison.quantities import QUANTITIES, sae_value
from saeffect.comparison.seeds import control_saes
from saeffect.stats.arguments import FloatArray
from saeffect.stats.power import (
    Detectable,
    detectable_few_means,
    detectable_mean_difference,
    detectable_paired_mean,
    detectable_proportion_difference,
)
from saeffect.stats.student import independent_values

__all__ = ["POWER", "power_table"]

POWER = 0.8
# The test of a feature tries every pattern of signs up to so many pairs, above that so many at random.
_EXACT, _FLIPS = 14, 10_000
_COLUMNS = ("test", "unit", "n_a", "n_b", "spread", "alpha", "power", "detectable", "detectable_below", "observed")


def power_table(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    contrasts: pd.DataFrame,
    *,
    tests: Sequence[str],
    alpha: float,
    min_matches: int,
) -> pd.DataFrame:
    """The smallest difference of treatment and control that each declared test would have found.

    Observed differences are read from `contrasts`, which hold the rows over seeds; a steered feature passes at q <=
    `alpha`.

    One row a test: `test` (a quantity, `<quantity>_seeds` for SAEs as units, or "feature in <arm>" for a single steered
    feature); `unit` of the difference; `n_a`, `n_b` units of control and treatment (features or SAEs; prompts for a
    feature, or pairs of texts where prompts are few); `spread` (standard deviation, or the control's share); `alpha`,
    for SAEs as units after Holm's correction, if no other declared quantity differs; `power`; `detectable`, the
    smallest difference; `detectable_below`, the same downwards; `observed`; `method`; `reason`. A single feature has
    two rows: alone at alpha, and as the only one found in its arm (alpha / number of features, as Benjamini-Hochberg
    then requires).
    """
    rows: list[dict[str, Any]] = []
    n_declared = max(1, sum(bool((contrasts["quantity"] == quantity).any()) for quantity in tests))
    for quantity in tests:
        observed = contrasts[(contrasts["quantity"] == quantity) & (contrasts["comparison"] == "fine-tuning")]
        if observed.empty:
            continue
        arms_compared = arms[roles.control], arms[roles.treatment]
        rows.append(_between_features(quantity, observed.iloc[0], *arms_compared, min_matches))
        over = contrasts[(contrasts["quantity"] == f"{quantity}_seeds") & (contrasts["comparison"] == ALL_SEEDS)]
        if not over.empty:
            sides = control_saes(arms, roles), arms[roles.treatment].saes
            values = [np.array([sae_value(quantity, sae, min_matches) for sae in saes]) for saes in sides]
            rows.append(_between_saes(over.iloc[0], [side[~np.isnan(side)] for side in values], n_declared))
    for name in roles.ordered:
        rows += _single_features(name, arms[name], alpha)
    return pd.DataFrame(rows, columns=[*_COLUMNS, "method", "reason"])


def _between_features(
    quantity: str, row: pd.Series[Any], control: ArmTables, treatment: ArmTables, min_matches: int
) -> dict[str, Any]:
    known, unit, observed = QUANTITIES.get(quantity), str(row["unit"]), float(row["estimate"])
    if known is None or known.kind not in ("share", "mean", "count mean"):
        found = Detectable(math.nan, math.nan, 0, "", "its power is not worked out: it is neither a share nor a mean")
        return _row(quantity, unit, (0, 0), math.nan, found, observed)
    a, b = known.read(control, min_matches), known.read(treatment, min_matches)
    if known.kind == "share":
        (k_a, n_a), (_, n_b) = a, b
        share = k_a / n_a if n_a else math.nan
        found = detectable_proportion_difference(share if n_a else 0.0, n_a, n_b, alpha=ALPHA, power=POWER)
        return _row(quantity, unit, (n_a, n_b), share, found, observed)
    spread = _pooled_sd(a, b) if min(len(a), len(b)) > 1 else math.nan
    found = detectable_mean_difference(spread, len(a), len(b), alpha=ALPHA, power=POWER)
    return _row(quantity, unit, (len(a), len(b)), spread, found, observed)


def _between_saes(row: pd.Series[Any], values: Sequence[FloatArray], n_declared: int) -> dict[str, Any]:
    """SAEs as units, at the level that Holm's correction requires of the only quantity that differs."""
    n_a, n_b = map(len, values)
    spread = _pooled_sd(*values)
    at = ALPHA / n_declared
    found = detectable_few_means(spread, n_a, n_b, alpha=at, power=POWER)
    if row["unit"] == "share" and found.difference > 1:
        why = "even a difference of 100 percentage points would not be found: too few SAEs show how much SAEs differ"
        found = Detectable(math.nan, math.nan, found.n, found.method, why)
    return _row(row["quantity"], str(row["unit"]), (n_a, n_b), spread, found, float(row["estimate"])) | {"alpha": at}


def _single_features(name: str, arm: ArmTables, alpha: float) -> list[dict[str, Any]]:
    """How strongly a single feature must act: alone, and when it is the only one among those tested."""
    if arm.interventions is None or arm.effects is None:
        return []
    tested = arm.effects[arm.effects["p"].notna()]
    pairs = steered_minus_placebo(arm)
    features, prompts = (pairs.index.get_level_values(level).to_numpy() for level in ("feature", "prompt"))
    values = pairs.to_numpy(dtype=np.float64)
    units = [independent_values(values[features == one], prompts[features == one]) for one in np.unique(features)]
    spreads = np.array([np.std(unit, ddof=1) for unit in units if len(unit) > 1])
    spread = float(np.sqrt((spreads**2).mean())) if len(spreads) else math.nan
    n = int(np.median([len(unit) for unit in units])) if len(tested) and units else 0
    observed = float(tested["effect"].median()) if len(tested) else math.nan
    rows = []
    only = f"only feature of {len(tested)} in {name}", alpha / max(1, len(tested))
    for test, at in ((f"feature in {name}", alpha), only):
        found = detectable_paired_mean(spread, n, alpha=at, power=POWER)
        smallest = 0.5**n if n <= _EXACT else 1 / (_FLIPS + 1)
        if not found.reason and smallest > at:
            why = f"with {n} prompts or pairs the smallest p is {smallest:.2g}, and {at:.2g} is asked"
            found = Detectable(math.nan, math.nan, n, found.method, why)
        rows.append(_row(test, "cosine similarity", (n, n), spread, found, observed) | {"alpha": at})
    return rows


def _row(test: str, unit: str, n: tuple[int, int], spread: float, found: Detectable, observed: float) -> dict[str, Any]:
    return {
        "test": test,
        "unit": unit,
        "n_a": n[0],
        "n_b": n[1],
        "spread": spread,
        "alpha": ALPHA,
        "power": POWER,
        "detectable": found.difference,
        "detectable_below": found.low_side,
        "observed": observed,
        "method": found.method,
        "reason": found.reason,
    }


def _pooled_sd(*sides: FloatArray) -> float:
    """Standard deviation within either side; a side of one value shows none, and adds none."""
    freedom = sum(map(len, sides)) - 2
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in sides if len(side))
    return math.sqrt(squares / freedom) if freedom > 0 else math.nan
