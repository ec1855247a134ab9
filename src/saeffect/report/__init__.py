"""Tables, figures and the report: what a study found, for people to read."""

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
