"""The control's SAE on both models: which features fire more and less, and how far warm-started ones turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.diffing.cross_activity import activity_changes, most_changed
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.words.names import feature_words
from saeffect.report.words.numbers import count, fixed, is_defined, p_value, percent, signed, undefined

__all__ = ["cross_summary", "cross_table", "stagewise_table"]

_EACH_WAY, _TURNED = 10, 10


def cross_summary(comparison: Comparison, context: ReportContext) -> str:
    """Two sentences: how many features of the domain fire more, beside all others; or why that cannot be said."""
    cross = comparison.matches.cross_activity
    if cross.empty:
        return "The control's SAE was not applied to the fine-tuned model, so which features fire more cannot be said."
    tested = cross[cross["q"].notna()]
    if tested.empty:
        reasons = [reason for reason in cross["reason"] if reason]
        return f"Which features fire more cannot be said: {reasons[0] if reasons else 'no feature could be tested'}."
    changes = activity_changes(cross, alpha=context.alpha)
    more, less, domain = changes.more, changes.less, changes.domain
    parts = [
        f"Of {count(len(tested))} features that fire, {count(more.sum())} fire more strongly in the fine-tuned model "
        f"and {count(less.sum())} more weakly (q ≤ {context.alpha:g})."
    ]
    if domain.any() and not domain.all():
        parts.append(
            f"Of the {count(domain.sum())} {context.domain} features {percent(more[domain].mean())} fire more and "
            f"{percent(less[domain].mean())} less; of all others {percent(more[~domain].mean())} and "
            f"{percent(less[~domain].mean())}."
        )
    parts.append("Any further training moves the activations of many features a little, so read the sizes.")
    return " ".join(parts)


def cross_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """The features that changed most each way, with intervals and q."""
    cross = comparison.matches.cross_activity
    found = most_changed(cross, alpha=context.alpha)
    if found.empty:
        return None
    more, less = found[found["difference"] > 0].head(_EACH_WAY), found[found["difference"] < 0].head(_EACH_WAY)
    shown = pd.concat([more, less], ignore_index=True)
    words = feature_words(context, "control", set(shown["feature"].astype(int)))
    rows = [_cross_row(row, words, context) for row in shown.to_dict("records")]
    return TableView(
        name="cross",
        caption="Features of the control's SAE that fire more or less after fine-tuning",
        source=(
            "comparison/cross_activity.parquet, rows with q at most alpha: mean_control, mean_treatment, difference, "
            "low, high, q, is_domain; arms/*/features.parquet: top_tokens"
        ),
        columns=(
            Column("Top tokens", is_text=True),
            Column("Before", "activation per token"),
            Column("After"),
            Column("Change", "95 % interval"),
            Column("After / before"),
            Column("q"),
        ),
        rows=tuple(rows),
        corner="Feature",
        stacks=True,
        note=(
            "The most changed ones of either direction, by the change divided by the square root of the mean level: "
            f"bold are {context.domain} features. Every feature is in comparison/cross_activity.parquet."
        ),
    )


def _cross_row(row: Mapping[Any, Any], words: Mapping[int, str], context: ReportContext) -> Row:
    feature, domain = int(row["feature"]), bool(row.get("is_domain", False))
    ends = (
        f"[{_level(row['low'])}, {_level(row['high'])}]" if is_defined(row["low"]) else f"no interval: {row['reason']}"
    )
    ratio = f"{fixed(row['mean_treatment'] / row['mean_control'], 2)}×" if row["mean_control"] > 0 else "silent before"
    return Row(
        str(feature),
        (
            Cell(words.get(feature, "–"), sub=f"{context.domain} feature" if domain else "", is_text=True),
            Cell(_level(row["mean_control"])),
            Cell(_level(row["mean_treatment"])),
            Cell(("+" if row["difference"] > 0 else "") + _level(row["difference"]), sub=ends),
            Cell(ratio),
            Cell(p_value(row["q"])),
        ),
        sub="fires more" if row["difference"] > 0 else "fires less",
        strong=domain,
        key=str(feature),
    )


def _level(value: float) -> str:
    """Activations per token span decades: three figures."""
    if not is_defined(value):
        return "–"
    size = abs(float(value))
    return fixed(value, 3 if size < 1 else 2 if size < 10 else 1)


def stagewise_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """Features that turned most where the treatment's SAE was trained on from the control's."""
    table = comparison.matches.stagewise
    if table.empty:
        return None
    shown = table[table["decoder_rotation"].notna()].head(_TURNED)
    words = feature_words(context, "control", set(shown["feature"].astype(int)))
    rows = []
    for row in shown.to_dict("records"):
        if is_defined(row["null_rotation"]):
            null = Cell(f"{fixed(row['null_rotation'], 1)}°")
        else:
            null = Cell(undefined(str(row["reason"])), tone="muted", is_text=True)
        rows.append(
            Row(
                str(int(row["feature"])),
                (
                    Cell(words.get(int(row["feature"]), "–"), is_text=True),
                    Cell(f"{fixed(row['decoder_rotation'], 1)}°"),
                    null,
                    Cell(f"{signed(row['excess_rotation'], 1)}°" if is_defined(row["excess_rotation"]) else "–"),
                    Cell(p_value(row["q"]) if is_defined(row["q"]) else "–"),
                ),
                strong=is_defined(row["q"]) and row["q"] <= context.alpha,
            )
        )
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
        stacks=True,
        note=f"{count(n)} of {count(len(table))} features turned further than training alone turns them "
        f"(q ≤ {context.alpha:g}).",
    )
