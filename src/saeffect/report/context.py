"""The study around a comparison, as the report reads it, and summaries of steering by arm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison import ArmTables
from saeffect.stats.student import mean_interval

__all__ = [
    "DOSE_MEASURES",
    "ReportContext",
    "SteeringResults",
    "baseline_summary",
    "dose_summary",
    "outcome_summary",
    "primary_effects",
]

_OUTCOME_COLUMNS = (
    *("arm", "outcome", "control", "declared", "decides", "unit", "alternative", "n_features", "n_defined"),
    *("mean", "low", "high", "n_tested", "n_passed", "reversed_share", "reason"),
)
_BASELINE_COLUMNS = (
    *("arm", "outcome", "baseline", "declared", "unit", "n_features", "n_defined", "mean", "low", "high"),
    *("n_above", "n_clearly_above", "n_below", "n_clearly_below", "reason"),
)
DOSE_MEASURES = ("gain", "perplexity", "distinct2", "score", "direct_effect", "kl")


@dataclass(frozen=True, eq=False)
class SteeringResults:
    """Settings and tables of the steer stage; arms without rows may be missing from the tables.

    Attributes:
        operator: "add", "clamp" or "ablate"; unit: of the dose of "add", "residual_norm" or "coefficient".
        dose: Of the test, None if unknown; dose_note: how it was chosen, or its limits; "" for none.
        best_doses: Each searched arm's own best dose, None where no dose had a score.
        outcomes: Declared ones, the deciding one first; placebo: the control that decides, of the requested placebos.
        outcome_effects: By arm, a row per feature, outcome and placebo (`saeffect.steering.outcome_effects`);
            baseline_effects: the same with baselines instead of placebos.
        together_effects: By arm, a row per set of features steered at once: set, members, and the columns of
            `saeffect.steering.effects`.
        dose_response: A row per arm, feature and dose (`saeffect.steering.dose_response`).
    """

    operator: str = "add"
    unit: str = "residual_norm"
    dose: float | None = None
    dose_note: str = ""
    best_doses: Mapping[str, float | None] = field(default_factory=dict)
    outcomes: Sequence[str] = ("similarity",)
    placebo: str = "matched"
    placebos: Sequence[str] = ("random", "matched")
    n_prompts: int = 0
    samples: int = 0
    outcome_effects: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    baseline_effects: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    together_effects: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    dose_response: pd.DataFrame | None = None

    @property
    def deciding(self) -> str:
        """The outcome that decides what passes."""
        return self.outcomes[0]

    def declared(self, outcome: str) -> bool:
        """Whether an outcome was declared before the run; all others are exploratory."""
        return outcome in self.outcomes

    def in_order(self, names: Sequence[str]) -> list[str]:
        """The outcomes of `names`, declared ones first in their declared order.

        Example:
            >>> SteeringResults(outcomes=("off_list", "similarity")).in_order(["kl", "similarity", "off_list"])
            ['off_list', 'similarity', 'kl']
        """
        first = [name for name in self.outcomes if name in names]
        return first + [name for name in names if name not in first]


@dataclass(frozen=True, eq=False)
class ReportContext:
    """The study around a comparison. Every part may be missing; the report then says so.

    Attributes:
        facts: Label-value pairs below the title: models, hook, text, prompts, dose.
        arms, examples: Tables by arm; max-activating contexts by arm, as in examples.parquet.
        prompts: Steered prompts; the interventions' column `prompt` is an index into them.
        gate: Quality of SAE and model, one row per arm, with a column `arm`.
        doses: The dose search: `arm`, `dose`, numeric columns, and `chosen` (bool).
        config, provenance: The resolved study file, YAML text; versions, hashes and seeds, which may be nested.
        domain: Subject of the vocabulary in a word, e.g. "medical".
        alpha: A feature passes at q <= alpha.
        projection: Scale of the top tokens, "cosine" or "dot".
        max_features: Features listed per arm; the tables hold all of them.
        verdicts: People's verdicts (feature, arm, rater, verdict, label, note, kind); None without a review.
    """

    study: str = "study"
    title: str = ""
    facts: Sequence[tuple[str, str]] = ()
    arms: Mapping[str, ArmTables] = field(default_factory=dict)
    examples: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    gate: pd.DataFrame | None = None
    steering: SteeringResults | None = None
    doses: pd.DataFrame | None = None
    config: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    domain: str = "domain"
    min_matches: int = 2
    top_k: int = 10
    alpha: float = 0.05
    projection: str = "cosine"
    max_features: int = 200
    verdicts: pd.DataFrame | None = None

    def arm_of(self, role: str) -> ArmTables | None:
        """The first arm of a role, or None."""
        return next((arm for arm in self.arms.values() if arm.role == role), None)


def outcome_summary(results: SteeringResults, order: Sequence[str], *, alpha: float) -> pd.DataFrame:
    """Mean effect over an arm's features, for every outcome and control; features pass at q <= alpha.

    One row per arm (in `order`), outcome (declared ones first) and control (the deciding one first): arm, outcome,
    control, declared, decides (the one test that decides what passes), unit, alternative, n_features, n_defined (with
    effect), mean with 95 % interval low, high over features (Student's t), n_tested (with q), n_passed (for two-sided
    outcomes in either direction), reversed_share (mean over features), reason ("" if mean is defined).
    """
    rows = []
    for shared, features in _outcome_groups(results, results.outcome_effects, order, "placebo"):
        q = _numbers(features["q"])
        rows.append(
            {
                **shared,
                "control": features["placebo"][0],
                "decides": bool(features["primary"].any()),
                "alternative": str(features["alternative"][0]),
                "n_tested": int(np.isfinite(q).sum()),
                "n_passed": int((q <= alpha).sum()),
                "reversed_share": pd.Series(_numbers(features["reversed_share"])).mean(),
            }
        )
    return pd.DataFrame(rows, columns=list(_OUTCOME_COLUMNS))


def baseline_summary(results: SteeringResults, order: Sequence[str]) -> pd.DataFrame:
    """Steering minus each baseline, over the features that the baselines were run for.

    One row per arm (in `order`), outcome and baseline, as in `outcome_summary`; n_above, n_below: features where
    steering does more or less; n_clearly_above, n_clearly_below: those whose own 95 % interval lies wholly on that side
    of zero.
    """
    rows = []
    for shared, features in _outcome_groups(results, results.baseline_effects, order, "baseline"):
        effect, low, high = (_numbers(features[name]) for name in ("effect", "low", "high"))
        rows.append(
            {
                **shared,
                "baseline": features["baseline"][0],
                "n_above": int((effect > 0).sum()),
                "n_clearly_above": int((low > 0).sum()),
                "n_below": int((effect < 0).sum()),
                "n_clearly_below": int((high < 0).sum()),
            }
        )
    return pd.DataFrame(rows, columns=list(_BASELINE_COLUMNS))


def dose_summary(response: pd.DataFrame | None, order: Sequence[str]) -> pd.DataFrame:
    """Means over features of the dose search (`saeffect.steering.dose_response` with a column arm; None for none).

    One row per arm (in `order`), condition ("steered", then the placebo) and dose: n_features; each of `DOSE_MEASURES`
    as a mean with 95 % interval `<measure>_low`, `<measure>_high` (Student's t over features; geometric mean for
    perplexity); n_best: features whose concept × fluency is best at this dose.
    """
    numbers = (measure + end for measure in DOSE_MEASURES for end in ("", "_low", "_high"))
    columns = ["arm", "condition", "dose", "n_features", *numbers, "n_best"]
    if response is None:
        return pd.DataFrame(columns=columns)
    rows = []
    for arm in order:
        arm_rows = response[response["arm"] == arm]
        for condition in dict.fromkeys(arm_rows["condition"]):
            for dose, features in arm_rows[arm_rows["condition"] == condition].groupby("dose"):
                row: dict[str, Any] = {"arm": arm, "condition": condition, "dose": dose, "n_features": len(features)}
                for measure in DOSE_MEASURES:
                    row |= _mean_columns(features, measure)
                rows.append(row | {"n_best": int(features["best"].astype(bool).sum())})
    return pd.DataFrame(rows, columns=columns)


def primary_effects(effects: pd.DataFrame | None) -> dict[str, Any]:
    """Mean deciding effect over features: n_features, n_defined, mean, low, high, reason as in `outcome_summary`."""
    return _effect_columns({"effect": [], "reason": []} if effects is None or effects.empty else effects)


def _outcome_groups(
    results: SteeringResults, tables: Mapping[str, pd.DataFrame], order: Sequence[str], column: str
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """(identifying columns, columns of the rows) for every arm, outcome and comparator, in the tables' order."""
    for arm in order:
        table = tables.get(arm)
        if table is None or table.empty:
            continue
        columns = {str(name): table[name].to_numpy() for name in table.columns}
        groups: dict[str, dict[str, list[int]]] = {}
        for i, (outcome, comparator) in enumerate(zip(columns["outcome"], columns[column], strict=True)):
            groups.setdefault(outcome, {}).setdefault(comparator, []).append(i)
        for outcome in results.in_order(list(groups)):
            for rows in groups[outcome].values():
                features = {name: values[rows] for name, values in columns.items()}
                shared = {"arm": arm, "outcome": outcome, "declared": results.declared(outcome)}
                yield shared | {"unit": str(features["unit"][0])} | _effect_columns(features), features


