"""Numbers of tables and figures, in the order of the page, and references to them.

A text refers to a table or figure by name, `[[table:regression]]`; the page puts the number there, as a link.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup, escape

from saeffect.report.figures import DrawnFigure
from saeffect.report.tables.view import TableView

__all__ = ["Numbering", "number_page"]

_REFERENCE = re.compile(r"\[\[((?:table|figure):\w+)\]\]")


@dataclass(frozen=True)
class Numbering:
    """What each table and figure of a page is called.

    Attributes:
        labels: By "table:<name>" or "figure:<name>", for instance "Table 3" or "Figure 2b".
    """

    labels: Mapping[str, str]

    def refer(self, text: str) -> Markup:
        """A text with its references as links; everything else is escaped.

        Example:
            >>> Numbering({"table:power": "Table 4"}).refer("See [[table:power]] & more.")
            Markup('See <a class="ref" href="#table-power">Table\\xa04</a> &amp; more.')
        """
        pieces = _REFERENCE.split(text)  # text and name in turns
        return Markup("").join(escape(one) if i % 2 == 0 else self._link(one) for i, one in enumerate(pieces))

    def _link(self, key: str) -> Markup:
        if key not in self.labels:
            return Markup("a part that this report lacks")
        label = self.labels[key].replace(" ", "\u00a0")
        return Markup('<a class="ref" href="#{}">{}</a>').format(key.replace(":", "-"), label)


def number_page(tables: Iterable[TableView], figures: Iterable[DrawnFigure]) -> Numbering:
    """Number what stands on a page.

    Args:
        tables: In page order.
        figures: In page order; neighbours of one group share a number and are told apart by letters.
    """
    labels = {f"table:{view.name}": f"Table {n}" for n, view in enumerate(tables, start=1)}
    n = 0
    for group, some in groupby(figures, key=lambda figure: figure.group):
        members = list(some)
        if not group:
            for figure in members:
                n += 1
                labels[f"figure:{figure.name}"] = f"Figure {n}"
            continue
        n += 1
        for place, figure in enumerate(members):
            labels[f"figure:{figure.name}"] = f"Figure {n}{_letter(place) if len(members) > 1 else ''}"
    return Numbering(labels)


def _letter(place: int) -> str:
    """a to z, then aa, ab, ...

    Example:
        >>> _letter(1), _letter(27)
        ('b', 'ab')
    """
    return (_letter(place // 26 - 1) if place >= 26 else "") + chr(ord("a") + place % 26)
