"""Contrasts whose unit is the SAE: seed, then feature, then prompt.

An interval over the features of one SAE asks what other features of that SAE would show. Train the SAE again and
all of them are others. With several SAEs a model the seeds themselves are resampled, and the interval holds that
noise. Besides the three comparisons of `contrasts` there is a fourth, "all seeds": every SAE of the fine-tuned model
against every SAE of the control's model, placebos included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.contrasts import Contrast
from saeffect.comparison.measures import FloatArray, activity_of, coherence_of, match_counts_of, steered_minus_placebo
from saeffect.comparison.resampling import LEVEL, Resampling
from saeffect.stats.nested import NestedMean, nested_mean, nested_mean_difference, nested_mean_test

__all__ = ["ALL_SEEDS", "SEED_QUANTITIES", "control_saes", "seed_contrasts"]

ALL_SEEDS = "all seeds"
_METHOD = "bootstrap of SAE seeds (t below 20), Welch's test of SAE means"


def _shares(arm: ArmTables) -> FloatArray:
    return arm.selection["is_domain"].to_numpy(dtype=np.float64)


def _matches(arm: ArmTables) -> FloatArray:
    return match_counts_of(arm).astype(np.float64)


@dataclass(frozen=True)
class _Quantity:
    label: str
    unit: str
    values: Callable[[ArmTables], FloatArray]  # one number a feature


_OF_FEATURES: dict[str, _Quantity] = {
    "domain_share": _Quantity("Share of features that are domain features", "share", _shares),
    "coherence_mean": _Quantity("Mean coherence of domain features", "coherence", coherence_of),
    "matches_mean": _Quantity("Mean number of top tokens in the vocabulary, all features", "tokens", _matches),
    "density": _Quantity("Mean density of domain features", "share of tokens", lambda arm: activity_of(arm, "density")),
    "mean_activation": _Quantity(
        "Mean activation of domain features, where active",
        "activation",
        lambda arm: activity_of(arm, "mean_activation"),
    ),
}
SEED_QUANTITIES = (*_OF_FEATURES, "effect")
"""Quantities that get a row over SAE seeds, called `<quantity>_seeds`."""


def control_saes(arms: Mapping[str, ArmTables], roles: Roles) -> list[ArmTables]:
    """Every SAE of the control's model: the control's, the placebos', and their further seeds."""
    return [sae for name in (roles.control, *roles.placebos) for sae in arms[name].saes]


def seed_contrasts(arms: Mapping[str, ArmTables], roles: Roles, *, resampling: Resampling) -> list[Contrast]:
    """Rows over SAE seeds; none when no arm has more than one SAE.

    Every SAE counts alike, whatever the number of its features. With (treatment - control) - (placebo - control)
    the control cancels: "beyond retraining" is treatment against placebo.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        resampling: Seed and number of resamples.

    Returns:
        Rows as of `contrasts`. Where a side has a single SAE the row's `remark` says that its interval does not
        hold the noise of SAE training.
    """
    saes = {name: arms[name].saes for name in roles.ordered}
    if all(len(found) == 1 for found in saes.values()):
        return []
    control, treatment = saes[roles.control], saes[roles.treatment]
    pairs = [("fine-tuning", control, treatment)]
    for name in roles.placebos:
        pairs += [("retraining", control, saes[name]), ("beyond retraining", saes[name], treatment)]
    pairs.append((ALL_SEEDS, control_saes(arms, roles), treatment))
    return [_row(comparison, quantity, a, b, resampling) for comparison, a, b in pairs for quantity in SEED_QUANTITIES]


def _row(
    comparison: str, quantity: str, a: Sequence[ArmTables], b: Sequence[ArmTables], resampling: Resampling
) -> Contrast:
    sides = [
        _effects(saes, resampling) if quantity == "effect" else _features(quantity, saes, resampling) for saes in (a, b)
    ]
    first, second = sides[0].mean, sides[1].mean
    estimate, test = nested_mean_difference(first, second, level=LEVEL), nested_mean_test(first, second)
    defined = np.isfinite(estimate.low)
    absent = [side.absent for side in sides if side.absent]
    single = [saes[0].name for side, saes in zip(sides, (a, b), strict=True) if side.n_saes == 1]
    remarks = [*absent]
    if single:
        remarks.append(f"one SAE in {' and '.join(single)}: the interval does not hold the noise of its training")
    known = _OF_FEATURES.get(quantity)
    return Contrast(
        quantity=f"{quantity}_seeds",
        label=f"{known.label if known else 'Mean effect of steering beyond placebo'}, over SAE seeds",
        comparison=comparison,
        a=a[0].name,
        b=b[0].name,
        value_a=first.value,
        value_b=second.value,
        estimate=estimate.value,
        low=estimate.low,
        high=estimate.high,
        p=test.p,
        method=_METHOD,
        unit=known.unit if known else "cosine similarity",
        reason="" if defined else estimate.reason or "no spread",
        saes_a=sides[0].n_saes,
        saes_b=sides[1].n_saes,
        remark="; ".join(remarks),
    )


@dataclass(frozen=True, eq=False)
class _Side:
    mean: NestedMean
    n_saes: int
    absent: str


def _features(quantity: str, saes: Sequence[ArmTables], resampling: Resampling) -> _Side:
    values = [_OF_FEATURES[quantity].values(sae) for sae in saes]
    return _side(values, [pd.DataFrame(index=range(len(one))) for one in values], saes, quantity, resampling)


def _effects(saes: Sequence[ArmTables], resampling: Resampling) -> _Side:
    """Mean effect of each feature and prompt; SAEs that were not steered are left out without a word."""
    values, levels, steered = [], [], []
    for sae in saes:
        if sae.interventions is None:
            continue
        effect = steered_minus_placebo(sae.interventions).groupby(level=["feature", "prompt"]).mean()
        values.append(effect.to_numpy(dtype=np.float64))
        levels.append(effect.index.to_frame(index=False)[["feature"]])
        steered.append(sae)
    return _side(values, levels, steered or saes, "effect", resampling)


def _side(
    values: list[FloatArray],
    levels: list[pd.DataFrame],
    saes: Sequence[ArmTables],
    quantity: str,
    resampling: Resampling,
) -> _Side:
    names = [sae.name for sae in saes]
    used = [i for i, one in enumerate(values) if len(one)]
    missing = [name for i, name in enumerate(names) if i not in used]
    absent = f"nothing to average in {', '.join(missing)}" if missing else ""
    if not used:
        empty = np.empty(0)
        return _Side(NestedMean(float("nan"), empty, empty, "sae_seed", absent), len(names), absent)
    table = pd.concat(
        [levels[i].assign(sae_seed=names[i])[["sae_seed", *levels[i].columns]] for i in used], ignore_index=True
    )
    seed = resampling.seed_for(quantity, "seeds", *names)
    mean = nested_mean(np.concatenate([values[i] for i in used]), table, n_boot=resampling.n_boot, seed=seed)
    return _Side(mean, len(used), absent)
