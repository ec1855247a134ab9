"""A table and a figure of the report from outside the package: each is a function and one line in its registry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from page_parser import Page
from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report import ReportContext, draw_figures, render_report
from saeffect.report.figures.style import Drawing, FigureKind, new_figure
from saeffect.report.tables import TABLES, TableView
from saeffect.report.tables.view import Cell, Column, Row


def densest(comparison: Comparison, _context: ReportContext) -> TableView:
    """The share of tokens on which each arm's densest domain feature fires."""
    shares = comparison.activity.groupby("arm", sort=False)["density"].max()
    rows = tuple(
        Row(str(arm), (Cell.value(share, "share"),), strong=arm == "treatment") for arm, share in shares.items()
    )
    return TableView(
        "densest",
        "The densest feature <b>of each arm</b>",
        (Column("Fires on", "share of tokens"),),
        rows,
        corner="Arm",
        note="[[figure:densities]] draws them; see [[table:table1]] too.",
        source="comparison/activity.parquet, columns arm, density",
        terms=("density",),
    )


def densities(comparison: Comparison, _context: ReportContext) -> Drawing:
    """One bar an arm."""
    shares = comparison.activity.groupby("arm", sort=False)["density"].max()
    if shares.empty:
        raise Undefined("no feature was read.")
    figure = new_figure(2.0)
    figure.subplots().bar(list(map(str, shares.index)), shares.to_list())
    return Drawing(figure, "Shares are of all tokens.", "One bar an arm.")


def test_added_table_and_figure_are_shown_and_numbered(
    comparison: Comparison, context: ReportContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLES, "densest", densest)
    kinds = [FigureKind(name, "How often they fire", densities) for name in ("densities", "never")]
    monkeypatch.setattr("saeffect.report.figures.FIGURES", kinds[:1])  # alone, since drawing all takes long
    (never,) = kinds[1].drawn(replace(comparison, activity=comparison.activity.iloc[:0]), context)
    assert (never.figure, never.reason) == (None, "no feature was read.")
    page = render_report(comparison, context=context, figures=[*draw_figures(comparison, context), never])
    section = page[page.index('<section id="further"') : page.index('<section id="methods"')]
    for once in ('id="table-densest"', 'id="figure-densities"'):
        assert page.count(once) == 1 and once in section
    assert "figure-never" not in page
    n_tables = sum(f'id="table-{name}"' in page for name in TABLES)
    assert f"<b>Table {n_tables}.</b> The densest feature &lt;b&gt;of each arm&lt;/b&gt;." in section
    assert 'href="#figure-densities"' in section and 'href="#table-table1"' in section and "</svg>" in section
    assert section.index("Table") < section.index("Figure")
    parsed = Page(page)
    assert (parsed.unbalanced, parsed.open) == ([], [])
