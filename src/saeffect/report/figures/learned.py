"""Which groups of features changed beyond what null fine-tunes reach."""

from __future__ import annotations

import numpy as np

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures import where
from saeffect.report.figures.factorial import factorial
from saeffect.report.figures.style import INK, MUTED, ROLE_STYLES, Drawing, clean_axes, new_figure, safe_text

__all__ = ["crossed", "learned", "where_changed", "written_more"]

_SHOWN = 10


def learned(comparison: Comparison, _context: ReportContext) -> Drawing:
    """One line a group, the highest on top: its score, and a band for the highest scores in the nulls."""
    tables = comparison.matches.further
    groups, nulls = tables.get("change_groups"), tables.get("null_groups")
    if groups is None or nulls is None or groups.empty or nulls.empty:
        raise Undefined("there are no null fine-tunes to compare with.")
    rows = groups.head(_SHOWN).to_dict("records")
    highest = nulls["highest"].to_numpy(dtype=np.float64)
    figure = new_figure(0.9 + 0.42 * len(rows))
    ax = figure.add_subplot()
    grey, colour = ROLE_STYLES["placebo"], ROLE_STYLES["treatment"]
    ax.axvspan(0, highest.max(), color=grey.colour, alpha=0.13, linewidth=0)
    ax.plot(highest, np.full(len(highest), -0.75), "|", color=grey.colour, markersize=7)
    ax.text(highest.max(), -0.75, " nulls", size=7.8, color=MUTED, va="center", clip_on=False)
    for y, row in zip(reversed(range(len(rows))), rows, strict=True):
        score = abs(float(row["score"]))
        claimed = bool(row["claimed"])
        ax.plot([0, score], [y - 0.12, y - 0.12], color=colour.colour if claimed else grey.colour, linewidth=1.6)
        ax.plot([score], [y - 0.12], colour.marker, color=colour.colour if claimed else grey.colour, markersize=5)
        less = " (less)" if row["direction"] == "less" else ""
        ax.text(0, y + 0.12, safe_text(", ".join(row["tokens"][:6]) + less, 58), size=7.8, color=INK, va="bottom")
    ax.set(ylim=(-1.15, len(rows) - 0.35), yticks=[], xlim=(0, None))
    ax.set_xlabel("change, in units of what nulls do to such a group", color=MUTED)
    clean_axes(ax, grid="x")
    n = int(groups["claimed"].sum())
    named = "; ".join(f"{row['name']} {abs(float(row['score'])):.1f}" for row in rows)
    return Drawing(
        figure,
        f"The groups of features that changed most. Grey strokes: the highest score of any group in each of"
        f" {len(nulls)} null fine-tunes; what lies in the grey band, a fine-tune that teaches nothing reaches too."
        f" {n} {'group lies' if n == 1 else 'groups lie'} beyond.",
        f"Scores of groups: {named}. Highest in nulls: {highest.max():.1f}.",
    )


def crossed(comparison: Comparison, _context: ReportContext) -> Drawing:
    """The study's `factorial`."""
    table = comparison.matches.further.get("factorial")
    if table is None or table.empty:
        raise Undefined("no SAE was read on both models.")
    return factorial(table)


def where_changed(comparison: Comparison, context: ReportContext) -> Drawing:
    """The study's `where.where`."""
    tables = comparison.matches.further
    if "change_by_layer" not in tables:
        raise Undefined("the models were not compared layer by layer.")
    return where.where(tables, alpha=context.alpha)


def written_more(comparison: Comparison, context: ReportContext) -> Drawing:
    """The study's `where.written`."""
    tables = comparison.matches.further
    if "written_words" not in tables:
        raise Undefined("the models wrote nothing to compare.")
    return where.written(tables, alpha=context.alpha)
