"""How many more features were kept, moved, lost or added than a second seed of the same model shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from saeffect.comparison.resampling import LEVEL, Resampling, undefined
from saeffect.stats.arguments import FloatArray
from saeffect.stats.estimate import Estimate

__all__ = ["excess_paired", "excess_unpaired"]

BoolArray = npt.NDArray[np.bool_]


def excess_paired(own: BoolArray, placebos: BoolArray, resampling: Resampling, name: str) -> Estimate:
    """By how many more features something holds for the treatment than for the placebo, same features.

    Features are resampled with what all SAEs show for them. With several placebos their seeds are resampled
    too, and the treatment's own seed is given the noise of a placebo's; with one, the interval knows nothing
    of differences between whole SAEs.

    Args:
        own: bool [n], whether it holds for each feature in the treatment.
        placebos: bool [n_placebos, n].
        resampling: Seed and number of resamples.
        name: Names this number; gives it a random stream of its own.

    Returns:
        Count in the treatment minus the mean count in the placebos, with a 95 % percentile interval.

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
    return _estimate(value, drawn[:, 0], drawn[:, 1:], n, rng)


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
    return _estimate(value, mine, theirs, n, rng)


def _estimate(value: float, own: FloatArray, placebos: FloatArray, n: int, rng: np.random.Generator) -> Estimate:
    """Interval from resampled counts [n_boot] and [n_boot, n_placebos]."""
    n_boot, n_placebos = placebos.shape
    mean = placebos.mean(axis=1)
    replicates = own - mean
    if n_placebos > 1:
        # A mean of few seeds, resampled, spreads too little by this factor.
        widen = math.sqrt(n_placebos / (n_placebos - 1))
        weights = rng.multinomial(n_placebos, np.full(n_placebos, 1 / n_placebos), size=n_boot) / n_placebos
        own_seed = placebos[np.arange(n_boot), rng.integers(0, n_placebos, size=n_boot)] - mean
        replicates += widen * (own_seed - ((placebos * weights).sum(axis=1) - mean))
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), n)
