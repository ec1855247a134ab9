"""When may a difference be credited to fine-tuning? One rule, for three quantities fixed in advance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

__all__ = ["PRIMARY", "Gap", "Judgement", "Status", "exceeds_noise", "judge"]

PRIMARY = ("domain_share", "pass_rate", "coherence_mean")
"""The quantities of the headline, fixed before seeing data; all else in the contrasts is exploration."""

_MARGIN = 3.0

Status = Literal["undefined", "unclear", "unseparated", "noise", "beyond"]


@dataclass(frozen=True)
class Gap:
    """A difference of arm `b` from arm `a` with its interval; NaN where undefined, and `reason` says why."""

    a: str
    b: str
    estimate: float
    low: float
    high: float
    unit: str
    reason: str = ""

    @property
    def defined(self) -> bool:
        """Whether it has an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def sign(self) -> int:
        """1 or -1 when the interval lies wholly above or below zero, else 0."""
        if not self.defined:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Judgement:
    """What can be said about one quantity.

    Attributes:
        quantity: Its name in the contrasts.
        status: "undefined": no interval. "unclear": the interval of treatment minus control includes zero.
            "unseparated": it does not, but no placebo can tell fine-tuning from SAE noise. "noise": a placebo
            moves as far, or is not clearly apart from the treatment, or the interval over SAE seeds includes zero.
            "beyond": more than SAE noise.
        change: Treatment minus control.
        retraining: Placebo minus control, each placebo.
        beyond: Treatment minus placebo, each placebo.
        seeds: All SAEs of the treatment's model minus all of the control's, with an interval that holds the noise
            of SAE training; None unless both models have several.
    """

    quantity: str
    status: Status
    change: Gap
    retraining: tuple[Gap, ...]
    beyond: tuple[Gap, ...]
    seeds: Gap | None = None


def exceeds_noise(change: Gap, retraining: Sequence[Gap], beyond: Sequence[Gap]) -> bool:
    """Whether treatment minus control is more than SAE noise.

    For every placebo arm three things must hold. The interval of treatment minus control excludes zero; that
    of treatment minus placebo does so on the same side; and the change is larger than the placebo's, or three
    times as large if the placebo's own interval excludes zero: then SAEs of different seeds differ by more
    than the intervals know, and the placebo is the only measure of how much.

    If fine-tuning did nothing, a quantity passes in 0.9 % of studies with one placebo, as long as seeds add
    nothing to the noise between features. It gets worse the more they add: up to 19 % with one placebo, 7 %
    with two and 4 % with three (simulated with normal arms, over all ratios of the two kinds of noise).

    Args:
        change: Treatment minus control.
        retraining: Placebo minus control, each placebo.
        beyond: Treatment minus placebo, in the same order.
    """
    return change.sign != 0 and all(
        apart.sign == change.sign and abs(change.estimate) > (_MARGIN if noise.sign else 1.0) * abs(noise.estimate)
        for noise, apart in zip(retraining, beyond, strict=True)
    )


def judge(contrasts: pd.DataFrame, quantity: str) -> Judgement:
    """Judge one quantity by the contrasts, as `exceeds_noise` rules.

    Where both models have several SAEs, the interval over these must exclude zero on the same side, too; it also
    stands in for a placebo arm where there is none.

    Args:
        contrasts: The table of `saeffect.comparison.contrasts`.
        quantity: A value of its column `quantity`.
    """
    rows = contrasts[contrasts["quantity"] == quantity]
    change = _gaps(rows, "fine-tuning")[0]
    retraining, beyond = _gaps(rows, "retraining"), _gaps(rows, "beyond retraining")
    seeds = _over_seeds(contrasts, quantity)
    status: Status
    if not change.defined:
        status = "undefined"
    elif change.sign == 0:
        status = "unclear"
    elif (not retraining and seeds is None) or not all(gap.defined for gap in (*retraining, *beyond)):
        status = "unseparated"
    elif exceeds_noise(change, retraining, beyond) and (seeds is None or seeds.sign == change.sign):
        status = "beyond"
    else:
        status = "noise"
    return Judgement(quantity, status, change, retraining, beyond, seeds)


def _over_seeds(contrasts: pd.DataFrame, quantity: str) -> Gap | None:
    rows = contrasts[contrasts["quantity"] == f"{quantity}_seeds"]
    found = _gaps(rows, "all seeds")
    several = found and bool((rows.loc[rows["comparison"] == "all seeds", ["saes_a", "saes_b"]] > 1).all(axis=None))
    return found[0] if several and found[0].defined else None


def _gaps(rows: pd.DataFrame, comparison: str) -> tuple[Gap, ...]:
    chosen = rows[rows["comparison"] == comparison]
    return tuple(
        Gap(str(a), str(b), float(estimate), float(low), float(high), str(unit), str(reason))
        for a, b, estimate, low, high, unit, reason in zip(
            *(chosen[column] for column in ("a", "b", "estimate", "low", "high", "unit", "reason")),
            strict=True,
        )
    )
