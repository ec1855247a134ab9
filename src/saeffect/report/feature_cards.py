"""The browsable list of domain features: one card each, with everything that the study knows about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison import ArmTables
from saeffect.lm.tokens import printable_token
from saeffect.report.context import ReportContext
from saeffect.report.feature_numbers import card_numbers
from saeffect.report.tables.outcome import outcome_pairs
from saeffect.report.texts import Chip, Run, chips, context_runs
from saeffect.report.trials import Trial, representative_trials
from saeffect.report.words.numbers import count, fixed, interval, is_defined, is_true, signed

__all__ = ["Context", "FeatureCard", "FeatureList", "IntervalMark", "feature_lists", "showcase"]

_WIDTH, _EDGE = 100.0, 4.0  # of an interval mark, and what is kept free at its ends for the dot


@dataclass(frozen=True)
class IntervalMark:
    """Where an effect and its interval sit on the common scale of all cards, 0 to 100."""

    low: float
    high: float
    middle: float
    zero: float


@dataclass(frozen=True)
class Context:
    """A max-activating context: where it is from, its top activation, and its marked text."""

    source: str
    activation: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class FeatureCard:
    """One domain feature. `keys` are numbers to sort by, `numbers` label-value pairs, `find` what search looks in."""

    arm: str
    role: str
    feature: int
    label: str
    chips: tuple[Chip, ...]
    state: str
    effect: str
    effect_interval: str
    mark: IntervalMark | None
    coherence: str
    matches: str
    keys: Mapping[str, str]
    numbers: tuple[tuple[str, str], ...]
    contexts: tuple[Context, ...]
    trials: tuple[Trial, ...]
    find: str


@dataclass(frozen=True)
class FeatureList:
    """The cards of one arm, largest effect first; `total` counts those beyond the cap too."""

    arm: str
    role: str
    cards: tuple[FeatureCard, ...]
    total: int


def feature_lists(context: ReportContext, order: Sequence[str]) -> tuple[FeatureList, ...]:
    """The domain features of each arm, largest effect first, untested ones last, at most `max_features` each."""
    arms = [context.arms[name] for name in order if name in context.arms]
    scale = _common_scale(arms)
    lists = []
    for arm in arms:
        rows = _joined(arm)
        shown = rows.head(context.max_features)
        examples = _by_feature(context.examples.get(arm.name), shown["feature"])
        trials = _by_feature(arm.interventions, shown["feature"])
        outcomes = outcome_pairs(context, arm.name)
        cards = tuple(
            _card(
                arm,
                row | {"outcome_pairs": outcomes.get(row["feature"], ())},
                examples.get(row["feature"]),
                trials.get(row["feature"]),
                context,
                scale,
            )
            for row in shown.to_dict("records")
        )
        lists.append(FeatureList(arm.name, arm.role, cards, len(rows)))
    return tuple(lists)


def showcase(lists: Sequence[FeatureList], per_arm: int = 3) -> tuple[FeatureCard, ...]:
    """The features with the largest effects of treatment, then control: chosen by rule, not by hand."""
    chosen = []
    for role in ("treatment", "control"):
        for one in lists:
            if one.role == role:
                tested = [card for card in one.cards if card.trials]
                passing = [card for card in tested if card.state == "passed"]
                chosen += (passing or tested)[:per_arm]
    return tuple(chosen)


def _joined(arm: ArmTables) -> pd.DataFrame:
    """Domain features with coherence, selection and effects beside them, in the order of the list."""
    rows = arm.of_domain(arm.features)
    for table in (arm.coherence, arm.selection, arm.effects):
        if table is None or table.empty:
            continue
        fresh = [column for column in table.columns if column == "feature" or column not in rows.columns]
        source = "effect" if table is arm.effects else "coherence"
        rows = rows.merge(table[fresh].rename(columns={"reason": f"{source}_reason"}), on="feature", how="left")
    if "effect" not in rows.columns:
        rows["effect"] = np.nan
    rows["effect"] = pd.to_numeric(rows["effect"], errors="coerce")
    return rows.sort_values(
        ["effect", "matches", "feature"], ascending=[False, False, True], na_position="last", kind="stable"
    ).reset_index(drop=True)


def _by_feature(table: pd.DataFrame | None, wanted: pd.Series[Any]) -> dict[Any, pd.DataFrame]:
    if table is None or table.empty:
        return {}
    return dict(iter(table[table["feature"].isin(wanted)].groupby("feature", sort=False)))


def _common_scale(arms: Sequence[ArmTables]) -> tuple[float, float]:
    """Smallest and largest end of any effect's interval, zero included."""
    ends = [0.0]
    for arm in arms:
        if arm.effects is None or arm.effects.empty:
            continue
        for column in ("effect", "effect_low", "effect_high"):
            values = pd.to_numeric(arm.effects[column], errors="coerce").to_numpy(dtype=float)
            ends += values[np.isfinite(values)].tolist()
    return min(ends), max(ends)


def _mark(row: Mapping[Any, Any], scale: tuple[float, float]) -> IntervalMark | None:
    least, most = scale
    effect = row.get("effect")
    if most <= least or not is_defined(effect):
        return None

    def place(value: object) -> float:
        shown = value if is_defined(value) else effect
        return round(_EDGE + (_WIDTH - 2 * _EDGE) * (float(shown) - least) / (most - least), 1)

    return IntervalMark(place(row.get("effect_low")), place(row.get("effect_high")), place(effect), place(0.0))


def _card(
    arm: ArmTables,
    row: Mapping[Any, Any],
    examples: pd.DataFrame | None,
    trials: pd.DataFrame | None,
    context: ReportContext,
    scale: tuple[float, float],
) -> FeatureCard:
    matched = row.get("matched")
    matched = list(matched) if isinstance(matched, list | tuple | np.ndarray) else []
    top = chips(list(row["top_tokens"]), list(row["top_weights"]), matched)
    effect, low, high = (row.get(name) for name in ("effect", "effect_low", "effect_high"))
    tested = is_defined(row.get("p"))
    state = ("passed" if is_true(row.get("passed")) else "not passed") if tested else "not tested"
    label = str(row.get("label") or "")
    return FeatureCard(
        arm=arm.name,
        role=arm.role,
        feature=int(row["feature"]),
        label=printable_token(label) if label != "nan" else "",
        chips=top,
        state=state,
        effect=signed(effect) if is_defined(effect) else "",
        effect_interval=interval(low, high) if is_defined(low) and is_defined(high) else "",
        mark=_mark(row, scale),
        coherence=fixed(row["coherence"], 2) if is_defined(row["coherence"]) else "",
        matches=count(row["matches"]),
        keys=_sort_keys(row),
        numbers=card_numbers(row),
        contexts=_contexts(examples, context.max_contexts),
        trials=representative_trials(trials, context.prompts, list(row["top_tokens"])),
        find=" ".join([str(int(row["feature"])), label, *(chip.text for chip in top)]).lower(),
    )


def _sort_keys(row: Mapping[Any, Any]) -> dict[str, str]:
    names = ("effect", "coherence", "matches", "density", "q")
    return {name: f"{float(row[name]):.6g}" if is_defined(row.get(name)) else "" for name in names}


def _contexts(table: pd.DataFrame | None, limit: int) -> tuple[Context, ...]:
    if table is None:
        return ()
    return tuple(
        Context(
            source=printable_token(str(row["source"])),
            activation=f"{float(row['activation']):.2f}",
            runs=context_runs(list(row["tokens"]), list(row["activations"]), int(row["position"])),
        )
        for row in table.sort_values("rank", kind="stable").head(limit).to_dict("records")
    )
