"""When a difference may be credited to fine-tuning: when the treatment's SAEs lie outside the range predicted for
another SAE of the control's model. `noise_p` gives the p, `judge` the status."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from saeffect.stats.estimate import Estimate, NanEqual
from saeffect.stats.multiplicity import holm
from saeffect.stats.student import cautious_difference

__all__ = [
    "ALL_SEEDS",
    "ALPHA",
    "PRIMARY",
    "Judgement",
    "Status",
    "add_noise_p",
    "exceeds_noise",
    "headline_row",
    "judge",
    "judgement_table",
    "judgements_of",
    "noise_p",
]

PRIMARY = ("domain_share", "pass_rate", "coherence_mean")
"""The quantities of the headline, fixed before seeing data; all else in the contrasts is exploration."""

ALL_SEEDS = "all seeds"
"""The comparison of every SAE of the treatment's model with every SAE of the control's, placebos included."""

ALPHA = 0.05
"""Highest rate at which studies of a fine-tune without effect may credit it with one."""

Status = Literal["undefined", "unclear", "unseparated", "noise", "beyond"]

_HEADLINE = (
    *("comparison", "a", "b", "value_a", "value_b", "estimate", "low", "high"),
    *("unit", "reason", "saes_a", "saes_b"),
)


@dataclass(frozen=True, eq=False)
class Judgement(NanEqual):
    """What can be said about one quantity.

    Attributes:
        status: "undefined": no interval. "unseparated": the interval of treatment minus control excludes zero, but no
            second SAE of the control's model separates fine-tuning from SAE noise: there is none, or none that differs
            from the control's. "beyond": more than SAE noise. "noise": not clearly more, though an interval (one SAE
            each, or all SAEs) excludes zero. "unclear": none does.
        change: Treatment minus control, one SAE each.
        retraining, beyond: Placebo minus control, and treatment minus placebo, by placebo.
        seeds: All SAEs of the treatment's model minus all of the control's, with an interval that includes the noise of
            SAE training; None where there is none.
        n_saes: SAEs of the control's and of the treatment's model behind it.
        p: Probability of a difference this large under SAE noise alone; for declared quantities after Holm's correction
            for their number. NaN where unknown.
    """

    quantity: str
    unit: str
    control: str
    treatment: str
    status: Status
    change: Estimate
    retraining: Mapping[str, Estimate] = field(default_factory=dict)
    beyond: Mapping[str, Estimate] = field(default_factory=dict)
    seeds: Estimate | None = None
    n_saes: tuple[int, int] = (1, 1)
    p: float = math.nan

    @property
    def by_seeds(self) -> bool:
        """Whether both models have several SAEs, so that these alone decide."""
        return self.seeds is not None and min(self.n_saes) > 1

    @property
    def headline(self) -> Estimate:
        """The difference that was judged: over all SAEs where these decide, else treatment minus control."""
        return self.seeds if self.seeds is not None and self.by_seeds else self.change


def exceeds_noise(change: Estimate, beyond: Iterable[Estimate], p: float) -> bool:
    """Whether one SAE of the treatment's model differs from the control's by more than SAE noise.

    The intervals of treatment minus control (`change`) and minus each placebo (`beyond`) must exclude zero on the same
    side, and the treatment must lie outside the range that the control model's SAEs predict for one more (`p` of
    `noise_p` at most 5 %; NaN exceeds nothing). With one placebo that needs a change eleven times the placebo's; two
    placebos need about five standard deviations, three 3.6. If fine-tuning did nothing, a quantity passes in at most
    5 % of studies.
    """
    return change.sign != 0 and all(difference.sign == change.sign for difference in beyond) and p <= ALPHA


def noise_p(change: Estimate, retraining: Iterable[Estimate]) -> float:
    """Probability that one more SAE of the control's model differs as much as the treatment's (Student's t, two-sided).

    `change` is treatment minus control, `retraining` placebo minus control. NaN without a placebo that differs from it.

    Example:
        >>> round(noise_p(Estimate(0.5, 0.4, 0.6), [Estimate(0.1, -0.1, 0.3)]), 3)  # t with one degree of freedom
        0.121
    """
    control = np.array([0.0, *(noise.value for noise in retraining)])
    if not np.isfinite([*control, change.value]).all():
        return math.nan
    return cautious_difference(control, np.array([change.value])).p


def add_noise_p(contrasts: pd.DataFrame) -> pd.DataFrame:
    """The contrasts with `p_noise` and `p_noise_holm`, both NaN outside the rows of "fine-tuning".

    `p_noise` is p over all SAEs where there is such a row, else `noise_p`; `p_noise_holm` is Holm's correction over the
    declared quantities: a study in which fine-tuning did nothing credits it with anything in at most 5 %.
    """
    tuned = contrasts["comparison"] == "fine-tuning"
    quantities, by_quantity = contrasts["quantity"], _by_quantity(contrasts)
    rows = np.flatnonzero(tuned & ~quantities.str.endswith(("_seeds", "_ratio")))
    p = np.full(len(contrasts), np.nan)
    p[rows] = [_quantity_noise_p(by_quantity, str(quantities.iloc[row])) for row in rows]
    adjusted = np.full(len(contrasts), np.nan)
    declared = rows[contrasts["declared"].to_numpy(dtype=bool)[rows]]
    adjusted[declared] = holm(p[declared])
    return contrasts.assign(p_noise=p, p_noise_holm=adjusted)


def judge(contrasts: pd.DataFrame, quantity: str) -> Judgement:
    """Judge one quantity of the contrasts, which may include the rows of `seed_contrasts`.

    With several SAEs of both models these alone decide (p at most 5 %), else `exceeds_noise`. Declared quantities are
    corrected for their number if the contrasts come from `add_noise_p`.
    """
    return _judge_rows(_by_quantity(contrasts), quantity)


def _judge_rows(by_quantity: _Rows, quantity: str) -> Judgement:
    row = next(row for row in by_quantity[quantity] if row["comparison"] == "fine-tuning")
    if "p_noise" in row:
        p = float(row["p_noise_holm"] if row["declared"] else row["p_noise"])
    else:
        p = _quantity_noise_p(by_quantity, quantity)
    judged = _evidence(by_quantity, quantity, p)
    change, to_placebos = judged.change, [*judged.retraining.values(), *judged.beyond.values()]
    status: Status
    if judged.by_seeds and p <= ALPHA:
        status = "beyond"
    elif not change.defined:
        status = "undefined"
    elif judged.by_seeds:
        status = "noise" if change.sign or judged.headline.sign else "unclear"
    elif change.sign == 0:
        status = "unclear"
    elif not (judged.retraining or judged.seeds) or not all(other.defined for other in to_placebos) or math.isnan(p):
        status = "unseparated"
    else:
        status = "beyond" if exceeds_noise(change, judged.beyond.values(), p) else "noise"
    return replace(judged, status=status)


def judgement_table(contrasts: pd.DataFrame) -> pd.DataFrame:
    """Every quantity judged once, from the contrasts of `add_noise_p`: `quantity`, `label`, `declared`, `status`, `p`,
    and the columns of the row that was judged ("fine-tuning", or "all seeds" where these decide).
    """
    rows, by_quantity = [], _by_quantity(contrasts)
    for first in contrasts[contrasts["comparison"] == "fine-tuning"].to_dict("records"):
        if first["quantity"].endswith(("_seeds", "_ratio")):
            continue
        judged = _judge_rows(by_quantity, first["quantity"])
        row = _all_seeds_rows(by_quantity, judged.quantity)[0] if judged.by_seeds else first
        head = {name: first[name] for name in ("quantity", "label", "declared")}
        rows.append({**head, "status": judged.status, "p": judged.p, **{name: row[name] for name in _HEADLINE}})
    return pd.DataFrame(rows, columns=["quantity", "label", "declared", "status", "p", *_HEADLINE])


def judgements_of(table: pd.DataFrame, contrasts: pd.DataFrame) -> dict[str, Judgement]:
    """Judgements by quantity, from a `judgement_table` and the contrasts that it was made of."""
    by_quantity = _by_quantity(contrasts)
    return {
        str(row.quantity): replace(_evidence(by_quantity, str(row.quantity), float(row.p)), status=row.status)
        for row in table.itertuples()
    }


def headline_row(contrasts: pd.DataFrame, judged: Judgement) -> pd.Series[Any]:
    """The row of the contrasts behind `Judgement.headline`: that over all SAEs where these decide."""
    name, comparison = (f"{judged.quantity}_seeds", ALL_SEEDS) if judged.by_seeds else (judged.quantity, "fine-tuning")
    return contrasts[(contrasts["quantity"] == name) & (contrasts["comparison"] == comparison)].iloc[0]


_Rows = Mapping[str, list[dict[str, Any]]]


def _by_quantity(contrasts: pd.DataFrame) -> _Rows:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in contrasts.to_dict("records"):
        grouped.setdefault(row["quantity"], []).append({str(name): value for name, value in row.items()})
    return grouped


def _evidence(by_quantity: _Rows, quantity: str, p: float) -> Judgement:
    """A judgement with all its differences; its status is not yet set."""
    rows = by_quantity[quantity]
    first = next(row for row in rows if row["comparison"] == "fine-tuning")
    all_seeds = _all_seeds_rows(by_quantity, quantity)
    seeds = next(iter(_estimates(all_seeds, "b").values()), None)
    return Judgement(
        quantity=quantity,
        unit=str(first["unit"]),
        control=str(first["a"]),
        treatment=str(first["b"]),
        status="undefined",
        change=_estimates([first], "b")[str(first["b"])],
        retraining=_estimates([row for row in rows if row["comparison"] == "retraining"], "b"),
        beyond=_estimates([row for row in rows if row["comparison"] == "beyond retraining"], "a"),
        seeds=seeds if seeds is not None and seeds.defined else None,
        n_saes=(int(all_seeds[0]["saes_a"]), int(all_seeds[0]["saes_b"])) if all_seeds else (1, 1),
        p=p,
    )


def _quantity_noise_p(by_quantity: _Rows, quantity: str) -> float:
    all_seeds = _all_seeds_rows(by_quantity, quantity)
    if all_seeds:
        return float(all_seeds[0]["p"])
    evidence = _evidence(by_quantity, quantity, math.nan)
    return noise_p(evidence.change, evidence.retraining.values())


def _all_seeds_rows(by_quantity: _Rows, quantity: str) -> list[dict[str, Any]]:
    return [row for row in by_quantity.get(f"{quantity}_seeds", ()) if row["comparison"] == ALL_SEEDS]


def _estimates(rows: Iterable[Mapping[str, Any]], by: str) -> dict[str, Estimate]:
    """The differences by the arm in column `by`."""
    return {
        str(row[by]): Estimate(float(row["estimate"]), float(row["low"]), float(row["high"]), reason=str(row["reason"]))
        for row in rows
    }
