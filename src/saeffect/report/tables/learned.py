"""The groups of features that changed most, beside null fine-tunes, and texts that the models write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.diffing.standardised import BASES
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.texts import visible_text
from saeffect.report.words.numbers import count, fixed, is_defined, p_value, percent, plural

__all__ = ["learned_table", "openings", "pushed", "pushed_view"]

_N_UNCLAIMED = 3  # groups shown after the claimed ones
_MAX_GROUPS = 15
_MAX_OPENINGS, _MAX_CHARACTERS = 12, 160  # texts shown, and characters of one
_BEFORE, _AFTER = 60, 35  # characters around the word of a context


def learned_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """One row a group, the claimed ones first; None without null fine-tunes."""
    tables = comparison.matches.further
    groups, nulls = tables.get("change_groups"), tables.get("null_groups")
    if groups is None or nulls is None or groups.empty or nulls.empty:
        return None
    n_claimed = int(groups["claimed"].sum())
    shown = groups.head(min(_MAX_GROUPS, n_claimed + _N_UNCLAIMED))
    reached = f"highest in {count(len(nulls))} nulls: {nulls['highest'].min():.1f} to {nulls['highest'].max():.1f}"
    return TableView(
        name="learned",
        caption="What changed, by name",
        corner="Group of features",
        columns=(
            Column("Fires", is_text=True),
            Column("Features"),
            Column("Score", reached),
            Column("p", "counts the search"),
            Column("Bases", "that show it alone"),
            Column("Share", "of all change"),
        ),
        rows=tuple(
            _row(row, tables.get("evidence"), _strongest_context(row, tables, context))
            for row in shown.to_dict("records")
        ),
        note="The score is the group's mean change in units of what null fine-tunes do to such a group, over four bases"
        " together: the same text read, texts written, words expected, mean activation difference. The decoder and what"
        " fires together in the base model made the groups, without any fine-tune; a group is claimed if one more null"
        f" fine-tune would reach its score anywhere with a probability of at most {context.alpha:g}. Small changes on"
        " several bases add up, so no basis need show it alone. Below the words: where the group's most changed feature"
        " fires most in the base model, at the word in « ».",
        source="comparison/change_groups.parquet, comparison/evidence.parquet, comparison/null_groups.parquet;"
        " comparison/changes.parquet, basis combined: z; arms/*/examples.parquet: tokens, position",
        terms=("null_fine_tune",),
    )


def _strongest_context(row: Mapping[Any, Any], tables: Mapping[str, pd.DataFrame], context: ReportContext) -> str:
    """A few words around the place where the most changed feature of a group fires most; "" if none is known."""
    control = context.arm_of("control")
    examples = context.examples.get(control.name) if control is not None else None
    if examples is None or "changes" not in tables:
        return ""
    changes = tables["changes"]
    z = changes[(changes["basis"] == "combined") & changes["feature"].isin(list(row["features"]))]
    rows = examples[(examples["feature"].isin(z["feature"])) & (examples["rank"] == 0)].merge(z, on="feature")
    if not rows["z"].notna().any():
        return ""
    best = rows.loc[(rows["z"] * math.copysign(1, row["score"])).idxmax()]
    tokens, at = [str(token) for token in best["tokens"]], int(best["position"])
    before, after = "".join(tokens[:at]), "".join(tokens[at + 1 :])
    if len(before) > _BEFORE:
        before = "…" + before[-_BEFORE:].partition(" ")[2]
    if len(after) > _AFTER:
        after = after[:_AFTER].rpartition(" ")[0] + "…"
    return visible_text(before + _marked(tokens[at]) + after)


def _marked(token: str) -> str:
    """A token in « », its leading space before them."""
    word = token.lstrip(" ")
    return f"{token[: len(token) - len(word)]}«{word or '␣'}»"


def _row(row: Mapping[Any, Any], evidence: pd.DataFrame | None, example: str) -> Row:
    claimed = bool(row["claimed"])
    words = ", ".join(str(token) for token in list(row["tokens"])[:8])
    return Row(
        label=words,
        cells=(
            Cell.words(row["direction"], tone="" if claimed else "muted"),
            Cell(count(row["n_features"])),
            Cell(f"{row['score']:+.1f}".replace("-", "−")),
            Cell(p_value(row["p"]), tone="good" if claimed else "muted"),
            Cell(_n_agreeing(row["group"], evidence)),
            Cell(percent(row["share"])),
        ),
        sub=example if claimed else "; ".join(filter(None, ("not clearly beyond the nulls", example))),
        strong=claimed,
        key=str(row["group"]),
    )


def _n_agreeing(group: int, evidence: pd.DataFrame | None) -> str:
    if evidence is None or evidence.empty:
        return ""
    rows = evidence[(evidence["kind"] == "group") & (evidence["group"] == group) & evidence["basis"].isin(BASES)]
    return f"{int(rows['agrees'].sum())} of {len(rows)}"


def openings(comparison: Comparison, _context: ReportContext) -> TableView | None:
    """Texts of the models side by side, one sample an opening, the largest difference first."""
    table = comparison.matches.further.get("openings")
    if table is None or table.empty:
        return None
    first = table[table["sample"] == 0].head(_MAX_OPENINGS)
    has_null = bool((first["null"] != "").any())
    columns = [Column("base model", is_text=True), Column("fine-tuned", role="treatment", is_text=True)]
    columns += [Column("a null fine-tune", is_text=True)] if has_null else []
    rows = []
    for row in first.to_dict("records"):
        texts = [row["base_text"], row["tuned_text"], *([row["null_text"]] if has_null else [])]
        p = f", p {p_value(row['p'])}" if is_defined(row["p"]) else ""
        rows.append(
            Row(
                visible_text(str(row["opening"])),
                tuple(Cell.words(visible_text(str(text), _MAX_CHARACTERS)) for text in texts),
                sub=f"differ by {fixed(row['change'], 2)} nats{p}",
            )
        )
    return TableView(
        "openings",
        "What the models write after openings that name nothing",
        tuple(columns),
        tuple(rows),
        corner="opening",
        note="All models drew with the same random numbers. Sorted by how much the first word's probabilities differ.",
        source="comparison/openings.parquet",
    )


def pushed(comparison: Comparison, _context: ReportContext) -> TableView | None:
    """See `pushed_view`."""
    return pushed_view(comparison.matches.further)


def pushed_view(tables: Mapping[str, pd.DataFrame]) -> TableView | None:
    """Texts of the base model, pushed and not, one sample an opening, in the order of `openings`; None without any."""
    texts, words = tables.get("difference_texts"), tables.get("difference_words")
    if texts is None or words is None:
        return None
    pushes = texts[texts["dose"] > 0].groupby(["is_null", "fine_tune"], sort=False)["size"].first()
    dose = float(words["dose"].iloc[0] if len(words) else texts["dose"].max())
    (_, tuned), size = pushes.index[0], float(pushes.iloc[0])
    columns = [Column("base model"), Column("pushed along the fine-tune's difference", role="treatment")]
    shown = [(False, "", 0.0), (False, tuned, dose)]
    note = f"At every position, {dose:g} mean residual norms are added; the fine-tune itself moves activations by"
    note += f" {fixed(size, 2)} on average"
    if len(nulls := pushes[1:].sort_values(kind="stable")):
        middle = len(nulls) // 2
        columns.append(Column("pushed along a null's"))
        shown.append((True, nulls.index[middle][1], dose))
        note += f", the null by {fixed(nulls.iloc[middle], 2)}, which is in the middle of {plural(len(nulls), 'null')}"
    by_cell = texts[texts["sample"] == 0].set_index(["is_null", "fine_tune", "dose", "opening"])["text"]
    order = tables.get("openings", texts)
    rows = [
        Row(
            visible_text(opening),
            tuple(Cell.words(visible_text(str(by_cell[(*cell, opening)]), _MAX_CHARACTERS)) for cell in shown),
        )
        for opening in map(str, order["opening"].unique()[:_MAX_OPENINGS])
    ]
    return TableView(
        "pushed",
        "What the base model writes when it is pushed along the mean activation difference",
        tuple(column._replace(is_text=True) for column in columns),
        tuple(rows),
        corner="opening",
        note=f"{note}. All drew the same random numbers. Sorted by how much the fine-tuned model's first word differs.",
        source="comparison/difference_texts.parquet, comparison/difference_words.parquet",
    )
