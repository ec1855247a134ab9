"""Threats to validity as the page lists them."""

from __future__ import annotations

from dataclasses import dataclass

from saeffect.comparison import Comparison
from saeffect.report.words.threat import SEVERITIES

__all__ = ["ThreatSummary", "gravest", "threat_summary"]


@dataclass(frozen=True)
class ThreatSummary:
    """How many threats there are of each severity, in words."""

    text: str
    total: int


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
