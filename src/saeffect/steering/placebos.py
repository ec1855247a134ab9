"""What steering with a feature is compared with: no steering, and placebos that should do nothing in particular.

Any push of that size changes the text. A placebo of equal norm shows how much of the change comes from being
pushed at all; only what the feature does beyond that is the feature's effect. A random direction is one that no SAE
ever wrote; a model may react to it less than to any feature. A feature that is not of the domain, with a decoder row as
long, firing as often and as strongly, is the fairer placebo.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch

__all__ = [
    "BASELINES",
    "PLACEBOS",
    "SHUFFLED",
    "STEERED",
    "UNSTEERED",
    "DrawDirection",
    "Placebo",
    "control_label",
    "matched_features",
    "random_direction",
    "turned",
]

UNSTEERED = "unsteered"
STEERED = "steered"
SHUFFLED = "shuffled"
"""The control that needs no texts: the same texts, measured against another feature's top tokens."""


class DrawDirection(Protocol):
    """Gives the direction that stands in for a decoder row, float32 `[d_model]`, of norm 1.

    It depends on the arguments alone, so that order does not matter: the row, the study's seed, the feature (or number
    of the set) that it is the placebo of, and which of its placebos, for trials (prompt, sample).
    """

    def __call__(self, row: Tensor, *, seed: int, feature: int, draw: tuple[int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Placebo:
    """A kind of placebo, which either draws a direction or pushes other features of the SAE.

    Attributes:
        name: What study files call it, and the condition of its trials.
        label: What reports call one of them.
        direction: How its direction is drawn; None if it takes other features.
        column: The column of the feature table that lists each feature's placebo features, nearest first. Prompts and
            samples take turns, so that no single placebo decides all pairs of a feature.
    """

    name: str
    label: str
    direction: DrawDirection | None = None
    column: str = ""

    def __post_init__(self) -> None:
        if (self.direction is None) != bool(self.column):
            raise ConfigError(f"placebo {self.name!r} must have either a direction or a column.")


def _random(row: Tensor, *, seed: int, feature: int, draw: tuple[int, ...]) -> Tensor:
    return random_direction(len(row), seed=seed, feature=feature, draw=draw)


PLACEBOS: dict[str, Placebo] = {
    placebo.name: placebo
    for placebo in (
        Placebo("random", "random direction", direction=_random),
        Placebo("matched", "matched placebo", column="matched"),
    )
}
"""Every kind of placebo by name; a new entry is known to study files, trials, tests and reports."""

BASELINES = {"prompt": "prompt that names it", "mean_difference": "difference of means"}
"""What steering must beat to be worth it: name, and what reports call it. See `run_baselines`."""


def control_label(name: str) -> str:
    """What reports call a placebo, the shuffled reference or a baseline; the name itself where it is not registered."""
    if name in PLACEBOS:
        return PLACEBOS[name].label
    return BASELINES.get(name, "shuffled reference" if name == SHUFFLED else name.replace("_", " "))


def random_direction(d_model: int, *, seed: int, feature: int, draw: tuple[int, ...] = ()) -> Tensor:
    """A direction uniform on the sphere, float32 `[d_model]`, of norm 1; arguments as in `DrawDirection`.

    A fresh direction per trial makes the placebo's mean that of random directions at large; one for all trials would
    add the same error to every difference of a feature, and no number of samples would average it out.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, feature, len(draw), *draw]))
    normal = rng.standard_normal(d_model)
    return torch.from_numpy((normal / np.linalg.norm(normal)).astype(np.float32))


def turned(rows: Tensor, direction: DrawDirection, *, seed: int, feature: int, draw: tuple[int, ...] = ()) -> Tensor:
    """Directions as long as `rows` `[n, d_model]`, at the same angles to each other, but pointing where they are drawn.

    Whatever is pushed along several features at once, the same amounts along these go equally far.
    """
    if len(rows) == 1:
        return direction(rows[0], seed=seed, feature=feature, draw=draw)[None] * rows.norm()
    drawn = [direction(row, seed=seed, feature=feature, draw=(*draw, i)) for i, row in enumerate(rows[: rows.shape[1]])]
    # rows = triangle.T @ frame.T: another frame, drawn anew, keeps all lengths and angles.
    triangle = torch.linalg.qr(rows.double().T).R
    frame = torch.linalg.qr(torch.stack(drawn).double().T).Q
    return (triangle.T @ frame.T).float()


_MATCHED_ON = ("decoder_norm", "density", "mean_activation")


def matched_features(
    features: pd.DataFrame, chosen: Sequence[int], domain: Collection[int], *, n: int = 4
) -> pd.DataFrame:
    """The features outside the domain that are nearest to each chosen one.

    Distance is Euclidean over the logarithms of decoder norm, density and mean activation, each divided by its
    standard deviation over all features. Features that never fired have no mean activation and are matched with one
    another. One feature may be the placebo of several.

    Args:
        features: The feature table of the arm: feature, decoder_norm, density, mean_activation.
        chosen: Features to be steered.
        domain: All domain features of the arm: none of them is a placebo.
        n: Placebos a feature; fewer, or none, where no more resemble it.

    Returns:
        One row per chosen feature and rank: feature, rank (from 0, nearest first), placebo, distance (in
        standard deviations). Ties go to the lower number.

    Raises:
        ShapeMismatch: A column is missing, or a chosen feature is not in the table.
        ConfigError: `n` is below 1.

    """
    if n < 1:
        raise ConfigError(f"each feature needs at least one placebo. Got n={n}.", at="placebos")
    missing = [name for name in ("feature", *_MATCHED_ON) if name not in features]
    if missing:
        raise ShapeMismatch(f"the feature table lacks the column(s) {', '.join(missing)}.", at="features")
    table = features.set_index("feature").sort_index()
    unknown = [f for f in chosen if f not in table.index]
    if unknown:
        raise ShapeMismatch(f"feature {unknown[0]} is not in the table.", at="chosen")
    coordinates = _coordinates(table)
    fires = (table["density"] > 0).to_numpy()
    allowed = ~table.index.isin(list(domain)) & (table["decoder_norm"].to_numpy(dtype=np.float64) > 0)
    rows = []
    for feature in chosen:
        position = table.index.get_loc(feature)
        candidates = np.flatnonzero(allowed & (fires == fires[position]) & (np.arange(len(table)) != position))
        distance = np.sqrt(np.square(coordinates[candidates] - coordinates[position]).sum(axis=1))
        for rank, nearest in enumerate(np.argsort(distance, kind="stable")[:n]):
            rows.append((int(feature), rank, int(table.index[candidates[nearest]]), float(distance[nearest])))
    return pd.DataFrame(rows, columns=["feature", "rank", "placebo", "distance"])


def _coordinates(table: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Standardised logarithms `[d_sae, 3]`, 0 where there is nothing to compare."""
    columns = []
    for name in _MATCHED_ON:
        values = table[name].to_numpy(dtype=np.float64)
        known = (values > 0) & np.isfinite(values)
        logs = np.zeros(len(values))
        logs[known] = np.log(values[known])
        spread = logs[known].std() if known.any() else 0.0
        # Unit decoder rows differ by rounding alone, which is no difference between features.
        columns.append(np.where(known, logs, 0.0) / spread if spread > 1e-6 else np.zeros(len(values)))
    return np.stack(columns, axis=1)
