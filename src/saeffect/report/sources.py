"""Which files of the run folder each table and figure of the report was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from saeffect.report.figures import DrawnFigure
from saeffect.report.tables.view import TableView

__all__ = ["FIGURE_SOURCES", "TABLE_SOURCES", "sourced", "sourced_figure"]

TABLE_SOURCES: Mapping[str, str] = {
    "glance": "comparison/contrasts.parquet, columns value_a, value_b, estimate, low, high",
    "table1": "comparison/table1.parquet, one row an arm; made from arms/*/selection.parquet and effects.parquet",
    "table2": "comparison/table2.parquet, one row an arm; made from arms/*/coherence.parquet",
    "contrasts": "comparison/contrasts.parquet, one row per quantity and pair of arms",
    "design": "comparison/design.parquet, one row a property",
    "gate": "arms/*/gate.json, and dead features from arms/*/features.parquet, column n_active",
}
FIGURE_SOURCES: Mapping[str, str] = {
    "match_counts": "comparison/match_counts.parquet, columns arm, matches, n",
    "top_token_weights": "comparison/weights.parquet, columns arm, weight",
    "mean_activation": "comparison/activity.parquet, columns arm, mean_activation",
    "density": "comparison/activity.parquet, columns arm, density",
    "coherence": "arms/*/coherence.parquet, column coherence, features with is_domain in selection.parquet",
    "contrasts": "comparison/contrasts.parquet, columns estimate, low, high",
}
"""By name of the table or figure; those that know their source themselves are not in these two."""


def sourced(view: TableView | None) -> TableView | None:
    """A table with its source, unless it has one."""
    if view is None or view.source:
        return view
    return replace(view, source=TABLE_SOURCES.get(view.name, ""))


def sourced_figure(figure: DrawnFigure) -> DrawnFigure:
    """A figure with its source, unless it has one."""
    return figure if figure.source else replace(figure, source=FIGURE_SOURCES.get(figure.name, ""))
