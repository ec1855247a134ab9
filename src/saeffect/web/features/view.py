"""A feature's record formatted for its page: numbers, marked texts and charts, in the page's order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saeffect.report.texts import Chip, Run, Trial, chips, context_runs, representative_trials
from saeffect.report.words.names import capital
from saeffect.report.words.numbers import (
    THIN_SPACE,
    amount,
    fixed,
    interval,
    is_defined,
    is_true,
    p_value,
    signed,
    undefined,
)
from saeffect.steering.outcomes import OUTCOMES
from saeffect.study.study import Study
from saeffect.web.features.pictures import Chart, histogram, line_chart
from saeffect.web.features.record import Record

__all__ = ["BASES", "Bar", "Fact", "Pair", "ShownContext", "Side", "feature_view", "share"]

BASES = {
    "combined": "All four together",
    "read": "Fires on the same text",
    "written": "Fires on what each model writes",
    "expected": "Top tokens expected next",
    "difference": "Mean activation difference along it",
}
"""Titles of the bases of a change."""
_CONDITIONS = {
    "steered": ("steered", "Steered"),
    "matched": ("placebo", "Placebo: a feature of another subject"),
    "random": ("random", "Placebo: a random direction"),
}
_PLACEBO_NAMES = {
    "matched": "a feature of another subject",
    "random": "a random direction",
    "shuffled": "other features' words",
}
_MEASURES = {"writes": "By what it writes (decoder cosine)", "fires": "By when it fires (correlation)"}


@dataclass(frozen=True)
class Fact:
    """A number with its label and a note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Side:
    """One of the two models: title, CSS class, suffix of its columns in the record, and arm."""

    title: str
    kind: str
    suffix: str
    arm: str


@dataclass(frozen=True)
class Bar:
    """A token and its weight as a bar of `width` percent."""

    chip: Chip
    width: float


@dataclass(frozen=True)
class ShownContext:
    """A context: its source, and for each side the activation at its strongest token and the marked text."""

    source: str
    peaks: tuple[str, ...]
    runs: tuple[tuple[Run, ...], ...]


@dataclass(frozen=True)
class Pair:
    """Two top tokens, their cosine with a level of colour from -3 to 3, and the pair's share of the weight."""

    a: str
    b: str
    cosine: str
    level: int
    share: str


def feature_view(record: Record, study: Study) -> dict[str, Any]:
    """The values of a feature page's template."""
    sides = _sides(record, study)
    label = record["label"]
    return {
        "title": f"{record['arm']} {record['feature']}" + (f": {label}" if label else ""),
        "facts": _key_facts(record),
        "model_label": _model_label(record.get("model_label") or {}),
        "top": _bars(record["top_tokens"], record["matched"]),
        "bottom": _bars(record["bottom_tokens"] or [], record["matched"]),
        "sides": sides,
        "contexts": _contexts(record, sides),
        "histogram": _histogram(record, sides),
        "activity": _activity(record, sides),
        "pairs": _pairs(record),
        "changes": tuple(_change(row) for row in record["changes"]["bases"]),
        "matches": tuple(_match(row) for row in record["matches"]),
        "effects": _effects(record["steering"]),
        "doses": _doses(record["steering"]),
        "trials": _trials(record),
    }


def share(value: object) -> str:
    """A share of tokens as a percentage, in three figures."""
    return f"{100 * value:.3g}{THIN_SPACE}%" if is_defined(value) else "–"


def _sides(record: Record, study: Study) -> tuple[Side, ...]:
    """The models, the fine-tuned one last; only the arm's own if the other was not read."""
    models = record["models"]
    models_read = [(models["own"], "")]
    if record["histogram"] is not None and record["histogram"]["counts_beside"] is not None:
        models_read.append((models["beside"], "_beside"))
    control = study.control
    sides = []
    for arm, suffix in models_read:
        role = study.config.arms[arm].role
        is_base = study.config.arms[arm].model == study.config.arms[control].model
        title = "Fine-tuned model" if role == "treatment" else "Base model" if is_base else f"Model of {arm}"
        sides.append(Side(title, "treatment" if role == "treatment" else "control", suffix, arm))
    return tuple(sorted(sides, key=lambda side: side.kind == "treatment"))


