"""When may a difference be credited to fine-tuning? One rule, for the quantities that were fixed in advance.

SAEs of one model differ by their seed alone, and by how much only several of them can show. A quantity of a whole
SAE (a share, a mean) is therefore one number, and the question is whether the treatment's SAEs lie where another SAE
of the control's model would. `noise_p` answers it; `judge` turns it into one of five readings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from saeffect.stats.multiplicity import holm
from saeffect.stats.student import cautious_difference_test

__all__ = [
    "ALL_SEEDS",
    "ALPHA",
    "PRIMARY",
    "Gap",
    "Judgement",
    "Status",
    "exceeds_noise",
    "judge",
    "judgement_table",
    "judgements_of",
    "noise_p",
    "settled",
    "told_row",
]

PRIMARY = ("domain_share", "pass_rate", "coherence_mean")
"""The quantities of the headline, fixed before seeing data; all else in the contrasts is exploration."""

ALL_SEEDS = "all seeds"
"""The comparison of every SAE of the treatment's model with every SAE of the control's, placebos included."""

ALPHA = 0.05
"""How often a study in which fine-tuning did nothing may credit it with something."""

_HEADLINE = (
    "comparison",
    "a",
    "b",
    "value_a",
    "value_b",
    "estimate",
    "low",
    "high",
    "unit",
    "reason",
    "saes_a",
    "saes_b",
)

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
        status: "undefined": no interval. "unseparated": the interval of treatment minus control excludes zero, but no
            second SAE of the control's model can tell fine-tuning from SAE noise: there is none, or none that differs
            from the control's, which says nothing about how much others would. "beyond": more than SAE noise.
            "noise": not clearly more than that, though an interval (one SAE each, or all SAEs) excludes zero.
            "unclear": none does.
        change: Treatment minus control, one SAE each.
        retraining: Placebo minus control, each placebo.
        beyond: Treatment minus placebo, each placebo.
        seeds: All SAEs of the treatment's model minus all of the control's, with an interval that holds the noise of
            SAE training; None where there is none.
        n_saes: SAEs of the control's and of the treatment's model behind it.
        p: How likely SAE noise alone would set the treatment this far apart; for declared quantities after Holm's
            correction for their number. NaN where nobody knows.
    """

    quantity: str
    status: Status
    change: Gap
    retraining: tuple[Gap, ...]
    beyond: tuple[Gap, ...]
    seeds: Gap | None = None
    n_saes: tuple[int, int] = (1, 1)
    p: float = math.nan

    @property
    def by_seeds(self) -> bool:
        """Whether both models have several SAEs, so that these alone decide."""
        return self.seeds is not None and min(self.n_saes) > 1

    @property
    def told(self) -> Gap:
        """The difference that the reading speaks of: over all SAEs where these decide, else treatment minus control."""
        return self.seeds if self.seeds is not None and self.by_seeds else self.change


def exceeds_noise(change: Gap, retraining: Sequence[Gap], beyond: Sequence[Gap], *, p: float | None = None) -> bool:
    """Whether one SAE of the treatment's model differs from the control's by more than SAE noise.

    The interval of treatment minus control excludes zero, and that of treatment minus each placebo on the same side:
    then it is more than the luck of the features. And the treatment lies outside of where one more SAE of the
    control's model is to be expected, as its SAEs so far show: then it is more than the luck of the seed.

    With one placebo that takes a change eleven times as large as the placebo's: two SAEs hardly tell how much SAEs
    differ. Two placebos ask for about five standard deviations, three for 3.6.

    If fine-tuning did nothing, a quantity passes in at most 5 % of studies, however much seeds matter, and in far
    fewer where they do not (tests/comparison/test_judgement.py).

    Args:
        change: Treatment minus control.
        retraining: Placebo minus control, each placebo.
        beyond: Treatment minus placebo, in the same order.
        p: As `noise_p` gives it, if that is known from elsewhere; NaN, where SAEs show no noise, exceeds nothing.
    """
    p = noise_p(change, retraining) if p is None else p
    sides = [apart.sign for apart in beyond]
    return change.sign != 0 and all(side == change.sign for side in sides) and p <= ALPHA


