"""The report's tables. In: a comparison and the study around it. Out: what the page shows, and CSV and JSON files.

A table of the page is a function that gives a `TableView`, and an entry in `TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext
from saeffect.report.tables.evidence import calibration_table, chance_table, power_table, regression_table, threat_table
from saeffect.report.tables.learned import learned_table, openings, pushed
from saeffect.report.tables.matching import cross_table, fate_table, notable_table, stagewise_table
from saeffect.report.tables.paper import at_a_glance, contrast_table, paper_table_1, paper_table_2
from saeffect.report.tables.review import agreement_table, rater_table
from saeffect.report.tables.steering import baseline_table, dose_table, outcome_table, together_table
from saeffect.report.tables.study import design_table, gate_table
from saeffect.report.tables.view import TableView

__all__ = ["TABLES", "TableView"]

TABLES: dict[str, Callable[[Comparison, ReportContext], TableView | None]] = {
    "learned": learned_table,
    "openings": openings,
    "pushed": pushed,
    "glance": at_a_glance,
    "calibration": calibration_table,
    "by_chance": chance_table,
    "power": power_table,
    "outcomes": outcome_table,
    "baselines": baseline_table,
    "together": together_table,
    "doses": dose_table,
    "table1": paper_table_1,
    "table2": paper_table_2,
    "contrasts": contrast_table,
    "raters": rater_table,
    "agreement": agreement_table,
    "fates": fate_table,
    "notable": notable_table,
    "cross": cross_table,
    "stagewise": stagewise_table,
    "regression": regression_table,
    "threats": threat_table,
    "design": design_table,
    "gate": gate_table,
}
"""By name, in the order of the page, which numbers them; None for a table that a study does not have.

One that no section of the page names comes last, under "Further"."""
