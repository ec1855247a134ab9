"""Threats to validity as the page lists them."""

from __future__ import annotations

from dataclasses import dataclass

from saeffect.comparison import Comparison
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.words.threat import SEVERITIES

__all__ = ["ThreatSummary", "gravest", "threat_summary", "threat_table"]

_MEANS = {
    "serious": "the answer may be wrong for it",
    "moderate": "the answer is less sure than its intervals say",
    "minor": "the answer speaks for less than it seems to",
}


@dataclass(frozen=True)
class ThreatSummary:
    """How many threats there are of each severity, in words."""

    text: str
    total: int


def threat_table(comparison: Comparison) -> TableView | None:
    """Every threat, how serious, what to do; None for a comparison without the table."""
    table = comparison.threats
    if table.empty:
        return None
    rows = [
        Row(
            str(row.severity)[:1].upper() + str(row.severity)[1:],
            (Cell(str(row.threat), is_text=True), Cell(str(row.remedy), sub=f"seen in {row.source}", is_text=True)),
            strong=row.severity == "serious",
        )
        for row in table.itertuples()
    ]
    return TableView(
        name="threats",
        caption="Threats to validity",
        source="comparison/threats.parquet, every row; its column source names the table behind each",
        columns=(Column("What", is_text=True), Column("What to do", is_text=True)),
        rows=tuple(rows),
        corner="How serious",
        stacks=True,
        note="; ".join(f"{name}: {means}" for name, means in _MEANS.items()) + ".",
    )


def threat_summary(comparison: Comparison) -> ThreatSummary:
    """The sentence above the list."""
    table = comparison.threats
    if table.empty:
        return ThreatSummary("No threats were looked for in this comparison.", 0)
    counts = {name: int((table["severity"] == name).sum()) for name in SEVERITIES}
    parts = [f"{n} {name}" for name, n in counts.items() if n]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    noun = "threat" if len(table) == 1 else "threats"
    lead = "" if counts["serious"] else " None of them is known to overturn the answer."
    return ThreatSummary(f"{listed} {noun}, found by rule in the tables of this study.{lead}", len(table))


def gravest(comparison: Comparison, caveats: list[str], limit: int = 3) -> list[str]:
    """The threats to quote beside the answer: the serious ones, or else the first few."""
    table = comparison.threats
    if table.empty:
        return caveats[:limit]
    serious = [str(one) for one in table.loc[table["severity"] == "serious", "threat"]]
    return serious[: max(limit, 5)] or [str(one) for one in table["threat"]][:limit]