def noise_p(change: Gap, retraining: Sequence[Gap]) -> float:
    """How likely one more SAE of the control's model would lie as far off as the treatment's, from the gaps alone.

    Args:
        change: Treatment minus control.
        retraining: Placebo minus control, each placebo.

    Returns:
        Two-sided p of Student's t for one value more; NaN without a placebo, or where all of them equal the control.

    Example:
        >>> apart, noise = Gap("c", "t", 0.5, 0.4, 0.6, ""), Gap("c", "p", 0.1, -0.1, 0.3, "")
        >>> round(noise_p(apart, [noise]), 3)  # Student's t with one degree of freedom
        0.121
    """
    control = np.array([0.0, *(gap.estimate for gap in retraining)])
    if not np.isfinite([*control, change.estimate]).all():
        return math.nan
    return cautious_difference_test(control, np.array([change.estimate])).p


def settled(contrasts: pd.DataFrame) -> pd.DataFrame:
    """The contrasts with `p_noise` and `p_noise_holm`, on the rows of "fine-tuning" alone.

    The former says how likely SAE noise alone would set control and treatment this far apart: p over all SAEs where
    there is such a row, else `noise_p`. The latter is Holm's correction over the declared quantities, so that a study
    in which fine-tuning did nothing credits it with anything at all in at most 5 %.
    """
    tuned = contrasts["comparison"] == "fine-tuning"
    quantities = contrasts["quantity"]
    rows = np.flatnonzero(tuned & ~quantities.str.endswith(("_seeds", "_ratio")))
    p = np.full(len(contrasts), np.nan)
    p[rows] = [_noise_p_of(contrasts, str(quantities.iloc[row])) for row in rows]
    adjusted = np.full(len(contrasts), np.nan)
    declared = rows[contrasts["declared"].to_numpy(dtype=bool)[rows]]
    adjusted[declared] = holm(p[declared])
    return contrasts.assign(p_noise=p, p_noise_holm=adjusted)


def judge(contrasts: pd.DataFrame, quantity: str) -> Judgement:
    """Judge one quantity.

    Where both models have several SAEs these alone decide: the change is more than SAE noise if p over SAEs is at
    most 5 %. With one SAE of the treatment's model `exceeds_noise` decides. Declared quantities are corrected for
    their number (`settled`).

    Args:
        contrasts: The table of `saeffect.comparison.contrasts`, with the rows of `seed_contrasts` if there are any.
        quantity: A value of its column `quantity`.
    """
    judged = _evidence(contrasts, quantity, _p_of(contrasts, quantity))
    change, retraining, beyond = judged.change, judged.retraining, judged.beyond
    status: Status
    if judged.by_seeds and judged.p <= ALPHA:
        status = "beyond"
    elif not change.defined:
        status = "undefined"
    elif judged.by_seeds:
        status = "noise" if change.sign or judged.told.sign else "unclear"
    elif change.sign == 0:
        status = "unclear"
    elif (
        not (retraining or judged.seeds)
        or not all(gap.defined for gap in (*retraining, *beyond))
        or math.isnan(judged.p)
    ):
        status = "unseparated"
    else:
        status = "beyond" if exceeds_noise(change, retraining, beyond, p=judged.p) else "noise"
    return replace(judged, status=status)


