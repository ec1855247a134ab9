"""The list of domain features on the page: one card each, with all results of the study about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from saeffect.comparison import ArmTables
from saeffect.lm.tokens import printable_token
from saeffect.report.context import ReportContext
from saeffect.report.tables.steering import outcome_pairs
from saeffect.report.tables.write import domain_features
from saeffect.report.texts import Chip, Run, Trial, chips, context_runs, representative_trials
from saeffect.report.words.names import capital
from saeffect.report.words.numbers import (
    THIN_SPACE,
    amount,
    count,
    fixed,
    interval,
    is_defined,
    is_true,
    p_value,
    signed,
    undefined,
)
from saeffect.steering.outcomes import OUTCOMES
from saeffect.steering.placebos import STEERED

__all__ = ["Context", "FeatureCard", "FeatureList", "IntervalMark", "feature_lists", "showcase"]

_WIDTH, _MARGIN = 100.0, 4.0  # of an interval mark; the margin leaves room for the dot
_MAX_CONTEXTS, _N_SHOWN = 4, 3  # of a card, and of an arm's features in the showcase
Pair = tuple[str, str]
_Row = Mapping[Any, Any]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class IntervalMark:
    """An effect and its interval as positions from 0 to 100 on a scale that all cards share."""

    low: float
    high: float
    middle: float
    zero: float


@dataclass(frozen=True)
class Context:
    """A max-activating context: its source, its top activation and its marked text."""

    source: str
    activation: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class FeatureCard:
    """One domain feature: `keys` are numbers to sort by, `numbers` label-value pairs, `find` is the searched text."""

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
    keys: Mapping[str, str]
    numbers: tuple[Pair, ...]
    find: str
    contexts: tuple[Context, ...] = ()
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class FeatureList:
    """The cards of one arm, largest effect first; `total` also counts features beyond `max_features`."""

    arm: str
    role: str
    cards: tuple[FeatureCard, ...]
    total: int


def feature_lists(
    context: ReportContext, order: Sequence[str], *, for_showcase: bool = False
) -> tuple[FeatureList, ...]:
    """The domain features of each arm, largest effect first, untested ones last, at most `max_features` each;
    `for_showcase`: only those that `showcase` takes.
    """
    arms = [context.arms[name] for name in order if name in context.arms]
    scale = _common_scale(arms)
    lists = []
    for arm in arms:
        if for_showcase and arm.role == "placebo":
            continue
        rows = _domain_rows(arm)
        shown: Sequence[_Row] = rows.head(context.max_features).to_dict("records")
        if for_showcase:
            shown = _showcase_rows(arm, shown)
        features = [row["feature"] for row in shown]
        contexts = _contexts(context.examples.get(arm.name), features)
        trials = _by_feature(arm.interventions, features)
        outcomes = outcome_pairs(context, arm.name, features)
        cards = tuple(
            replace(
                _card(arm, row, outcomes.get(row["feature"], ()), scale),
                contexts=tuple(contexts.get(row["feature"], ())),
                trials=representative_trials(trials.get(row["feature"]), context.prompts, list(row["top_tokens"])),
            )
            for row in shown
        )
        lists.append(FeatureList(arm.name, arm.role, cards, len(rows)))
    return tuple(lists)


def showcase(lists: Sequence[FeatureList]) -> tuple[FeatureCard, ...]:
    """The features with the largest effects, up to three of the treatment, then of the control."""
    chosen: list[FeatureCard] = []
    for arm in sorted(lists, key=lambda arm: arm.role != "treatment"):
        if arm.role != "placebo":
            chosen += _best((card, card.state) for card in arm.cards if card.trials)
    return tuple(chosen)


def _showcase_rows(arm: ArmTables, rows: Sequence[_Row]) -> Sequence[_Row]:
    """The rows behind the cards that `showcase` takes of an arm."""
    if arm.interventions is None:
        return ()
    steered = set(arm.interventions.loc[arm.interventions["condition"] == STEERED, "feature"])
    return _best((row, _state(row)) for row in rows if row["feature"] in steered)


def _best(tested: Iterable[tuple[_Item, str]]) -> list[_Item]:
    """The first few of the items that passed, or of all if none did; each comes with its state."""
    items = list(tested)
    passed = [item for item, state in items if state == "passed"]
    return (passed or [item for item, _ in items])[:_N_SHOWN]


def _domain_rows(arm: ArmTables) -> pd.DataFrame:
    rows = domain_features(arm)
    if "effect" not in rows.columns:
        rows["effect"] = np.nan
    return rows.sort_values(
        ["effect", "matches", "feature"], ascending=[False, False, True], na_position="last", kind="stable"
    ).reset_index(drop=True)


def _by_feature(table: pd.DataFrame | None, features: Sequence[int]) -> dict[Any, pd.DataFrame]:
    if table is None or table.empty:
        return {}
    return dict(iter(table[table["feature"].isin(features)].groupby("feature", sort=False)))


def _common_scale(arms: Sequence[ArmTables]) -> tuple[float, float]:
    values = [0.0]
    for arm in arms:
        if arm.effects is not None and len(arm.effects):
            columns = arm.effects[["effect", "effect_low", "effect_high"]].apply(pd.to_numeric, errors="coerce")
            values += columns.to_numpy(dtype=float)[np.isfinite(columns.to_numpy(dtype=float))].tolist()
    return min(values), max(values)


def _interval_mark(row: _Row, scale: tuple[float, float]) -> IntervalMark | None:
    least, most = scale
    effect = row["effect"]
    if most <= least or not is_defined(effect):
        return None

    def at(value: object) -> float:
        number = value if is_defined(value) else effect
        return round(_MARGIN + (_WIDTH - 2 * _MARGIN) * (float(number) - least) / (most - least), 1)

    return IntervalMark(at(row.get("effect_low")), at(row.get("effect_high")), at(effect), at(0.0))


def _state(row: _Row) -> str:
    if not is_defined(row.get("p")):
        return "not tested"
    return "passed" if is_true(row.get("passed")) else "not passed"


def _card(arm: ArmTables, row: _Row, outcomes: Sequence[Pair], scale: tuple[float, float]) -> FeatureCard:
    matched = row.get("matched")
    matched = list(matched) if isinstance(matched, list | tuple | np.ndarray) else []
    top = chips(list(row["top_tokens"]), list(row["top_weights"]), matched)
    label = str(row.get("label") or "")
    label = "" if label == "nan" else label
    names = ("effect", "coherence", "matches", "density", "q")
    return FeatureCard(
        arm=arm.name,
        role=arm.role,
        feature=int(row["feature"]),
        label=printable_token(label),
        chips=top,
        state=_state(row),
        effect=signed(row["effect"]) if is_defined(row["effect"]) else "",
        effect_interval=_effect_interval(row).strip(),
        mark=_interval_mark(row, scale),
        coherence=fixed(row["coherence"], 2) if is_defined(row["coherence"]) else "",
        keys={name: f"{float(row[name]):.6g}" if is_defined(row.get(name)) else "" for name in names},
        numbers=(*_steering_numbers(row), *outcomes, *_coherence_numbers(row), *_activity_numbers(row)),
        find=" ".join([str(int(row["feature"])), label, *(chip.text for chip in top)]).lower(),
    )


def _contexts(table: pd.DataFrame | None, features: Sequence[int]) -> dict[Any, list[Context]]:
    """By feature, its first contexts by rank."""
    contexts: dict[Any, list[Context]] = {}
    if table is None or table.empty:
        return contexts
    ranked = table[table["feature"].isin(features)].sort_values("rank", kind="stable")
    for row in ranked.groupby("feature", sort=False).head(_MAX_CONTEXTS).to_dict("records"):
        contexts.setdefault(row["feature"], []).append(
            Context(
                source=printable_token(str(row["source"])),
                activation=f"{float(row['activation']):.2f}",
                runs=context_runs(list(row["tokens"]), list(row["activations"]), int(row["position"])),
            )
        )
    return contexts


def _effect_interval(row: _Row) -> str:
    low, high = row.get("effect_low"), row.get("effect_high")
    return f" {interval(low, high)}" if is_defined(low) and is_defined(high) else ""


def _steering_numbers(row: _Row) -> list[Pair]:
    if not is_defined(row.get("p")):
        reason = row.get("effect_reason")
        return [("Effect", undefined(reason if isinstance(reason, str) and reason else "this feature was not tested"))]
    means = [_text(row, name, "?") for name in ("unsteered_mean", "steered_mean", "placebo_mean")]
    direct = _text(row, "direct_effect")
    if is_defined(row.get("direct_placebo")):
        direct += f" (placebo {_text(row, 'direct_placebo')})"
    q = row.get("q")
    outcome = capital(OUTCOMES[str(row.get("outcome") or "similarity")].label)
    return [
        (
            "Effect: steered − placebo",
            (signed(row["effect"]) if is_defined(row["effect"]) else undefined()) + _effect_interval(row),
        ),
        ("p, q", p_value(row["p"]) + (f", {p_value(q)}" if is_defined(q) else "")),
        (f"{outcome}: unsteered, steered, placebo", ", ".join(means)),
        ("Pairs of texts", _text(row, "n_pairs", unit="count")),
        ("Paper's rule", "pass" if is_true(row.get("paper_pass")) else "no pass"),
        ("Direct effect, nats", direct),
        ("KL, nats", _text(row, "kl")),
    ]


def _coherence_numbers(row: _Row) -> list[Pair]:
    reason = row["coherence_reason"]
    text = undefined(reason if isinstance(reason, str) else "")
    if is_defined(row["coherence"]):
        text = f"{fixed(row['coherence'])} ({count(row['n_known'])} known words)"
    scales = [_text(row, name, "?", "count") for name in ("matches_dot", "matches_cosine")]
    pairs = [("Coherence", text), ("Words in the vocabulary: dot, cosine", ", ".join(scales))]
    verdicts = [row.get(name) for name in ("n_yes", "n_no", "n_unsure")]
    if any(is_defined(number) and number for number in verdicts):
        yes, no, unsure = (count(number) if is_defined(number) else "0" for number in verdicts)
        pairs.append(("Verdicts", f"{yes} yes, {no} no, {unsure} unsure"))
    return pairs


def _activity_numbers(row: _Row) -> list[Pair]:
    density = _share(row["density"])
    domain, general = row.get("density_domain"), row.get("density_general")
    if is_defined(domain) and is_defined(general):
        density += f" (domain text {_share(domain)}, general {_share(general)})"
    activation = undefined("it never fired on the text")
    if is_defined(row["mean_activation"]):
        activation = f"{_text(row, 'mean_activation')}, {_text(row, 'max_activation', '?')}"
    return [("Density", density), ("Activation: mean, max", activation)]


def _text(row: _Row, name: str, missing: str = "undefined: not measured", unit: str = "") -> str:
    value = row.get(name)
    return amount(value, unit) if is_defined(value) else missing


def _share(value: object) -> str:
    return f"{100 * value:.3g}{THIN_SPACE}%" if is_defined(value) else undefined("not measured")
