from __future__ import annotations

import re
from html import unescape

from page_parser import Page
from saeffect.comparison import Comparison
from saeffect.report.traced import traced_paragraph


def test_the_pieces_are_the_paragraph(comparison: Comparison) -> None:
    pieces = traced_paragraph(comparison.answer, set())
    assert "".join(piece.text for piece in pieces) == comparison.answer["paragraph"]
    assert {piece.anchor for piece in pieces} == {""}  # a page without ids has nothing to link to
    assert sum(bool(piece.source) for piece in pieces) == len(comparison.answer["traces"])


def test_a_number_links_to_its_row_or_else_to_its_table(comparison: Comparison) -> None:
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


def test_an_answer_of_before_has_no_links(comparison: Comparison) -> None:
    old = {key: value for key, value in comparison.answer.items() if key != "traces"}
    assert [piece.text for piece in traced_paragraph(old, set())] == [comparison.answer["paragraph"]]  # type: ignore[arg-type]
