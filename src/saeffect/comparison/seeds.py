"""Contrasts whose unit is the SAE: seed, then feature, then prompt.

An interval over the features of one SAE asks what other features of that SAE would show. Train the SAE again and
all of them are others. With several SAEs a model the seeds themselves are resampled, and the interval holds that
noise. Besides the three comparisons of `contrasts` there is a fourth, "all seeds": every SAE of the fine-tuned model
against every SAE of the control's model, placebos included. Each SAE then is one number, and it decides what is
credited to fine-tuning (`judgement`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.contrasts import QUANTITIES, Contrast
from saeffect.comparison.judgement import ALL_SEEDS
from saeffect.comparison.measures import (
    FloatArray,
    activity_of,
    coherence_of,
    match_counts_of,
    sae_value,
    steered_minus_placebo,
)
from saeffect.stats.nested import NestedMean, nested_mean, nested_mean_difference, nested_mean_test
from saeffect.stats.resampling import LEVEL, Resampling
from saeffect.stats.student import cautious_difference, cautious_difference_test

__all__ = ["SEED_QUANTITIES", "all_saes_contrast", "control_saes", "seed_contrasts"]

_METHOD = "bootstrap of SAE seeds (t below 20), Welch's test of SAE means"
_ALL_METHOD = "one number an SAE: the wider of Student's and Welch's t intervals, and the larger p"
# Numbers of a whole SAE; the others are of a pair of SAEs, or say the same once more.
_OF_A_PAIR = ("coherence_normalised", "coherence_delta")
_OF_AN_SAE = tuple(name for name in QUANTITIES if not name.endswith(("_ratio", "_change")) and name not in _OF_A_PAIR)


def _shares(arm: ArmTables) -> FloatArray:
    # In the order of the numbers, as all that is resampled: the order of a table's rows must not change an interval.
    return arm.selection.sort_values("feature")["is_domain"].to_numpy(dtype=np.float64)


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
"""Quantities that get rows over SAE seeds, called `<quantity>_seeds`, in every comparison of arms."""

_KINDS = {
    **{name: (one.label, one.unit) for name, one in _OF_FEATURES.items()},
    "share_dot": ("Share of features with vocabulary tokens, dot product", "share"),
    "share_cosine": ("Share of features with vocabulary tokens, cosine", "share"),
    "pass_rate": ("Share of tested features that pass against placebo", "share"),
    "paper_pass_rate": ("Share of tested features that pass by the paper's rule", "share"),
    "coherence_median": ("Median coherence of domain features", "coherence"),
    "weight_mean": ("Mean of the top-token weights", "weight"),
    "weight_variance": ("Variance of the top-token weights", "weight squared"),
    "effect": ("Mean effect of steering beyond placebo", "cosine similarity"),
    "direct_effect": ("Mean direct effect beyond placebo", "nats"),
}
"""Label and unit of each quantity of a whole SAE."""


def control_saes(arms: Mapping[str, ArmTables], roles: Roles) -> list[ArmTables]:
    """Every SAE of the control's model: the control's, the placebos', and their further seeds."""
    return [sae for name in (roles.control, *roles.placebos) for sae in arms[name].saes]


def seed_contrasts(
    arms: Mapping[str, ArmTables], roles: Roles, *, min_matches: int, resampling: Resampling
) -> list[Contrast]:
    """Rows over SAE seeds; none for two SAEs in all.

    Every SAE counts alike, whatever the number of its features. With (treatment - control) - (placebo - control)
    the control cancels: "beyond retraining" is treatment against placebo. Where no arm has more than one SAE, only
    "all seeds" is left: the treatment's against the control's and the placebos'.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        min_matches: As of `contrasts`.
        resampling: Seed and number of resamples.

    Returns:
        Rows as of `contrasts`. Where a side has a single SAE the row's `remark` says what that means: its interval
        does not hold the noise of SAE training, or, for "all seeds", takes it to be that of the other side.
    """
    saes = {name: arms[name].saes for name in roles.ordered}
    control, treatment = saes[roles.control], saes[roles.treatment]
    known = control_saes(arms, roles)
    if len(known) + len(treatment) < 3:
        return []
    pairs = []
    if any(len(found) > 1 for found in saes.values()):
        pairs.append(("fine-tuning", control, treatment))
        for name in roles.placebos:
            pairs += [("retraining", control, saes[name]), ("beyond retraining", saes[name], treatment)]
    rows = [_row(comparison, quantity, a, b, resampling) for comparison, a, b in pairs for quantity in SEED_QUANTITIES]
    return rows + [all_saes_contrast(quantity, known, treatment, min_matches=min_matches) for quantity in _OF_AN_SAE]


def all_saes_contrast(quantity: str, a: Sequence[ArmTables], b: Sequence[ArmTables], *, min_matches: int) -> Contrast:
    """Every SAE of one model against every SAE of another, each of them one number.

    Args:
        quantity: As in the contrasts.
        a: SAEs of the one model, first the arm's own.
        b: SAEs of the other.
        min_matches: As of `contrasts`.

    Returns:
        The row `<quantity>_seeds` of the comparison "all seeds"; NaN with a reason where fewer than three SAEs have
        such a number, or where the SAEs of either side are all alike.
    """
    values = [np.array([sae_value(quantity, sae, min_matches) for sae in saes]) for saes in (a, b)]
    without = [sae.name for side, saes in zip(values, (a, b), strict=True)
               for value, sae in zip(side, saes, strict=True) if np.isnan(value)]  # fmt: skip
    known = [side[~np.isnan(side)] for side in values]
    estimate = cautious_difference(known[0], known[1], level=LEVEL)
    kind = _KINDS.get(quantity, (quantity.replace("_", " "), ""))
    if kind[1] == "share":  # two shares cannot differ by more than 1
        estimate = replace(estimate, low=float(np.maximum(estimate.low, -1)), high=float(np.minimum(estimate.high, 1)))
    remarks = [f"nothing to average in {', '.join(without)}"] if without else []
    single = [saes[0].name for side, saes in zip(known, (a, b), strict=True) if len(side) == 1]
    if len(single) == 1:
        remarks.append(f"one SAE in {single[0]}: it is taken to scatter as those of the other model do")
    means = [float(side.mean()) if len(side) else float("nan") for side in known]
    return Contrast(
        quantity=f"{quantity}_seeds",
        label=f"{kind[0]}, over SAE seeds",
        comparison=ALL_SEEDS,
        a=a[0].name,
        b=b[0].name,
        value_a=means[0],
        value_b=means[1],
        estimate=estimate.value,
        low=estimate.low,
        high=estimate.high,
        p=cautious_difference_test(known[0], known[1]).p,
        method=_ALL_METHOD,
        unit=kind[1],
        reason=(remarks[0] if without and not min(map(len, known)) else estimate.reason),
        saes_a=len(known[0]),
        saes_b=len(known[1]),
        remark="; ".join(remarks),
    )


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
        effect = steered_minus_placebo(sae).groupby(level=["feature", "prompt"]).mean()
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
