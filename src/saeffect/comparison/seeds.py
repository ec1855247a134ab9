"""Contrasts whose unit is the SAE. With several SAEs a model, seeds are resampled, and intervals include the noise of
SAE training. "all seeds" compares every SAE of the fine-tuned model with every SAE of the control's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.contrasts import Contrast, compared_pairs
from saeffect.comparison.judgement import ALL_SEEDS
from saeffect.comparison.quantities import QUANTITIES, Quantity, sae_value
from saeffect.stats.arguments import Resampling
from saeffect.stats.nested import NestedMean, nested_mean, nested_mean_difference
from saeffect.stats.student import cautious_difference

__all__ = ["all_saes_contrast", "control_saes", "seed_contrasts"]

_METHOD = "bootstrap of SAE seeds (t below 20), Welch's test of SAE means"
_ALL_METHOD = "one number an SAE: the wider of Student's and Welch's t intervals, and the larger p"


def control_saes(arms: Mapping[str, ArmTables], roles: Roles) -> list[ArmTables]:
    """Every SAE of the control's model: the control's, the placebos', and their further seeds."""
    return [sae for name in (roles.control, *roles.placebos) for sae in arms[name].saes]


def seed_contrasts(
    arms: Mapping[str, ArmTables], roles: Roles, *, min_matches: int, resampling: Resampling
) -> list[Contrast]:
    """Contrasts over SAE seeds; [] for two SAEs in all.

    Every SAE has the same weight. Where no arm has several, only "all seeds" is left. Where a side has a single SAE,
    `remark` says that the interval leaves out the noise of SAE training or, for "all seeds", assumes that it equals the
    other side's.
    """
    saes = {name: arms[name].saes for name in roles.ordered}
    control, treatment = saes[roles.control], saes[roles.treatment]
    all_control = control_saes(arms, roles)
    if len(all_control) + len(treatment) < 3:
        return []
    several = any(len(arm_saes) > 1 for arm_saes in saes.values())
    pairs = compared_pairs(control, treatment, [saes[name] for name in roles.placebos]) if several else []
    nested = [
        replace(quantity, label=quantity.label.format(min_matches=min_matches))
        for quantity in QUANTITIES.values()
        if quantity.seed_values is not None
    ]
    # Shares and means over all features or domain features first, then their activity.
    nested.sort(key=lambda quantity: quantity.name in ("density", "mean_activation", "effect"))
    rows = [
        _nested_contrast(comparison, quantity, a, b, resampling) for comparison, a, b in pairs for quantity in nested
    ]
    names = [name for name, quantity in QUANTITIES.items() if not quantity.pairwise]
    return rows + [all_saes_contrast(name, all_control, treatment, min_matches=min_matches) for name in names]


def all_saes_contrast(quantity: str, a: Sequence[ArmTables], b: Sequence[ArmTables], *, min_matches: int) -> Contrast:
    """The SAEs of one model against those of another, one number an SAE, an arm's own SAE first. NaN with a reason
    if fewer than three SAEs have a value, or the values show no spread.
    """
    values = [np.array([sae_value(quantity, sae, min_matches) for sae in saes]) for saes in (a, b)]
    undefined_saes = [sae.name for side, saes in zip(values, (a, b), strict=True)
               for value, sae in zip(side, saes, strict=True) if np.isnan(value)]  # fmt: skip
    defined = [side[~np.isnan(side)] for side in values]
    estimate = cautious_difference(defined[0], defined[1])
    unit = QUANTITIES[quantity].unit
    if unit == "share":  # two shares cannot differ by more than 1
        estimate = replace(estimate, low=float(np.maximum(estimate.low, -1)), high=float(np.minimum(estimate.high, 1)))
    remarks = [f"nothing to average in {', '.join(undefined_saes)}"] if undefined_saes else []
    single = [saes[0].name for side, saes in zip(defined, (a, b), strict=True) if len(side) == 1]
    if len(single) == 1:
        remarks.append(f"one SAE in {single[0]}: it is taken to scatter as those of the other model do")
    means = [float(side.mean()) if len(side) else float("nan") for side in defined]
    return Contrast.from_estimate(
        estimate,
        quantity=f"{quantity}_seeds",
        label=f"{QUANTITIES[quantity].label.format(min_matches=min_matches)}, over SAE seeds",
        comparison=ALL_SEEDS,
        a=a[0].name,
        b=b[0].name,
        value_a=means[0],
        value_b=means[1],
        method=_ALL_METHOD,
        unit=unit,
        reason=(remarks[0] if undefined_saes and not min(map(len, defined)) else estimate.reason),
        saes_a=len(defined[0]),
        saes_b=len(defined[1]),
        remark="; ".join(remarks),
    )


def _nested_contrast(
    comparison: str, quantity: Quantity, a: Sequence[ArmTables], b: Sequence[ArmTables], resampling: Resampling
) -> Contrast:
    sides = [_mean_over_seeds(quantity, saes, resampling) for saes in (a, b)]
    (mean_a, saes_a, _), (mean_b, saes_b, _) = sides
    estimate = nested_mean_difference(mean_a, mean_b)
    single = [saes[0].name for (_, n_saes, _), saes in zip(sides, (a, b), strict=True) if n_saes == 1]
    remarks = [remark for _, _, remark in sides if remark]
    if single:
        remarks.append(f"one SAE in {' and '.join(single)}: the interval does not hold the noise of its training")
    return Contrast.from_estimate(
        estimate,
        quantity=f"{quantity.name}_seeds",
        label=f"{quantity.label}, over SAE seeds",
        comparison=comparison,
        a=a[0].name,
        b=b[0].name,
        value_a=mean_a.value,
        value_b=mean_b.value,
        method=_METHOD,
        unit=quantity.unit,
        reason="" if np.isfinite(estimate.low) else estimate.reason or "no spread",
        saes_a=saes_a,
        saes_b=saes_b,
        remark="; ".join(remarks),
    )


def _mean_over_seeds(
    quantity: Quantity, saes: Sequence[ArmTables], resampling: Resampling
) -> tuple[NestedMean, int, str]:
    """The mean over SAEs, how many have a value, and a remark on those without (but for SAEs never steered)."""
    assert quantity.seed_values is not None  # `seed_contrasts` selects by it
    if quantity.steered:
        saes = [sae for sae in saes if sae.interventions is not None] or saes
    names = [sae.name for sae in saes]
    values = {sae.name: quantity.seed_values(sae) for sae in saes}
    missing = [name for name in names if values[name].empty]
    remark = f"nothing to average in {', '.join(missing)}" if missing else ""
    used = [name for name in names if name not in missing]
    if not used:
        return NestedMean(float("nan"), np.empty(0), np.empty(0), remark), len(names), remark
    levels = [values[name].index.to_frame(index=False).assign(sae_seed=name) for name in used]
    # All levels between the SAE and the values themselves.
    outer = [level for level in values[used[0]].index.names[:-1] if level is not None]
    table = pd.concat(levels, ignore_index=True)[["sae_seed", *outer]]
    seed = resampling.seed_for(quantity.name, "seeds", *names)
    data = np.concatenate([values[name].to_numpy(dtype=np.float64) for name in used])
    return nested_mean(data, table, n_boot=resampling.n_boot, seed=seed), len(used), remark
