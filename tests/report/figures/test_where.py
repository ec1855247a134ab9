"""Pictures of where a model changed and of the words that it writes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.axes import Axes

from saeffect.errors import Undefined
from saeffect.report import ReportContext
from saeffect.report.figures.style import PAPER, ROLE_STYLES, DrawnFigure, FigureKind
from saeffect.report.figures.where import where, written
from synthetic_where import where_tables, with_tables

CONTEXT = ReportContext()


def marks(ax: Axes) -> list[str]:
    """Fill of the fine-tune's marks, the first word first."""
    found = [
        line for line in ax.lines if line.get_marker() == ROLE_STYLES["treatment"].marker and len(line.get_xdata())
    ]
    return [str(line.get_markerfacecolor()) for line in found]


def texts(figure: DrawnFigure) -> set[str]:
    root = ElementTree.fromstring(figure.svg)
    return {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}


def test_layers_and_words_are_drawn_and_named():
    (drawing,) = FigureKind("where", "Where", where).drawn(with_tables(where_tables()), CONTEXT)
    assert len(drawing.figure.axes) == 3
    assert {"patients", "\\n", "<b>$x$", "fever", "layer", "nulls: median, range"} <= texts(drawing)
    assert "5 of 6 layers changed more than in any of them" in drawing.caption
    assert "Layer 5 changed most, by 12.0" in drawing.alt


def test_only_words_that_stand_out_are_filled():
    colour = ROLE_STYLES["treatment"].colour
    assert marks(where(with_tables(where_tables()), CONTEXT).figure.axes[1]) == [colour, colour, PAPER]
    assert marks(written(with_tables(where_tables()), CONTEXT).figure.axes[0]) == [colour, colour, PAPER]


def test_without_nulls_nothing_is_filled_or_claimed():
    drawing = where(with_tables(where_tables(nulls=False)), CONTEXT)
    assert set(marks(drawing.figure.axes[1])) == {PAPER}
    assert "nothing here can be called more" in drawing.caption
    assert "No mark is filled: no null fine-tunes" in written(with_tables(where_tables(nulls=False)), CONTEXT).caption
    assert "2 of 3 words stand out from the nulls" in written(with_tables(where_tables()), CONTEXT).caption


def test_nothing_changed():
    tables = where_tables()
    tables["change_by_layer"]["change"] = 0.0
    with pytest.raises(Undefined, match="the same at every layer"):
        where(with_tables(tables), CONTEXT)
    tables["written_words"]["change"] = -1.0
    with pytest.raises(Undefined, match="no word comes up more often"):
        written(with_tables(tables), CONTEXT)
