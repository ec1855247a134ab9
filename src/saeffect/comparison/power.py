"""The smallest true differences that the tests of this study detect with 80 % power."""

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
# A feature's sign-flip test is exact up to so many pairs; above, it draws so many random patterns.
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
    """The smallest difference between treatment and control that each declared test would detect.

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
        pair = arms[roles.control], arms[roles.treatment]
        rows.append(_between_features(quantity, observed.iloc[0], *pair, min_matches))
        seed_rows = contrasts[(contrasts["quantity"] == f"{quantity}_seeds") & (contrasts["comparison"] == ALL_SEEDS)]
        if not seed_rows.empty:
            sides = control_saes(arms, roles), arms[roles.treatment].saes
            values = [np.array([sae_value(quantity, sae, min_matches) for sae in saes]) for saes in sides]
            rows.append(_between_saes(seed_rows.iloc[0], [side[~np.isnan(side)] for side in values], n_declared))
    for name in roles.ordered:
        rows += _single_features(name, arms[name], alpha)
    return pd.DataFrame(rows, columns=[*_COLUMNS, "method", "reason"])


def _between_features(
    quantity: str, row: pd.Series[Any], control: ArmTables, treatment: ArmTables, min_matches: int
) -> dict[str, Any]:
    definition, unit, observed = QUANTITIES.get(quantity), str(row["unit"]), float(row["estimate"])
    if definition is None or definition.kind not in ("share", "mean", "count mean"):
        result = Detectable(math.nan, math.nan, 0, "", "its power is not worked out: it is neither a share nor a mean")
        return _row(quantity, unit, (0, 0), math.nan, result, observed)
    a, b = definition.read(control, min_matches), definition.read(treatment, min_matches)
    if definition.kind == "share":
        (k_a, n_a), (_, n_b) = a, b
        share = k_a / n_a if n_a else math.nan
        result = detectable_proportion_difference(share if n_a else 0.0, n_a, n_b, alpha=ALPHA, power=POWER)
        return _row(quantity, unit, (n_a, n_b), share, result, observed)
    spread = _pooled_sd(a, b) if min(len(a), len(b)) > 1 else math.nan
    result = detectable_mean_difference(spread, len(a), len(b), alpha=ALPHA, power=POWER)
    return _row(quantity, unit, (len(a), len(b)), spread, result, observed)


def _between_saes(row: pd.Series[Any], values: Sequence[FloatArray], n_declared: int) -> dict[str, Any]:
    """SAEs as units, at Holm's level for the only declared quantity that differs."""
    n_a, n_b = map(len, values)
    spread = _pooled_sd(*values)
    level = ALPHA / n_declared
    result = detectable_few_means(spread, n_a, n_b, alpha=level, power=POWER)
    if row["unit"] == "share" and result.difference > 1:
        reason = "even a difference of 100 percentage points would not be found: too few SAEs show how much SAEs differ"
        result = Detectable(math.nan, math.nan, result.n, result.method, reason)
    return _row(row["quantity"], str(row["unit"]), (n_a, n_b), spread, result, float(row["estimate"])) | {
        "alpha": level
    }


def _single_features(name: str, arm: ArmTables, alpha: float) -> list[dict[str, Any]]:
    """The smallest detectable effect of a feature: tested alone, and as the only true effect among those tested."""
    if arm.interventions is None or arm.effects is None:
        return []
    tested = arm.effects[arm.effects["p"].notna()]
    pairs = steered_minus_placebo(arm)
    units = [
        independent_values(values, values.index.get_level_values("prompt"))
        for _, values in pairs.groupby(level="feature")
    ]
    spreads = np.array([np.std(unit, ddof=1) for unit in units if len(unit) > 1])
    spread = float(np.sqrt((spreads**2).mean())) if len(spreads) else math.nan
    n = int(np.median([len(unit) for unit in units])) if len(tested) and units else 0
    observed = float(tested["effect"].median()) if len(tested) else math.nan
    rows = []
    corrected = f"only feature of {len(tested)} in {name}", alpha / max(1, len(tested))
    for test, level in ((f"feature in {name}", alpha), corrected):
        result = detectable_paired_mean(spread, n, alpha=level, power=POWER)
        smallest = 0.5**n if n <= _EXACT else 1 / (_FLIPS + 1)
        if not result.reason and smallest > level:
            reason = f"with {n} prompts or pairs the smallest p is {smallest:.2g}, and {level:.2g} is asked"
            result = Detectable(math.nan, math.nan, n, result.method, reason)
        rows.append(_row(test, "cosine similarity", (n, n), spread, result, observed) | {"alpha": level})
    return rows


def _row(
    test: str, unit: str, n: tuple[int, int], spread: float, result: Detectable, observed: float
) -> dict[str, Any]:
    return {
        "test": test,
        "unit": unit,
        "n_a": n[0],
        "n_b": n[1],
        "spread": spread,
        "alpha": ALPHA,
        "power": POWER,
        "detectable": result.difference,
        "detectable_below": result.low_side,
        "observed": observed,
        "method": result.method,
        "reason": result.reason,
    }


def _pooled_sd(*sides: FloatArray) -> float:
    """Pooled standard deviation within the sides; a side of one value adds none."""
    freedom = sum(map(len, sides)) - 2
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in sides if len(side))
    return math.sqrt(squares / freedom) if freedom > 0 else math.nan