def _key_facts(record: Record) -> tuple[Fact, ...]:
    numbers, coherence = record["numbers"], record["coherence"]
    effect: Record = next((row for row in record["steering"]["effects"] if row.get("declared", True)), {})
    change: Record = next((row for row in record["changes"]["bases"] if is_defined(row.get("z"))), {})
    facts = [
        Fact("Density", share(numbers.get("density")), "of the study's tokens"),
        Fact("Decoder norm", amount(numbers["decoder_norm"]) if is_defined(numbers.get("decoder_norm")) else "–"),
        Fact(
            "Coherence",
            fixed(coherence["coherence"]) if is_defined(coherence["coherence"]) else "undefined",
            coherence["reason"] or (f"{coherence['n_known']} known words" if coherence["n_known"] is not None else ""),
        ),
    ]
    if change:
        p_note = f"p {p_value(change['p'])} among null fine-tunes" if is_defined(change.get("p")) else ""
        facts.append(Fact("Change between the models", f"{signed(change['z'], 1)} z", p_note))
    if effect:
        bounds = interval(effect["effect_low"], effect["effect_high"]) if is_defined(effect.get("effect_low")) else ""
        text = signed(effect["effect"]) if is_defined(effect["effect"]) else undefined(effect.get("reason") or "")
        facts.append(Fact("Effect of steering", text, bounds))
    return tuple(facts)


def _model_label(row: Mapping[str, Any]) -> tuple[Fact, ...]:
    """Detection of the feature by a language model's label."""
    if not row or row["reason"]:
        return (Fact("Detection", "undefined", row["reason"]),) if row else ()
    return (
        Fact("Detection", fixed(row["accuracy"], 2), interval(row["low"], row["high"], 2)),
        Fact("Found", f"{row['found']} of {row['n_active']}", "contexts that activate it"),
        Fact("Left", f"{row['left']} of {row['n_silent']}", "contexts that do not"),
    )


def _bars(tokens: Sequence[Mapping[str, Any]], matched: Sequence[str]) -> tuple[Bar, ...]:
    names, weights = _columns(tokens)
    largest = max((abs(weight) for weight in weights if math.isfinite(weight)), default=0.0) or 1.0
    top_chips = chips(names, weights, matched)
    return tuple(
        Bar(chip, round(100 * abs(weight) / largest, 1) if math.isfinite(weight) else 0.0)
        for chip, weight in zip(top_chips, weights, strict=True)
    )


def _contexts(record: Record, sides: Sequence[Side]) -> tuple[tuple[str, tuple[ShownContext, ...]], ...]:
    """Contexts grouped by the models that chose them; the texts of one context share a scale."""
    chosen_by: dict[Any, set[str]] = {}
    rows_by_key: dict[Any, Mapping[str, Any]] = {}
    for row in record["contexts"]:
        key = (row["source"], row["position"], tuple(row["tokens"]))
        chosen_by.setdefault(key, set()).add(row["chosen_in"])
        rows_by_key.setdefault(key, row)
    contexts: dict[str, list[ShownContext]] = {}
    groups = [({sides[0].arm}, sides[0].title)]
    if len(sides) > 1:
        groups = [({side.arm for side in sides}, "Among the strongest of both models")]
        groups += [({side.arm}, f"Among the strongest of the {side.title.lower()} only") for side in sides]
    for arms, title in groups:
        rows = [rows_by_key[key] for key in rows_by_key if chosen_by[key] == arms]
        if rows:
            contexts[title] = [_context(row, sides) for row in rows]
    return tuple((title, tuple(rows)) for title, rows in contexts.items())


def _context(row: Mapping[str, Any], sides: Sequence[Side]) -> ShownContext:
    values = [[float(value) for value in row.get(f"activations{side.suffix}") or ()] for side in sides]
    peak = max((value for text in values for value in text), default=0.0)
    position = int(row["position"])
    return ShownContext(
        source=str(row["source"]),
        peaks=tuple(f"{text[position]:.2f}" if text else "–" for text in values),
        runs=tuple(context_runs(row["tokens"], text, position, peak=peak) if text else () for text in values),
    )


def _histogram(record: Record, sides: Sequence[Side]) -> Chart | None:
    bars = record["histogram"]
    if bars is None:
        return None
    return histogram([(side.kind, side.title, bars[f"counts{side.suffix}"]) for side in sides], float(bars["top"]))


