"""The words of the sections: the linked paragraph, and the threats to quote."""

from __future__ import annotations

import re
from html import unescape

import pandas as pd
from markupsafe import escape

from page_parser import Page
from saeffect.comparison import Comparison
from saeffect.report.sections import gravest, threat_summary, traced_paragraph


def test_the_pieces_are_the_paragraph(comparison: Comparison) -> None:
    pieces = traced_paragraph(comparison.answer, set())
    assert "".join(piece.text for piece in pieces) == comparison.answer["paragraph"]
    assert {piece.anchor for piece in pieces} == {""}  # a page without ids has nothing to link to
    assert sum(bool(piece.source) for piece in pieces) == len(comparison.answer["traces"])


def test_numbers_link_to_their_row_or_table(comparison: Comparison) -> None:
    first = comparison.answer["traces"][0]
    assert first["row"] == {"quantity": "domain_share", "comparison": "fine-tuning"}

    def anchor(ids: set[str]) -> str:
        return next(piece.anchor for piece in traced_paragraph(comparison.answer, ids) if piece.source)

    assert anchor({"row-glance-domain_share", "table-contrasts"}) == "row-glance-domain_share"
    assert anchor({"table-contrasts"}) == "table-contrasts"


def test_every_number_of_the_page_leads_somewhere(page: str, comparison: Comparison) -> None:
    paragraph = page[page.index('<p class="paragraph">') :]
    paragraph = paragraph[: paragraph.index("</p>")]
    links = re.findall(r'<a class="trace" href="#([^"]+)"', paragraph)
    assert len(links) == len(comparison.answer["traces"])
    assert set(links) <= {a.get("id") for _, a in Page(page).elements}
    outside = unescape(re.sub(r"<a .*?</a>|<[^>]+>", "", paragraph))
    assert not re.search(r"\d", outside)


def threats(*severities: str) -> pd.DataFrame:
    return pd.DataFrame({"severity": severities, "threat": [f"threat {i}" for i, _ in enumerate(severities)]})


def test_the_summary_counts_threats_by_severity() -> None:
    assert threat_summary(threats("serious", "moderate", "minor", "minor")).startswith(
        "1 serious, 1 moderate and 2 minor"
    )
    assert "overturn" in threat_summary(threats("minor"))
    assert "overturn" not in threat_summary(threats("serious"))


def test_serious_threats_are_quoted_else_the_first() -> None:
    assert gravest(threats("serious", "moderate", "minor")) == ["threat 0"]
    assert gravest(threats(*["serious"] * 7)) == [f"threat {i}" for i in range(5)]
    assert gravest(threats(*["minor"] * 5)) == ["threat 0", "threat 1", "threat 2"]


def test_threats_have_remedy_and_source(page: str, comparison: Comparison) -> None:
    table = page[page.index('id="table-threats"') :]
    for row in comparison.threats.head(3).to_dict("records"):
        assert escape(row["remedy"]) in table
        assert f"seen in {row['source']}" in table
