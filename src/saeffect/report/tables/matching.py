"""Fates of features, features that fire more or less after fine-tuning, and rotations of warm-started features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison import Comparison
from saeffect.diffing.cross_activity import most_changed
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.words.evidence import CALLED, MEASURES
from saeffect.report.words.names import capital, feature_names
from saeffect.report.words.numbers import (
    amount,
    count,
    fixed,
    has_interval,
    interval,
    is_defined,
    p_value,
    percent,
    signed,
)

__all__ = [
    "cross_table",
    "fate_table",
    "notable_table",
    "stagewise_table",
]

_FATES = {
    ("control", "kept"): "Kept: has a counterpart",
    ("control", "moved"): "Moved: its counterpart is further off",
    ("control", "gone"): "Gone: has no counterpart",
    ("control", "absorbed"): "Absorbed: others fire in its place",
    ("treatment", "kept"): "Kept: was there before",
    ("treatment", "moved"): "Moved: what it was is further off",
    ("treatment", "new"): "New: matches nothing before",
}
_MAX_PER_FATE, _MAX_NEAREST = 6, 3  # notable features per fate; per measure where none is called
_MAX_PER_DIRECTION, _MAX_ROTATED = 10, 10  # features shown


def fate_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """Features by fate, for fine-tuning and for another seed; None if nothing was matched."""
    counts = comparison.matches.fate_counts
    if counts.empty:
        return None
    incomplete = counts[counts["excess"].isna() | counts["low"].isna()]
    reasons = dict.fromkeys(reason for reason in incomplete["reason"] if reason)
    return TableView(
        name="fates",
        caption="Kept, moved, gone, absorbed and new features",
        source="comparison/fate_counts.parquet, every row: n_treatment, n_placebo, excess, low, high, called",
        columns=(
            Column("Fine-tuning", "by similarity alone", role="treatment"),
            Column("Another seed", "same model, same rule", role="placebo"),
            Column("Excess", "fine-tuning − seed, 95 % interval"),
            Column("Called", f"single features, q ≤ {context.alpha:g}"),
        ),
        rows=tuple(
            Row(
                _FATES[row["side"], row["fate"]],
                (_count_cell(row, "n_treatment"), _count_cell(row, "n_placebo"), _excess_cell(row), _called_cell(row)),
                sub=f"of the {row['side']}'s features",
                strong=row["fate"] in ("gone", "new"),
                group=MEASURES[row["measure"]],
            )
            for row in counts.to_dict("records")
        ),
        corner="Fate",
        note=f"No interval or no number: {'; '.join(reasons)}." if reasons else "",
        terms=("counterpart", "fates", "absorbed", "excess", "called"),
    )


def _count_cell(row: Mapping[Any, Any], column: str) -> Cell:
    if is_defined(row[column]):
        share = percent(row[column] / row["n_features"]) if row["n_features"] else ""
        return Cell(count(round(row[column])), sub=share)
    return Cell.dash() if row["fate"] == "absorbed" else Cell.undefined(row["reason"])


def _excess_cell(row: Mapping[Any, Any]) -> Cell:
    if not is_defined(row["excess"]):
        return Cell.dash()
    text = amount(round(row["excess"]), "features", sign=True)
    if not has_interval(row):
        return Cell(text, sub="no interval")
    excludes_zero = row["low"] > 0 or row["high"] < 0
    return Cell(text, sub=interval(row["low"], row["high"], 0), tone="good" if excludes_zero else "")


def _called_cell(row: Mapping[Any, Any]) -> Cell:
    if row["fate"] == "kept":
        return Cell.dash()  # only differences from seeds are called
    return Cell(count(row["called"])) if is_defined(row["called"]) else Cell.undefined(row["reason"])


def notable_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """The moved, gone, absorbed and new features with their top tokens, or else the nearest candidates."""
    rows = _notable_features(comparison)
    if rows.empty:
        return None
    called = bool((rows["q"] <= context.alpha).any())
    tokens = {role: _top_tokens(context, role, rows) for role in ("control", "treatment")}
    return TableView(
        name="notable",
        caption=(
            "The features that moved, are gone, absorbed or new"
            if called
            else "The features that came nearest to being gone or new"
        ),
        source=(
            "comparison/fates_control.parquet and fates_treatment.parquet: feature, match, similarity, drop, p, q, "
            "fate; comparison/absorption.parquet: absorbed_by; arms/*/features.parquet: top_tokens"
        ),
        columns=(
            Column("Feature, top tokens", is_text=True),
            Column("Similarity", "to its nearest"),
            Column("Drop", "against other seeds"),
            Column("p, q"),
            Column("Nearest, or absorbing features", is_text=True),
        ),
        rows=tuple(_notable_row(row, tokens, context) for row in rows.to_dict("records")),
        corner="Fate",
        note=(
            ""
            if called
            else "None of them can be called gone or new: among so many features chance gives drops as large as these."
        ),
        terms=("mutual", "p", "q"),
    )


def _notable_features(comparison: Comparison) -> pd.DataFrame:
    """The rows of both fate tables with the smallest q, a few per fate and measure."""
    matches, parts = comparison.matches, []
    parents: dict[int, list[int]] = {}
    if len(matches.absorption):
        absorbed = matches.absorption[matches.absorption["absorbed"]]
        parents = dict(zip(absorbed["feature"], absorbed["absorbed_by"], strict=True))
    for side, table in (("control", matches.fates_control), ("treatment", matches.fates_treatment)):
        if table.empty or not table["p"].notna().any():
            continue
        selected = table[table["fate"].isin(CALLED)].sort_values(["q", "similarity"], kind="stable")
        selected = selected.groupby(["measure", "fate"], sort=False).head(_MAX_PER_FATE)
        if selected.empty:
            nearest = table[table["p"].notna() & (table["similarity"] < table["chance_at"])]
            nearest = nearest.sort_values(["p", "similarity"], kind="stable").groupby("measure", sort=False)
            selected = nearest.head(_MAX_NEAREST).assign(fate=f"not called {'gone' if side == 'control' else 'new'}")
        absorbing = [parents.get(feature, ()) if side == "control" else () for feature in selected["feature"]]
        parts.append(selected.assign(side=side, parents=absorbing))
    if not parts:
        return pd.DataFrame()
    rows = pd.concat(parts, ignore_index=True)
    order = rows["measure"].map({name: i for i, name in enumerate(dict.fromkeys(rows["measure"]))})
    return rows.iloc[np.argsort(order.to_numpy(), kind="stable")].reset_index(drop=True)


def _top_tokens(context: ReportContext, role: str, rows: pd.DataFrame) -> Mapping[int, str]:
    own_side = rows["side"] == role
    parents = rows["parents"].explode().dropna() if role == "treatment" else []
    return feature_names(
        context.arm_of(role),
        5,
        longest=None,
        wanted={*rows.loc[own_side, "feature"], *rows.loc[~own_side, "match"], *parents},
    )


def _notable_row(row: Mapping[Any, Any], tokens: Mapping[str, Mapping[int, str]], context: ReportContext) -> Row:
    side, feature = str(row["side"]), int(row["feature"])
    other_tokens = tokens["treatment" if side == "control" else "control"]
    related = row["parents"] if row["fate"] == "absorbed" else [int(row["match"])] if row["match"] >= 0 else []
    arm = context.arm_of(side)
    is_domain = arm is not None and feature in arm.domain
    cells = (
        Cell.words(
            f"{feature} {tokens[side].get(feature, '')}".strip(), sub=f"{context.domain} feature" if is_domain else ""
        ),
        Cell(fixed(row["similarity"], 2) if is_defined(row["similarity"]) else "–"),
        Cell(fixed(row["drop"], 2) if is_defined(row.get("drop")) else "–"),
        Cell(f"{p_value(row['p'])}, {p_value(row['q'])}" if is_defined(row["q"]) else "–"),
        Cell.words("; ".join(f"{number} {other_tokens.get(number, '')}".strip() for number in related) or "nothing"),
    )
    return Row(capital(row["fate"]), cells, group=MEASURES[row["measure"]], sub=f"{side}'s feature")


def cross_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """The features that changed most in either direction, with intervals and q."""
    changed = most_changed(comparison.matches.cross_activity, alpha=context.alpha)
    if changed.empty:
        return None
    is_more = changed["difference"] > 0
    shown = pd.concat([changed[sign].head(_MAX_PER_DIRECTION) for sign in (is_more, ~is_more)], ignore_index=True)
    tokens = feature_names(context.arm_of("control"), 5, longest=None, wanted=set(shown["feature"]))
    return TableView(
        name="cross",
        caption="Features of the control's SAE that fire more or less after fine-tuning",
        source=(
            "comparison/cross_activity.parquet, rows with q at most alpha: mean_control, mean_treatment, difference, "
            "low, high, q, is_domain; comparison/changes.parquet, basis read: q; arms/*/features.parquet: top_tokens"
        ),
        columns=(
            Column("Top tokens", is_text=True),
            Column("Before", "activation per token"),
            Column("After"),
            Column("Change", "95 % interval"),
            Column("After / before"),
            Column("q", "over rows of text"),
            *([Column("q", "against nulls")] if "q_nulls" in changed else []),
        ),
        rows=tuple(_cross_row(row, tokens, context.domain) for row in shown.to_dict("records")),
        corner="Feature",
        note=(
            "The most changed ones of either direction, by the change divided by the square root of the mean level: "
            f"bold are {context.domain} features. Every feature is in comparison/cross_activity.parquet."
        ),
        terms=("activation_per_token", "paired", "q"),
    )


def _cross_row(row: Mapping[Any, Any], tokens: Mapping[int, str], domain: str) -> Row:
    feature, is_more = int(row["feature"]), row["difference"] > 0
    ends = (
        f"[{_level(row['low'])}, {_level(row['high'])}]" if is_defined(row["low"]) else f"no interval: {row['reason']}"
    )
    ratio = f"{fixed(row['mean_treatment'] / row['mean_control'], 2)}×" if row["mean_control"] > 0 else "silent before"
    cells = (
        Cell.words(tokens.get(feature, "–"), sub=f"{domain} feature" if row["is_domain"] else ""),
        Cell(_level(row["mean_control"])),
        Cell(_level(row["mean_treatment"])),
        Cell(("+" if is_more else "") + _level(row["difference"]), sub=ends),
        Cell(ratio),
        Cell(p_value(row["q"])),
        *([Cell(p_value(row["q_nulls"]))] if "q_nulls" in row else []),
    )
    sub = "fires more" if is_more else "fires less"
    return Row(str(feature), cells, sub=sub, strong=bool(row["is_domain"]), key=str(feature))


def _level(value: float) -> str:
    return fixed(value, 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1)


def stagewise_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """The features with the largest rotation, if the treatment's SAE was warm-started from the control's."""
    table = comparison.matches.stagewise
    if table.empty:
        return None
    shown = table[table["decoder_rotation"].notna()].head(_MAX_ROTATED)
    tokens = feature_names(context.arm_of("control"), 5, longest=None, wanted=set(shown["feature"]))
    rows = []
    for row in shown.to_dict("records"):
        has_null, excess, q = is_defined(row["null_rotation"]), row["excess_rotation"], row["q"]
        cells = (
            Cell.words(tokens.get(row["feature"], "–")),
            Cell(f"{fixed(row['decoder_rotation'], 1)}°"),
            Cell(f"{fixed(row['null_rotation'], 1)}°") if has_null else Cell.undefined(row["reason"]),
            Cell(f"{signed(excess, 1)}°" if is_defined(excess) else "–"),
            Cell(p_value(q) if is_defined(q) else "–"),
        )
        rows.append(Row(str(row["feature"]), cells, strong=is_defined(q) and q <= context.alpha))
    n = int((table["q"] <= context.alpha).sum())
    return TableView(
        name="stagewise",
        caption="How far features turned when the control's SAE was trained on",
        source=(
            "comparison/stagewise.parquet, the first rows: decoder_rotation, null_rotation, excess_rotation, q; "
            "arms/*/features.parquet: top_tokens"
        ),
        columns=(
            Column("Top tokens", is_text=True),
            Column("Turned", "decoder row"),
            Column("Training alone", "same model"),
            Column("Beyond it"),
            Column("q"),
        ),
        rows=tuple(rows),
        corner="Feature",
        note=f"{count(n)} of {count(len(table))} features turned further than training alone turns them "
        f"(q ≤ {context.alpha:g}).",
        terms=("rotation", "q"),
    )
