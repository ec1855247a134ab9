"""Which feature became which: counts beside what seeds show, and the features that stand out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.words.names import feature_words
from saeffect.report.words.numbers import amount, count, fixed, is_defined, p_value, percent, signed, undefined

__all__ = ["MEASURE_NAMES", "fate_summary", "fate_table", "notable_table"]

MEASURE_NAMES = {
    "decoder cosine": "Matched by what they write (decoder cosine)",
    "activation correlation": "Matched by when they fire (activation correlation)",
}
_FATES = {
    ("control", "kept"): "Kept: has a counterpart",
    ("control", "moved"): "Moved: its counterpart is further off",
    ("control", "gone"): "Gone: has no counterpart",
    ("control", "absorbed"): "Absorbed: others speak for it",
    ("treatment", "kept"): "Kept: was there before",
    ("treatment", "moved"): "Moved: what it was is further off",
    ("treatment", "new"): "New: matches nothing before",
}
_PER_FATE, _CANDIDATES = 6, 3


def fate_summary(comparison: Comparison, context: ReportContext) -> str:
    """How many features more than between seeds have no counterpart, and how many single ones stand out."""
    counts = comparison.matches.fate_counts
    if counts.empty or not counts["n_placebo"].notna().any():
        return ""
    parts = []
    rows = counts[(counts["side"] == "control") & (counts["fate"] == "gone")]
    for row in rows[rows["n_placebo"].notna()].to_dict("records"):
        both = is_defined(row["low"]) and is_defined(row["high"])
        ends = f"[{fixed(row['low'], 0)}, {fixed(row['high'], 0)}]" if both else f"no interval: {row['reason']}"
        how = MEASURE_NAMES.get(str(row["measure"]), str(row["measure"]))
        parts.append(
            f"{how}, {count(row['n_treatment'])} of {count(row['n_features'])} features of the control have no "
            f"counterpart in the treatment, {signed(row['excess'], 0)} {ends} against another seed of the same model."
        )
    called = (
        counts[counts["fate"].isin(["moved", "gone", "absorbed", "new"])].groupby("fate", sort=False)["called"].sum()
    )
    found = [f"{count(n)} {fate}" for fate, n in called.items() if n]
    single = (
        f"Single features that stand out by either measure (q ≤ {context.alpha:g}): {', '.join(found)}."
        if found
        else f"No single feature stands out as moved, gone or new (q ≤ {context.alpha:g})."
    )
    return " ".join([*parts, single])


def fate_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """Features by fate, for fine-tuning beside another seed; None where nothing was matched."""
    counts = comparison.matches.fate_counts
    if counts.empty:
        return None
    rows = []
    for row in counts.to_dict("records"):
        side, fate = str(row["side"]), str(row["fate"])
        where = "of the control's features" if side == "control" else "of the treatment's features"
        rows.append(
            Row(
                _FATES.get((side, fate), fate),
                (
                    _number(row, "n_treatment"),
                    _number(row, "n_placebo"),
                    _excess(row),
                    _called(row),
                ),
                sub=where,
                strong=fate in ("gone", "new"),
                group=MEASURE_NAMES.get(str(row["measure"]), str(row["measure"])),
            )
        )
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
        rows=tuple(rows),
        corner="Fate",
        stacks=True,
        note=_why(counts),
    )


def _why(counts: pd.DataFrame) -> str:
    """Why some rows have no interval."""
    rows = counts[counts["excess"].isna() | counts["low"].isna()]
    reasons = list(dict.fromkeys(reason for reason in rows["reason"] if reason))
    return f"No interval or no number: {'; '.join(reasons)}." if reasons else ""


def _number(row: Mapping[Any, Any], column: str) -> Cell:
    if not is_defined(row[column]):
        reason = str(row["reason"])
        return Cell("–" if row["fate"] == "absorbed" else undefined(reason), tone="muted",
                    is_text=row["fate"] != "absorbed")  # fmt: skip
    share = percent(row[column] / row["n_features"]) if row["n_features"] else ""
    return Cell(count(round(float(row[column]))), sub=share)


def _excess(row: Mapping[Any, Any]) -> Cell:
    if not is_defined(row["excess"]):
        return Cell("–", tone="muted")
    text = amount(round(float(row["excess"])), "features", sign=True)
    if not (is_defined(row["low"]) and is_defined(row["high"])):
        return Cell(text, sub="no interval")
    apart = row["low"] > 0 or row["high"] < 0
    return Cell(text, sub=f"[{fixed(row['low'], 0)}, {fixed(row['high'], 0)}]", tone="good" if apart else "")


def _called(row: Mapping[Any, Any]) -> Cell:
    if row["fate"] == "kept":
        return Cell("–", tone="muted")  # only what differs from seeds is called
    if not is_defined(row["called"]):
        return Cell(undefined(str(row["reason"])), tone="muted", is_text=True)
    return Cell(count(row["called"]))


def notable_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """The moved, gone, absorbed and new features with their words; else the ones that came nearest to it."""
    rows = _notable(comparison)
    if rows.empty:
        return None
    called = bool((rows["q"] <= context.alpha).any())
    words = {role: _words(context, role, rows) for role in ("control", "treatment")}
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
            Column("Nearest, or who speaks for it", is_text=True),
        ),
        rows=tuple(_notable_row(row, words, context) for row in rows.to_dict("records")),
        corner="Fate",
        stacks=True,
        note=(
            ""
            if called
            else "None of them can be called gone or new: among so many features chance gives drops as large as these."
        ),
    )


def _notable(comparison: Comparison) -> pd.DataFrame:
    """Rows of both fate tables worth showing, a few a fate and measure, smallest q first."""
    parts = []
    absorbed = _parents(comparison.matches.absorption)
    tables = (("control", comparison.matches.fates_control), ("treatment", comparison.matches.fates_treatment))
    for side, table in tables:
        if table.empty or not table["p"].notna().any():
            continue
        found = table[table["fate"].isin(["moved", "gone", "absorbed", "new"])]
        absent = "gone" if side == "control" else "new"
        if found.empty:
            near = table[table["p"].notna() & (table["similarity"] < table["chance_at"])]
            chosen = near.sort_values(["p", "similarity"], kind="stable").groupby("measure", sort=False)
            found = chosen.head(_CANDIDATES).assign(fate=f"not called {absent}")
        else:
            found = found.sort_values(["q", "similarity"], kind="stable")
            found = found.groupby(["measure", "fate"], sort=False).head(_PER_FATE)
        drop = found["drop"] if "drop" in found else pd.Series(np.nan, index=found.index)
        parents = [absorbed.get(int(feature), ()) if side == "control" else () for feature in found["feature"]]
        parts.append(
            found.assign(side=side, drop=drop, parents=parents)[
                ["side", "measure", "fate", "feature", "match", "similarity", "drop", "p", "q", "parents"]
            ]
        )
    if not parts:
        return pd.DataFrame()
    rows = pd.concat(parts, ignore_index=True)
    order = rows["measure"].map({name: i for i, name in enumerate(dict.fromkeys(rows["measure"]))})
    return rows.iloc[np.argsort(order.to_numpy(), kind="stable")].reset_index(drop=True)


def _parents(absorption: pd.DataFrame) -> dict[int, tuple[int, ...]]:
    if absorption.empty:
        return {}
    rows = absorption[absorption["absorbed"].astype(bool)]
    return {
        int(feature): tuple(int(one) for one in parents)
        for feature, parents in zip(rows["feature"], rows["absorbed_by"], strict=True)
    }


def _words(context: ReportContext, role: str, rows: pd.DataFrame) -> Mapping[int, str]:
    """Top tokens of every feature that the table names in the SAE of this role."""
    own = rows.loc[rows["side"] == role, "feature"]
    matched = rows.loc[rows["side"] != role, "match"]
    parents = [one for some in rows["parents"] for one in some] if role == "treatment" else []
    return feature_words(context, role, {*own.astype(int), *matched.astype(int), *parents})


def _notable_row(row: Mapping[Any, Any], words: Mapping[str, Mapping[int, str]], context: ReportContext) -> Row:
    side = str(row["side"])
    other = "treatment" if side == "control" else "control"
    feature = int(row["feature"])
    tokens = words[side].get(feature, "")
    domain = _is_domain(context, side, feature)
    p = f"{p_value(row['p'])}, {p_value(row['q'])}" if is_defined(row["q"]) else "–"
    beside = [str(one) for one in row["parents"]] if row["fate"] == "absorbed" else []
    if beside:
        named = [words[other].get(int(one), "") for one in beside]
        text = "; ".join(f"{one} {name}".strip() for one, name in zip(beside, named, strict=True))
    else:
        match = int(row["match"]) if is_defined(row["match"]) else -1
        text = f"{match} {words[other].get(match, '')}".strip() if match >= 0 else "nothing"
    return Row(
        str(row["fate"])[:1].upper() + str(row["fate"])[1:],
        (
            Cell(f"{feature} {tokens}".strip(), sub=f"{context.domain} feature" if domain else "", is_text=True),
            Cell(fixed(row["similarity"], 2) if is_defined(row["similarity"]) else "–"),
            Cell(fixed(row["drop"], 2) if is_defined(row["drop"]) else "–"),
            Cell(p),
            Cell(text, is_text=True),
        ),
        group=MEASURE_NAMES.get(str(row["measure"]), str(row["measure"])),
        sub=f"{side}'s feature",
    )


def _is_domain(context: ReportContext, role: str, feature: int) -> bool:
    arm = context.arm_of(role)
    return arm is not None and feature in arm.domain