def judgement_table(contrasts: pd.DataFrame) -> pd.DataFrame:
    """Every quantity judged once, to be stored: what speaks of a reading takes it from here.

    Args:
        contrasts: As `settled` gives it.

    Returns:
        One row a quantity: `quantity`, `label`, `declared`, `status` and `p` (`Judgement`); then the row of the
        contrasts that the reading speaks of: `comparison` ("fine-tuning", or "all seeds" where these decide), `a`, `b`,
        `value_a`, `value_b`, `estimate`, `low`, `high`, `unit`, `reason`, `saes_a`, `saes_b`.
    """
    tuned = contrasts[contrasts["comparison"] == "fine-tuning"]
    names = [str(name) for name in tuned["quantity"] if not str(name).endswith(("_seeds", "_ratio"))]
    rows = []
    for row, judged in ((told_row(contrasts, judged), judged) for judged in (judge(contrasts, name) for name in names)):
        first = tuned[tuned["quantity"] == judged.quantity].iloc[0]
        head = {"quantity": judged.quantity, "label": first["label"], "declared": bool(first["declared"])}
        rows.append({**head, "status": judged.status, "p": judged.p, **{name: row[name] for name in _HEADLINE}})
    return pd.DataFrame(rows, columns=["quantity", "label", "declared", "status", "p", *_HEADLINE])


def judgements_of(table: pd.DataFrame, contrasts: pd.DataFrame) -> dict[str, Judgement]:
    """Stored judgements with the differences behind them, by quantity.

    Args:
        table: As `judgement_table` gives it.
        contrasts: The table that it was made of.
    """
    return {
        str(row.quantity): replace(_evidence(contrasts, str(row.quantity), float(row.p)), status=row.status)
        for row in table.itertuples()
    }


def told_row(contrasts: pd.DataFrame, judged: Judgement) -> pd.Series[Any]:
    """The row of the contrasts behind `Judgement.told`: that over all SAEs where these decide."""
    name, comparison = (f"{judged.quantity}_seeds", ALL_SEEDS) if judged.by_seeds else (judged.quantity, "fine-tuning")
    return contrasts[(contrasts["quantity"] == name) & (contrasts["comparison"] == comparison)].iloc[0]


def _evidence(contrasts: pd.DataFrame, quantity: str, p: float) -> Judgement:
    """All differences behind a judgement, without the status."""
    rows = contrasts[contrasts["quantity"] == quantity]
    seeds, n_saes = _over_seeds(contrasts, quantity)
    change = _gaps(rows, "fine-tuning")[0]
    retraining, beyond = _gaps(rows, "retraining"), _gaps(rows, "beyond retraining")
    return Judgement(quantity, "undefined", change, retraining, beyond, seeds, n_saes, p)


def _p_of(contrasts: pd.DataFrame, quantity: str) -> float:
    """After Holm where that was worked out, else as it is."""
    if "p_noise" not in contrasts:
        return _noise_p_of(contrasts, quantity)
    row = contrasts[(contrasts["quantity"] == quantity) & (contrasts["comparison"] == "fine-tuning")].iloc[0]
    return float(row["p_noise_holm"] if bool(row["declared"]) else row["p_noise"])


def _noise_p_of(contrasts: pd.DataFrame, quantity: str) -> float:
    over = contrasts[(contrasts["quantity"] == f"{quantity}_seeds") & (contrasts["comparison"] == ALL_SEEDS)]
    if len(over):
        return float(over["p"].iloc[0])
    rows = contrasts[contrasts["quantity"] == quantity]
    return noise_p(_gaps(rows, "fine-tuning")[0], _gaps(rows, "retraining"))


def _over_seeds(contrasts: pd.DataFrame, quantity: str) -> tuple[Gap | None, tuple[int, int]]:
    rows = contrasts[(contrasts["quantity"] == f"{quantity}_seeds") & (contrasts["comparison"] == ALL_SEEDS)]
    if rows.empty:
        return None, (1, 1)
    gap = _gaps(rows, ALL_SEEDS)[0]
    return (gap if gap.defined else None), (int(rows["saes_a"].iloc[0]), int(rows["saes_b"].iloc[0]))


def _gaps(rows: pd.DataFrame, comparison: str) -> tuple[Gap, ...]:
    chosen = rows[rows["comparison"] == comparison]
    return tuple(
        Gap(str(a), str(b), float(estimate), float(low), float(high), str(unit), str(reason))
        for a, b, estimate, low, high, unit, reason in zip(
            *(chosen[column] for column in ("a", "b", "estimate", "low", "high", "unit", "reason")),
            strict=True,
        )
    )
