"""How many more features were kept, moved, lost or added than a second seed of the same model shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from saeffect.stats.arguments import LEVEL, FloatArray, Resampling
from saeffect.stats.estimate import Estimate, undefined

__all__ = ["ONE_PLACEBO", "excess_paired", "excess_unpaired"]

BoolArray = npt.NDArray[np.bool_]
ONE_PLACEBO = "one placebo: the interval does not hold the noise of SAE training"
"""The reason beside an interval that another seed could leave."""


def excess_paired(own: BoolArray, placebos: BoolArray, resampling: Resampling, name: str) -> Estimate:
    """By how many more features something holds for the treatment than for the placebo, same features.

    Features are resampled with what all SAEs show for them. With several placebos the scatter of their counts is
    added, once for the treatment's own seed and once for their mean, and Student's t knows how few they are; with
    one, the interval knows nothing of differences between whole SAEs, and `reason` says so.

    Args:
        own: bool [n], whether it holds for each feature in the treatment.
        placebos: bool [n_placebos, n].
        resampling: Seed and number of resamples.
        name: Names this number; gives it a random stream of its own.

    Returns:
        Count in the treatment minus the mean count in the placebos, with a 95 % interval.

    Example:
        >>> excess_paired(np.array([True, True, False]), np.array([[True, False, False]]), Resampling(), "gone").value
        1.0
    """
    n = len(own)
    value = float(own.sum() - placebos.sum(axis=1).mean()) if n else math.nan
    if n < 2:
        return undefined(f"{n} features are too few for an interval", n, value)
    # A feature is known by what each SAE shows: few patterns, so a resample is one multinomial draw.
    patterns, counts = np.unique(np.vstack([own, placebos]), axis=1, return_counts=True)
    if patterns.shape[1] == 1:
        return undefined("every feature shows the same in every SAE, so there is no spread", n, value)
    rng = np.random.default_rng(resampling.seed_for("fates", name))
    drawn = rng.multinomial(n, counts / n, size=resampling.n_boot).astype(np.float64) @ patterns.T
    return _estimate(value, drawn[:, 0] - drawn[:, 1:].mean(axis=1), placebos.sum(axis=1).astype(np.float64), n)


def excess_unpaired(own: BoolArray, placebos: Sequence[BoolArray], resampling: Resampling, name: str) -> Estimate:
    """The same where each SAE has features of its own, as for new ones.

    Args:
        own: bool [n], whether it holds for each feature of the treatment.
        placebos: One such array a placebo, of any length; counts are scaled to n features.
        resampling: Seed and number of resamples.
        name: Names this number.

    Returns:
        As `excess_paired`; features are resampled in each SAE on its own.

    Example:
        >>> excess_unpaired(np.array([True, True]), [np.array([True, False, False, False])], Resampling(), "new").value
        1.5
    """
    n, sizes = len(own), np.array([len(one) for one in placebos])
    if n < 2 or sizes.min() < 2:
        return undefined(f"{min(n, int(sizes.min()))} features are too few for an interval", n)
    shares = np.array([one.mean() for one in placebos])
    value = float(own.sum() - n * shares.mean())
    if own.mean() in (0.0, 1.0) and bool(np.isin(shares, (0.0, 1.0)).all()):
        return undefined("all features of an SAE are alike, so there is no spread", n, value)
    rng = np.random.default_rng(resampling.seed_for("fates", name))
    mine = rng.binomial(n, own.mean(), size=resampling.n_boot).astype(np.float64)
    theirs = n * rng.binomial(sizes, shares, size=(resampling.n_boot, len(sizes))) / sizes
    return _estimate(value, mine - theirs.mean(axis=1), n * shares, n)


def _estimate(value: float, replicates: FloatArray, placebos: FloatArray, n: int) -> Estimate:
    """Interval from resampled differences [n_boot] and the counts of the placebos [n_placebos]."""
    from scipy.special import ndtri, stdtrit

    n_placebos = len(placebos)
    if n_placebos == 1:
        low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high), n, ONE_PLACEBO)
    of_features = float(replicates.var())
    of_seeds = float(placebos.var(ddof=1)) * (1 + 1 / n_placebos)
    # Two independent kinds of luck, each with a reach of its own: the features are many, the seeds few.
    reach = math.hypot(
        float(ndtri((1 + LEVEL) / 2)) * math.sqrt(of_features),
        float(stdtrit(n_placebos - 1, (1 + LEVEL) / 2)) * math.sqrt(of_seeds),
    )
    return Estimate(value, value - reach, value + reach, n)