def _effect_columns(features: Mapping[str, Any] | pd.DataFrame) -> dict[str, Any]:
    effect = _numbers(features["effect"])
    defined = effect[np.isfinite(effect)]
    estimate = mean_interval(defined)
    reason = ""
    if not len(defined):
        reasons = pd.Series(features["reason"], dtype=object).dropna().astype(str)
        reasons = reasons[reasons != ""]
        reason = str(reasons.mode().iloc[0]) if len(reasons) else "no feature was tested"
    return {
        "n_features": len(effect),
        "n_defined": len(defined),
        "mean": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "reason": reason,
    }


def _mean_columns(features: pd.DataFrame, measure: str) -> dict[str, float]:
    values = _numbers(features[measure])
    values = values[np.isfinite(values)]
    is_ratio = measure == "perplexity"
    estimate = mean_interval(np.log(values[values > 0]) if is_ratio else values)
    ends = (estimate.value, estimate.low, estimate.high)
    numbers = [math.exp(end) if is_ratio and math.isfinite(end) else end for end in ends]
    return dict(zip((measure, f"{measure}_low", f"{measure}_high"), numbers, strict=True))


def _numbers(column: Any) -> np.ndarray:
    return np.asarray(pd.to_numeric(column, errors="coerce"), dtype=np.float64)
