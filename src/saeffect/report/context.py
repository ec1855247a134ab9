"""What the report needs to know besides the comparison, and what steering did, summed up by arm."""

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
    """The tables of the steer stage, and how it steered; an arm without rows may be missing from them.

    Attributes:
        operator: "add", "clamp" or "ablate".
        unit: What a dose of "add" counts: "residual_norm" or "coefficient".
        dose: The dose of the test; None where none is known.
        dose_note: What speaks against trusting the choice of the dose, or how it came about; "" for nothing.
        best_doses: Each searched arm's own best dose, None where no dose had a score.
        outcomes: Declared before the run, the deciding one first.
        placebo: The control that decides.
        placebos: The controls that were asked for; empty for none.
        n_prompts: Prompts of the test; 0 where unknown.
        samples: Texts a prompt.
        outcome_effects: For each arm a row per feature, outcome and placebo, see `saeffect.steering.outcome_effects`.
        baseline_effects: The same with baseline in the place of placebo.
        together_effects: For each arm a row a set of features steered at once: set, members, and the columns of
            `saeffect.steering.effects`.
        dose_response: A row per arm, feature and dose, see `saeffect.steering.dose_response`; None for none.
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

    def in_order(self, found: Sequence[str]) -> list[str]:
        """Outcomes with the declared ones first, in the order of their declaration.

        Example:
            >>> SteeringResults(outcomes=("off_list", "similarity")).in_order(["kl", "similarity", "off_list"])
            ['off_list', 'similarity', 'kl']
        """
        first = [name for name in self.outcomes if name in found]
        return first + [name for name in found if name not in first]


@dataclass(frozen=True, eq=False)
class ReportContext:
    """The study around a comparison. Every part may be missing; the report then says so and goes on.

    Attributes:
        study: Name of the study.
        title: Heading of the report; made from the name when empty.
        facts: Label and value pairs for the line under the title: models, hook, text, prompts, dose.
        arms: Tables of each arm, by name: the source of the list of features.
        examples: Each arm's max-activating contexts, by name: feature, rank, activation, position, tokens,
            activations, source.
        prompts: The prompts that were steered on, in the order of the interventions' `prompt` column.
        gate: Quality of each arm's SAE and model, one row an arm, with a column `arm`; None when it is not known.
        steering: What the steer stage found besides the arms' own tables; None when it is not known.
        doses: The dose search: `arm` (optional), `dose`, any numeric columns, and `chosen` (bool).
        config: The resolved study file, YAML text.
        provenance: Versions, hashes and seeds; may be nested.
        domain: What the vocabulary is about, in a word, for instance "medical".
        min_matches: Top tokens in the vocabulary that make a domain feature.
        top_k: Top tokens a feature.
        alpha: Highest q at which a feature passed.
        projection: Scale of the top tokens, "cosine" or "dot".
        max_features: Features listed for each arm; the rest are in the tables.
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

    def arm_of(self, role: str) -> ArmTables | None:
        """The first arm of a role; None where the report knows none."""
        return next((arm for arm in self.arms.values() if arm.role == role), None)


def outcome_summary(results: SteeringResults, order: Sequence[str], *, alpha: float) -> pd.DataFrame:
    """Mean effect over an arm's features, for every outcome against every control.

    Args:
        results: The steer stage's tables.
        order: The arms, in the order of the rows.
        alpha: Highest q at which a feature passes.

    Returns:
        One row per arm, outcome (declared ones first) and control (the deciding one first): arm, outcome, control,
        declared, decides (whether this is the one test that decides what passes), unit, alternative, n_features,
        n_defined (with an effect), mean with its 95 % interval low, high over features (Student's t), n_tested (with a
        q), n_passed (q <= alpha; for two-sided outcomes it says that something changed, either way), reversed_share
        (mean over features), reason ("" when the mean is defined).
    """
    rows = []
    for shared, features in _groups(results, results.outcome_effects, order, "placebo"):
        q = _numbers(features["q"])
        rows.append(
            {
                **shared,
                "control": features["placebo"].iloc[0],
                "decides": bool(features["primary"].any()),
                "alternative": str(features["alternative"].iloc[0]),
                "n_tested": int(np.isfinite(q).sum()),
                "n_passed": int((q <= alpha).sum()),
                "reversed_share": pd.to_numeric(features["reversed_share"], errors="coerce").mean(),
            }
        )
    return pd.DataFrame(rows, columns=list(_OUTCOME_COLUMNS))


