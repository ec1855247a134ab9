"""Placebo features: ordinary features that resemble a domain feature in everything but their subject.

A random direction is one that no SAE ever wrote; a model may react to it less than to any feature. A feature
that is not of the domain, with a decoder row as long, firing as often and as strongly, is the fairer placebo.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.errors import ConfigError, EmptySelection, ShapeMismatch

__all__ = ["matched_features", "matched_lists"]

_COLUMNS = ("decoder_norm", "density", "mean_activation")


def matched_features(
    features: pd.DataFrame, chosen: Sequence[int], domain: Collection[int], *, n: int = 4, fewer: bool = False
) -> pd.DataFrame:
    """The features outside the domain that are nearest to each chosen one.

    Distance is Euclidean over the logarithms of decoder norm, density and mean activation, each divided by its
    standard deviation over all features; so a factor of two counts alike wherever it is. Features that never
    fired have no mean activation and are matched with one another. One feature may be the placebo of several.

    Args:
        features: The feature table of the arm: feature, decoder_norm, density, mean_activation.
        chosen: Features to be steered.
        domain: All domain features of the arm: none of them is a placebo.
        n: Placebos a feature.
        fewer: Whether a feature that fewer resemble gets so many, or none, rather than be refused.

    Returns:
        One row per chosen feature and rank: feature, rank (from 0, nearest first), placebo, distance (in
        standard deviations). Ties go to the lower number.

    Raises:
        ShapeMismatch: A column is missing, or a chosen feature is not in the table.
        EmptySelection: Fewer than `n` features that could be placebos, of those that fire or of those that do not,
            and not `fewer`.
        ConfigError: `n` is below 1.

    Example:
        >>> table = pd.DataFrame({"feature": range(4), "decoder_norm": 1.0,
        ...                       "density": [0.1, 0.2, 0.01, 0.1], "mean_activation": 2.0})
        >>> matched_features(table, [0], domain=[0, 3], n=2)["placebo"].tolist()
        [1, 2]
    """
    found = _ranked(features, chosen, domain, n)
    for feature, (placebos, _, fires) in found.items():
        if len(placebos) < n and not fewer:
            raise EmptySelection(
                f"feature {feature} {'fires' if fires else 'never fires'}, and so do(es) only"
                f" {len(placebos)} feature(s) outside the domain; {n} are needed.",
                at="placebos",
                fix="use random directions as placebos, or ask for fewer.",
            )
    rows = [
        (feature, rank, placebo, distance)
        for feature, (placebos, distances, _) in found.items()
        for rank, (placebo, distance) in enumerate(zip(placebos, distances, strict=True))
    ]
    return pd.DataFrame(rows, columns=["feature", "rank", "placebo", "distance"])


def matched_lists(
    features: pd.DataFrame, chosen: Sequence[int], domain: Collection[int], *, n: int = 4
) -> list[list[int]]:
    """As `matched_features`, for the column matched of the features to be steered.

    Returns:
        For each chosen feature at most `n` placebos, nearest first: fewer, or none, where no more resemble it.

    Raises:
        ShapeMismatch: A column is missing, or a chosen feature is not in the table.
        ConfigError: `n` is below 1.

    Example:
        >>> table = pd.DataFrame({"feature": range(3), "decoder_norm": 1.0,
        ...                       "density": [0.1, 0.0, 0.2], "mean_activation": [2.0, float("nan"), 2.0]})
        >>> matched_lists(table, [0, 1], domain=[0, 1])  # no other feature never fires
        [[2], []]
    """
    found = _ranked(features, chosen, domain, n)
    return [found[int(feature)][0] for feature in chosen]


def _ranked(
    features: pd.DataFrame, chosen: Sequence[int], domain: Collection[int], n: int
) -> dict[int, tuple[list[int], list[float], bool]]:
    """For each chosen feature its placebos, nearest first, their distances, and whether it fires."""
    if n < 1:
        raise ConfigError(f"each feature needs at least one placebo. Got n={n}.", at="placebos")
    missing = [name for name in ("feature", *_COLUMNS) if name not in features]
    if missing:
        raise ShapeMismatch(f"the feature table lacks the column(s) {', '.join(missing)}.", at="features")
    table = features.set_index("feature").sort_index()
    unknown = [f for f in chosen if f not in table.index]
    if unknown:
        raise ShapeMismatch(f"feature {unknown[0]} is not in the table.", at="chosen")
    place, fires = _coordinates(table)
    position = {int(f): i for i, f in enumerate(table.index)}
    allowed = ~table.index.isin(list(domain)) & (table["decoder_norm"].to_numpy(dtype=np.float64) > 0)
    found = {}
    for feature in chosen:
        at = position[int(feature)]
        candidates = np.flatnonzero(allowed & (fires == fires[at]) & (np.arange(len(table)) != at))
        distance = np.sqrt(np.square(place[candidates] - place[at]).sum(axis=1))
        nearest = np.argsort(distance, kind="stable")[:n]
        placebos = [int(f) for f in table.index[candidates[nearest]]]
        found[int(feature)] = (placebos, distance[nearest].tolist(), bool(fires[at]))
    return found


def _coordinates(table: pd.DataFrame) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Standardised logarithms `[d_sae, 3]`, 0 where there is nothing to compare; and who fires at all."""
    fires = (table["density"] > 0).to_numpy()
    columns = []
    for name in _COLUMNS:
        values = table[name].to_numpy(dtype=np.float64)
        known = (values > 0) & np.isfinite(values)
        logs = np.zeros(len(values))
        logs[known] = np.log(values[known])
        spread = logs[known].std() if known.any() else 0.0
        # Unit decoder rows differ by rounding alone, which is no difference between features.
        columns.append(np.where(known, logs, 0.0) / spread if spread > 1e-6 else np.zeros(len(values)))
    return np.stack(columns, axis=1), fires