def _activity(record: Record, sides: Sequence[Side]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Rows of a label and one number per side."""
    numbers = record["histogram"] or {
        **{name: record["numbers"].get(name) for name in ("density", "mean_activation", "max_activation")}
    }
    rows: list[tuple[str, tuple[str, ...]]] = []
    for label, name in (
        ("Active on", "density"),
        ("Mean where active", "mean_activation"),
        ("Maximum", "max_activation"),
    ):
        cells = []
        for side in sides:
            value = numbers.get(f"{name}{side.suffix}")
            cells.append(share(value) if name == "density" else amount(value) if is_defined(value) else "–")
        rows.append((label, tuple(cells)))
    own_numbers = record["numbers"]
    for name in sorted(own_numbers):
        if name.startswith("density_"):
            shares = tuple(share(own_numbers[name]) if not side.suffix else "" for side in sides)
            rows.append((f"Active on text “{name.removeprefix('density_')}”", shares))
    return tuple(rows)


def _pairs(record: Record) -> tuple[Pair, ...]:
    """The pairs behind the coherence, the largest contribution first."""
    names = [chip.text for chip in chips(*_columns(record["top_tokens"]), ())]
    pairs = sorted(record["coherence"]["pairs"], key=lambda pair: -pair["cosine"] * abs(pair["share"]))
    return tuple(
        Pair(
            names[pair["a"]],
            names[pair["b"]],
            fixed(pair["cosine"], 2),
            max(-3, min(3, round(3 * pair["cosine"] + math.copysign(0.2, pair["cosine"])))),
            f"{100 * pair['share']:.1f}{THIN_SPACE}%",
        )
        for pair in pairs
    )


def _columns(tokens: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[float]]:
    return [token["token"] for token in tokens], [float(token["weight"]) for token in tokens]


def _change(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table of changes: basis, base, tuned, z, p, q, reason."""
    format_value = share if row["basis"] == "expected" else amount  # small probabilities
    cells = [format_value(row[name]) if is_defined(row.get(name)) else "" for name in ("base", "tuned")]
    z = signed(row["z"], 1) if is_defined(row.get("z")) else "–"
    p_and_q = [p_value(row[name]) if is_defined(row.get(name)) else "–" for name in ("p", "q")]
    return (BASES.get(row["basis"], row["basis"]), *cells, z, *p_and_q, str(row.get("reason") or ""))


def _match(row: Mapping[str, Any]) -> Mapping[str, Any]:
    facts = [Fact("Similarity", fixed(row["similarity"]) if is_defined(row.get("similarity")) else "–")]
    for label, name in (
        ("In another seed of the base", "placebo_similarity"),
        ("In other seeds", "other_seeds_similarity"),
        ("Kept from", "kept_at"),
    ):
        if is_defined(row.get(name)):
            facts.append(Fact(label, fixed(row[name])))
    for name in ("p", "q"):
        if is_defined(row.get(name)):
            facts.append(Fact(name, p_value(row[name])))
    return {
        "title": _MEASURES.get(row["by"], row["measure"]),
        "fate": row.get("fate") or "unknown",
        "reason": row.get("reason") or "",
        "feature": row["match"],
        "arm": row["match_arm"],
        "mutual": is_true(row.get("mutual")),
        "tokens": chips(row["match_tokens"], [0.0] * len(row["match_tokens"]), ()),
        "facts": facts,
    }


def _effects(steering: Record) -> tuple[tuple[str, ...], ...]:
    """Rows of the table of effects: outcome and placebo, effect, interval, p, q; the declared ones first."""
    rows = []
    for row in sorted(steering["outcomes"], key=lambda row: not row.get("declared")):
        outcome = OUTCOMES.get(row["outcome"])
        name = capital(outcome.label if outcome is not None else row["outcome"].replace("_", " "))
        text = signed(row["effect"]) if is_defined(row.get("effect")) else undefined(row.get("reason") or "")
        bounds = interval(row["low"], row["high"]) if is_defined(row.get("low")) else ""
        p_and_q = [p_value(row[key]) if is_defined(row.get(key)) else "–" for key in ("p", "q")]
        placebo = _PLACEBO_NAMES.get(row["placebo"], row["placebo"].replace("_", " "))
        rows.append((name, placebo, text, bounds, *p_and_q, "declared" if row.get("declared") else ""))
    return tuple(rows)


def _doses(steering: Record) -> tuple[Chart, ...]:
    charts = []
    for name, title in (("direct_effect", "direct effect, nats"), ("gain", "similarity gained")):
        series = {
            line: [
                (row["dose"], row[name])
                for row in steering["doses"]
                if row["condition"] == condition and is_defined(row.get(name))
            ]
            for condition, line in _CONDITIONS.items()
        }
        chart = line_chart({line: points for line, points in series.items() if points}, x_title="dose", y_title=title)
        charts += [chart] if chart is not None else []
    return tuple(charts)


def _trials(record: Record) -> tuple[Trial, ...]:
    texts = record["steering"]["texts"]
    if not texts or "similarity" not in texts[0]:
        return ()
    top = [token["token"] for token in record["top_tokens"]]
    return representative_trials(pd.DataFrame(texts), record["steering"]["prompts"], top)
