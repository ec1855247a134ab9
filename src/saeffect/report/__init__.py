"""The report: what a study found, in sentences, tables and figures, on one self-contained page.

In: a comparison (`saeffect.comparison.Comparison`), which `with_answer` puts into words, and a `ReportContext` with
the study around it. Out: `answer` and `threats`, tables as CSV and JSON, figures as SVG and PNG, and `report.html`.
"""

from __future__ import annotations

from saeffect.report.context import ReportContext, SteeringResults
from saeffect.report.figures import DrawnFigure, draw_figures, write_figures
from saeffect.report.html import render_report, write_report
from saeffect.report.tables.write import write_tables
from saeffect.report.words.answer import with_answer

__all__ = [
    "DrawnFigure",
    "ReportContext",
    "SteeringResults",
    "draw_figures",
    "render_report",
    "with_answer",
    "write_figures",
    "write_report",
    "write_tables",
]
