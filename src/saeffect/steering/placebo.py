"""Directions to steer along: a feature's own, and placebos that should do nothing in particular.

Any push of that size changes the text. A placebo of equal norm shows how much of the change comes from being
pushed at all; only what the feature does beyond that is the feature's effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeffect.errors import BadFile, EmptySelection, Undefined, unknown_name

__all__ = ["PLACEBOS", "STEERED", "UNSTEERED", "Directions", "random_direction", "turned_at_random"]

UNSTEERED = "unsteered"
STEERED = "steered"
PLACEBOS = ("random", "matched")
"""Kinds of placebo; the name is the condition of its rows. For "matched" see `saeffect.steering.matched`."""


def random_direction(d_model: int, *, seed: int, feature: int, draw: tuple[int, ...] = ()) -> Tensor:
    """A direction uniform on the sphere, float32 `[d_model]`, of norm 1.

    It depends on the arguments only, so the order in which features are steered does not matter.

    Args:
        d_model: Width of the residual stream.
        seed: The study's seed.
        feature: The feature that it is the placebo of.
        draw: Which of the feature's placebos: trials use (prompt, sample). A fresh direction per trial makes
            the placebo's mean that of random directions at large; one for all would put the luck of a single
            direction into every difference of a feature, and no number of samples would average it out.

    Example:
        >>> a = random_direction(3, seed=0, feature=7)
        >>> bool((a == random_direction(3, seed=0, feature=7)).all()), round(float(a.norm()), 6)
        (True, 1.0)
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, feature, len(draw), *draw]))
    normal = rng.standard_normal(d_model)
    return torch.from_numpy((normal / np.linalg.norm(normal)).astype(np.float32))


def turned_at_random(rows: Tensor, seed: int, feature: int, draw: tuple[int, ...] = ()) -> Tensor:
    """Directions as long as the given ones, and at the same angles to each other, but pointing anywhere.

    Whatever is pushed along several features at once, the same amounts along these go equally far.

    Args:
        rows: Float32 `[n, d_model]`.
        seed: As in `random_direction`, and so are the others.
        feature: The feature, or number of the set, that they are the placebo of.
        draw: Which of its placebos.

    Returns:
        Float32 `[n, d_model]`; for a single row `random_direction` times its length.
    """
    n, d_model = rows.shape
    if n == 1:
        return random_direction(d_model, seed=seed, feature=feature, draw=draw)[None] * rows.norm()
    drawn = [random_direction(d_model, seed=seed, feature=feature, draw=(*draw, i)) for i in range(min(n, d_model))]
    # rows = triangle.T @ frame.T: another frame, drawn at random, keeps all lengths and angles.
    triangle = torch.linalg.qr(rows.double().T).R
    frame = torch.linalg.qr(torch.stack(drawn).double().T).Q
    return (triangle.T @ frame.T).float()


@dataclass(frozen=True, eq=False)
class Directions:
    """Unit directions by feature and condition.

    A number may also stand for several features at once (see `members`): its direction is that of the sum of
    their decoder rows.

    Attributes:
        W_dec: Decoder, `[d_sae, d_model]`, any float dtype.
        seed: For random placebos.
        matched: For each feature its placebo features, nearest first; trials go through them in turn. For
            several features at once each placebo is a sequence of as many features.
        members: Which features a number stands for; itself where it is missing.
    """

    W_dec: Tensor
    seed: int = 0
    matched: Mapping[int, Sequence[int] | Sequence[Sequence[int]]] = field(default_factory=dict)
    members: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def of(self, feature: int, condition: str, draw: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The SAE's features that a trial pushes: the feature's members, or those of its matched placebo.

        Raises:
            EmptySelection: "matched", and the feature has no placebo features.
        """
        if condition != "matched":
            return tuple(int(f) for f in self.members.get(feature, (feature,)))
        placebos = self.matched.get(feature, ())
        if not len(placebos):
            raise EmptySelection(
                f"feature {feature} has no matched placebo features.",
                at="placebos",
                fix="give them (see matched_features), or use random directions.",
            )
        # Prompts and samples take turns, so that no single placebo's luck is in all pairs of a feature.
        chosen: Any = placebos[sum(draw) % len(placebos)]
        return tuple(int(f) for f in chosen) if hasattr(chosen, "__len__") else (int(chosen),)

    def norm(self, feature: int) -> float:
        """Length of the feature's decoder row, or of the sum of its members' rows.

        Raises:
            BadFile: The row holds NaN or infinity.
            Undefined: The row is zero: it has no direction.
        """
        return self._length(self._row(self.of(feature, STEERED)), feature)

    def _row(self, features: tuple[int, ...]) -> Tensor:
        return self.W_dec[list(features)].detach().float().sum(dim=0)

    @staticmethod
    def _length(row: Tensor, feature: int) -> float:
        if not bool(torch.isfinite(row).all()):
            raise BadFile(f"the decoder row of feature {feature} holds NaN or infinity.", at="W_dec")
        length = float(row.norm())
        if length == 0:
            raise Undefined(
                f"the decoder row of feature {feature} is zero, so there is no direction to steer along.",
                at="W_dec",
                fix="leave this feature out.",
            )
        return length

    def unit(self, feature: int, condition: str, draw: tuple[int, ...] = ()) -> Tensor:
        """Direction of norm 1, float32 `[d_model]`, on the CPU.

        Raises:
            UnknownName: `condition` is neither "steered" nor a placebo.
            EmptySelection: "matched", and the feature has no placebo features.
        """
        if condition == "random":
            return random_direction(self.W_dec.shape[1], seed=self.seed, feature=feature, draw=draw)
        if condition not in (STEERED, *PLACEBOS):
            raise unknown_name("condition", condition, (STEERED, *PLACEBOS))
        row = self._row(self.of(feature, condition, draw))
        return row.cpu() / self._length(row, feature)
