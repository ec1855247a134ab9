"""The answer's paragraph with each number as a link to the row of the page that shows it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from saeffect.comparison import Answer, Trace

__all__ = ["Piece", "traced_paragraph"]


@dataclass(frozen=True)
class Piece:
    """A stretch of the paragraph: its text, the id that it links to ("" for none), and where it was read off."""

    text: str
    anchor: str = ""
    source: str = ""


def traced_paragraph(answer: Answer, anchors: Collection[str]) -> tuple[Piece, ...]:
    """Cut the paragraph into plain stretches and numbers.

    Args:
        answer: With its traces; without them (it was written by an older version) nothing is linked.
        anchors: The ids of the page: a number whose row the page does not show links to its table.
    """
    text, pieces, at = answer["paragraph"], [], 0
    for trace in answer.get("traces", []):
        if text[at : trace["start"]]:
            pieces.append(Piece(text[at : trace["start"]]))
        anchor = next((one for one in _candidates(trace) if one in anchors), "")
        pieces.append(Piece(trace["text"], anchor, _source(trace)))
        at = trace["start"] + len(trace["text"])
    return (*pieces, Piece(text[at:])) if text[at:] else tuple(pieces)


def _source(trace: Trace) -> str:
    where = ", ".join(f"{column} = {value}" for column, value in trace["row"].items())
    return f"comparison/{trace['table']}.parquet, {where}"


def _candidates(trace: Trace) -> tuple[str, ...]:
    """Ids that show the number, the best first."""
    row = trace["row"]
    if trace["table"] == "contrasts":
        quantity = str(row["quantity"])
        return f"row-glance-{quantity.removesuffix('_seeds')}", f"row-contrasts-{quantity}", "table-contrasts"
    if trace["table"] == "cross_activity":
        if "feature" in row:
            return f"row-cross-{row['feature']}", "table-cross", "activity-summary"
        return ("activity-summary",)
    return {"fate_counts": ("table-fates",), "threats": ("table-threats",)}.get(trace["table"], ())
