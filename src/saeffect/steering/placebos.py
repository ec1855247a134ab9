"""Placebos: pushes of equal size, along random directions or along features outside the domain."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import ConfigError

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
    "redraw_directions",
]

UNSTEERED = "unsteered"
STEERED = "steered"
SHUFFLED = "shuffled"
"""The control that needs no texts: the same texts, measured against another feature's top tokens."""


class DrawDirection(Protocol):
    """Returns the unit vector that replaces a decoder row, float32 `[d_model]`; a function of its arguments alone: the
    row, the study's seed, the feature (or number of the set) that it is a placebo of, and, for trials, `draw` =
    (prompt, sample).
    """

    def __call__(self, row: Tensor, *, seed: int, feature: int, draw: tuple[int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Placebo:
    """A kind of placebo: a drawn direction, or other features of the SAE.

    Attributes:
        name: In study files; also the condition of its trials.
        label: What reports call one of them.
        direction: How its direction is drawn; None if it takes other features.
        column: Of the feature table: each feature's placebo features, nearest first, used in turn over prompts and
            samples.
    """

    name: str
    label: str
    direction: DrawDirection | None = None
    column: str = ""

    def __post_init__(self) -> None:
        if (self.direction is None) != bool(self.column):
            raise ConfigError(f"placebo {self.name!r} must have either a direction or a column.")


PLACEBOS: dict[str, Placebo] = {
    placebo.name: placebo
    for placebo in (
        Placebo("random", "random direction", direction=lambda row, **trial: random_direction(len(row), **trial)),
        Placebo("matched", "matched placebo", column="matched"),
    )
}
"""Every kind of placebo by name; study files, trials, tests and reports use new entries too."""

BASELINES = {"prompt": "prompt that names it", "mean_difference": "difference of means"}
"""Alternatives that steering must beat, with their names in reports; see `run_baselines`."""


def control_label(name: str) -> str:
    """Report label of a placebo, the shuffled reference or a baseline; the name itself if it is not registered."""
    if name in PLACEBOS:
        return PLACEBOS[name].label
    return BASELINES.get(name, "shuffled reference" if name == SHUFFLED else name.replace("_", " "))


def random_direction(d_model: int, *, seed: int, feature: int, draw: tuple[int, ...] = ()) -> Tensor:
    """A direction uniform on the sphere, float32 `[d_model]`, of norm 1; see `DrawDirection`. Draw one per trial."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, feature, len(draw), *draw]))
    normal = rng.standard_normal(d_model)
    return torch.from_numpy((normal / np.linalg.norm(normal)).astype(np.float32))


def redraw_directions(
    rows: Tensor, direction: DrawDirection, *, seed: int, feature: int, draw: tuple[int, ...] = ()
) -> Tensor:
    """Randomly drawn vectors with the lengths and mutual angles of `rows` `[n, d_model]`."""
    if len(rows) == 1:
        return direction(rows[0], seed=seed, feature=feature, draw=draw)[None] * rows.norm()
    drawn = [direction(row, seed=seed, feature=feature, draw=(*draw, i)) for i, row in enumerate(rows[: rows.shape[1]])]
    # rows = triangle.T @ frame.T: with another frame all lengths and angles stay.
    triangle = torch.linalg.qr(rows.double().T).R
    frame = torch.linalg.qr(torch.stack(drawn).double().T).Q
    return (triangle.T @ frame.T).float()


_MATCHED_ON = ("decoder_norm", "density", "mean_activation")


def matched_features(
    features: pd.DataFrame, chosen: Sequence[int], domain: Collection[int], *, n: int = 4
) -> pd.DataFrame:
    """The `n` features outside the domain (fewer if no more are similar) that are nearest to each chosen one.

    Distance is Euclidean over the logarithms of decoder norm, density and mean activation, each divided by its standard
    deviation over all features. Features that never fired are matched with one another. One feature may be the placebo
    of several. `features` needs these columns and feature; `domain` holds all domain features. One
    row per chosen feature and rank: feature, rank (from 0, nearest first; ties by number), placebo, distance (in
    standard deviations).
    """
    table = features.set_index("feature").sort_index()
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
    """Standardised logarithms `[d_sae, 3]`, 0 where they are undefined or all equal."""
    columns = []
    for name in _MATCHED_ON:
        values = table[name].to_numpy(dtype=np.float64)
        positive = (values > 0) & np.isfinite(values)
        logs = np.zeros(len(values))
        logs[positive] = np.log(values[positive])
        spread = logs[positive].std() if positive.any() else 0.0
        # Unit decoder rows differ by rounding only.
        columns.append(np.where(positive, logs, 0.0) / spread if spread > 1e-6 else np.zeros(len(values)))
    return np.stack(columns, axis=1)
