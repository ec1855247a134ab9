"""From one row a feature to one row an arm: what steering did on each outcome against each control."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from saeffect.report.context import SteeringResults
from saeffect.stats.student import mean_interval
from saeffect.steering.placebos import STEERED

__all__ = [
    "BASELINE_COLUMNS",
    "DOSE_MEASURES",
    "OUTCOME_COLUMNS",
    "baseline_summary",
    "dose_summary",
    "outcome_summary",
    "primary_effects",
]

OUTCOME_COLUMNS = (
    *("arm", "outcome", "control", "declared", "decides", "unit", "alternative", "n_features", "n_defined"),
    *("mean", "low", "high", "n_tested", "n_passed", "reversed_share", "reason"),
)
BASELINE_COLUMNS = (
    *("arm", "outcome", "baseline", "declared", "unit", "n_features", "n_defined", "mean", "low", "high"),
    *("n_above", "n_clearly_above", "n_below", "n_clearly_below", "reason"),
)
DOSE_MEASURES = ("gain", "perplexity", "distinct2", "score", "direct_effect", "kl")


def outcome_summary(results: SteeringResults, order: Sequence[str], *, alpha: float) -> pd.DataFrame:
    """Mean effect over an arm's features, for every outcome against every control.

    Args:
        results: The steer stage's tables.
        order: The arms, in the order of the rows.
        alpha: Highest q at which a feature passes.

    Returns:
        One row per arm, outcome (declared ones first) and control (the deciding one first): `OUTCOME_COLUMNS`.
        decides (whether this is the one test that decides what passes); n_features; n_defined (with an effect);
        mean with its 95 % interval low, high over features (Student's t); n_tested (with a q) and n_passed
        (q <= alpha; for two-sided outcomes it says that something changed, either way); reversed_share (mean over
        features); reason ("" when the mean is defined).
    """
    rows = []
    for shared, some in _groups(results, results.outcome_effects, order, "placebo"):
        q = _numbers(some["q"])
        rows.append(
            {
                **shared,
                "control": some["placebo"].iloc[0],
                "decides": bool(some["primary"].any()),
                "alternative": str(some["alternative"].iloc[0]),
                "n_tested": int(np.isfinite(q).sum()),
                "n_passed": int((q <= alpha).sum()),
                "reversed_share": _nan_mean(_numbers(some["reversed_share"])),
            }
        )
    return pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS))


def baseline_summary(results: SteeringResults, order: Sequence[str]) -> pd.DataFrame:
    """What steering does beyond each baseline, over the features that the baselines were run for.

    Args:
        results: The steer stage's tables.
        order: The arms, in the order of the rows.

    Returns:
        One row per arm, outcome and baseline: `BASELINE_COLUMNS`. mean with low and high as in `outcome_summary`;
        n_above and n_below count features on which steering does more, and less; the clear ones are those whose
        own 95 % interval lies wholly on that side.
    """
    rows = []
    for shared, some in _groups(results, results.baseline_effects, order, "baseline"):
        effect, low, high = (_numbers(some[name]) for name in ("effect", "low", "high"))
        rows.append(
            {
                **shared,
                "baseline": some["baseline"].iloc[0],
                "n_above": int((effect > 0).sum()),
                "n_clearly_above": int((low > 0).sum()),
                "n_below": int((effect < 0).sum()),
                "n_clearly_below": int((high < 0).sum()),
            }
        )
    return pd.DataFrame(rows, columns=list(BASELINE_COLUMNS))


def dose_summary(response: pd.DataFrame | None, order: Sequence[str]) -> pd.DataFrame:
    """The dose search by arm, condition and dose: means over features.

    Args:
        response: As `saeffect.steering.dose_response` gives, with a column arm.
        order: The arms, in the order of the rows.

    Returns:
        One row per arm, condition ("steered", then the placebo) and dose: arm, condition, dose, n_features, for each
        of `DOSE_MEASURES` its mean with a 95 % interval `<measure>_low` and `<measure>_high` over features (Student's
        t; of perplexity the geometric mean), and n_best: features whose dose of best concept × fluency this is.
    """
    numbers = (m + end for m in DOSE_MEASURES for end in ("", "_low", "_high"))
    columns = ["arm", "condition", "dose", "n_features", *numbers]
    rows = []
    if response is not None and "condition" not in response.columns:  # a search of before placebos stood beside it
        response = response.assign(condition=STEERED)
    for arm in order if response is not None else ():
        mine = response[response["arm"] == arm]  # type: ignore[index]
        for condition in dict.fromkeys(mine["condition"]):
            for dose, some in mine[mine["condition"] == condition].groupby("dose"):
                row: dict[str, Any] = {"arm": arm, "condition": condition, "dose": dose, "n_features": len(some)}
                for measure in DOSE_MEASURES:
                    row |= _interval_of(some, measure)
                rows.append(row | {"n_best": int(some["best"].astype(bool).sum())})
    return pd.DataFrame(rows, columns=[*columns, "n_best"])


def primary_effects(effects: pd.DataFrame | None) -> dict[str, Any]:
    """The mean over an arm's features of the deciding effect.

    Returns:
        n_features, n_defined, mean, low, high, reason, as in `outcome_summary`.
    """
    empty = pd.DataFrame({"effect": [], "reason": []})
    return _mean(empty if effects is None or effects.empty else effects)


def _groups(
    results: SteeringResults, tables: Mapping[str, pd.DataFrame], order: Sequence[str], against: str
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """(what all summaries say, its rows) of every arm, outcome and what it is compared with, in the tables' order."""
    for arm in order:
        table = tables.get(arm)
        if table is None or table.empty:
            continue
        for outcome in results.in_order(list(dict.fromkeys(table["outcome"]))):
            mine = table[table["outcome"] == outcome]
            for _, some in mine.groupby(against, sort=False):
                shared = {"arm": arm, "outcome": outcome, "declared": results.declared(outcome)}
                yield shared | {"unit": str(some["unit"].iloc[0])} | _mean(some), some


def _mean(some: pd.DataFrame) -> dict[str, Any]:
    effect = _numbers(some["effect"])
    defined = effect[np.isfinite(effect)]
    estimate = mean_interval(defined)
    reason = "" if len(defined) else _commonest(some) or "no feature was tested"
    return {
        "n_features": len(some),
        "n_defined": len(defined),
        "mean": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "reason": reason,
    }


def _interval_of(some: pd.DataFrame, measure: str) -> Mapping[str, float]:
    values = _numbers(some[measure]) if measure in some.columns else np.empty(0)
    values = values[np.isfinite(values)]
    is_ratio = measure == "perplexity"
    estimate = mean_interval(np.log(values[values > 0]) if is_ratio else values)
    ends = (estimate.value, estimate.low, estimate.high)
    low_to_high = [math.exp(end) if is_ratio and math.isfinite(end) else end for end in ends]
    return dict(zip((measure, f"{measure}_low", f"{measure}_high"), low_to_high, strict=True))


def _numbers(column: pd.Series[Any]) -> np.ndarray:
    return pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)


def _nan_mean(values: np.ndarray) -> float:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _commonest(some: pd.DataFrame) -> str:
    if "reason" not in some.columns:
        return ""
    reasons = some["reason"].astype(str)
    reasons = reasons[(reasons != "") & (reasons != "nan")]
    return str(reasons.mode().iloc[0]) if len(reasons) else ""