def baseline_summary(results: SteeringResults, order: Sequence[str]) -> pd.DataFrame:
    """What steering does beyond each baseline, over the features that the baselines were run for.

    Args:
        results: The steer stage's tables.
        order: The arms, in the order of the rows.

    Returns:
        One row per arm, outcome and baseline: arm, outcome, baseline, declared, unit, n_features, n_defined, mean, low,
        high as in `outcome_summary`; n_above and n_below count features on which steering does more, and less,
        n_clearly_above and n_clearly_below those whose own 95 % interval lies wholly on that side; reason.
    """
    rows = []
    for shared, features in _groups(results, results.baseline_effects, order, "baseline"):
        effect, low, high = (_numbers(features[name]) for name in ("effect", "low", "high"))
        rows.append(
            {
                **shared,
                "baseline": features["baseline"].iloc[0],
                "n_above": int((effect > 0).sum()),
                "n_clearly_above": int((low > 0).sum()),
                "n_below": int((effect < 0).sum()),
                "n_clearly_below": int((high < 0).sum()),
            }
        )
    return pd.DataFrame(rows, columns=list(_BASELINE_COLUMNS))


def dose_summary(response: pd.DataFrame | None, order: Sequence[str]) -> pd.DataFrame:
    """The dose search by arm, condition and dose: means over features.

    Args:
        response: As `saeffect.steering.dose_response` gives, with a column arm; None for none.
        order: The arms, in the order of the rows.

    Returns:
        One row per arm, condition ("steered", then the placebo) and dose: arm, condition, dose, n_features, for each
        of `DOSE_MEASURES` its mean with a 95 % interval `<measure>_low` and `<measure>_high` over features (Student's
        t; of perplexity the geometric mean), and n_best: features whose dose of best concept × fluency this is.
    """
    numbers = (measure + end for measure in DOSE_MEASURES for end in ("", "_low", "_high"))
    columns = ["arm", "condition", "dose", "n_features", *numbers, "n_best"]
    if response is None:
        return pd.DataFrame(columns=columns)
    rows = []
    for arm in order:
        mine = response[response["arm"] == arm]
        for condition in dict.fromkeys(mine["condition"]):
            for dose, features in mine[mine["condition"] == condition].groupby("dose"):
                row: dict[str, Any] = {"arm": arm, "condition": condition, "dose": dose, "n_features": len(features)}
                for measure in DOSE_MEASURES:
                    row |= _interval_of(features, measure)
                rows.append(row | {"n_best": int(features["best"].astype(bool).sum())})
    return pd.DataFrame(rows, columns=columns)


def primary_effects(effects: pd.DataFrame | None) -> dict[str, Any]:
    """The mean over an arm's features of the deciding effect.

    Returns:
        n_features, n_defined, mean, low, high, reason, as in `outcome_summary`.
    """
    return _mean(pd.DataFrame({"effect": [], "reason": []}) if effects is None or effects.empty else effects)


def _groups(
    results: SteeringResults, tables: Mapping[str, pd.DataFrame], order: Sequence[str], against: str
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """(what all summaries say, its rows) of every arm, outcome and what it is compared with, in the tables' order."""
    for arm in order:
        table = tables.get(arm)
        if table is None or table.empty:
            continue
        for outcome in results.in_order(list(dict.fromkeys(table["outcome"]))):
            for _, features in table[table["outcome"] == outcome].groupby(against, sort=False):
                shared = {"arm": arm, "outcome": outcome, "declared": results.declared(outcome)}
                yield shared | {"unit": str(features["unit"].iloc[0])} | _mean(features), features


def _mean(features: pd.DataFrame) -> dict[str, Any]:
    effect = _numbers(features["effect"])
    defined = effect[np.isfinite(effect)]
    estimate = mean_interval(defined)
    reasons = features["reason"].dropna().astype(str)
    reasons = reasons[reasons != ""]
    why_none = str(reasons.mode().iloc[0]) if len(reasons) else "no feature was tested"
    return {
        "n_features": len(features),
        "n_defined": len(defined),
        "mean": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "reason": "" if len(defined) else why_none,
    }


def _interval_of(features: pd.DataFrame, measure: str) -> dict[str, float]:
    values = _numbers(features[measure])
    values = values[np.isfinite(values)]
    is_ratio = measure == "perplexity"
    estimate = mean_interval(np.log(values[values > 0]) if is_ratio else values)
    ends = (estimate.value, estimate.low, estimate.high)
    shown = [math.exp(end) if is_ratio and math.isfinite(end) else end for end in ends]
    return dict(zip((measure, f"{measure}_low", f"{measure}_high"), shown, strict=True))


def _numbers(column: pd.Series[Any]) -> np.ndarray:
    return pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
