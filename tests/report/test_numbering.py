"""Tables and figures are numbered in page order, and every reference finds its number."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import pytest

from page_parser import Page
from saeffect.comparison import Comparison
from saeffect.report import DrawnFigure, ReportContext, render_report
from saeffect.report.context import SteeringResults
from saeffect.report.html import Numbering, number_page
from saeffect.report.tables.view import TableView

_OF_PAPER = re.compile(r"the paper’s (?:Table|Figure) \d+")


def plain(page: str) -> str:
    body = page[page.index("<main>") : page.index("<script>")]
    return unescape(re.sub(r"<svg.*?</svg>|<[^>]+>", "", body, flags=re.DOTALL)).replace("\u00a0", " ")


def numbers(page: str, what: str) -> list[str]:
    """Numbers of captions in page order."""
    opening = {"Table": r"<caption[^>]*>\s*", "Figure": r"<figcaption>(?:<b>)?\s*"}[what]
    return re.findall(opening + rf"<b>{what} (\d+[a-z]?)", page.replace("\u00a0", " "))


def ascend_without_gaps(found: list[str]) -> None:
    at, letter = 0, ""
    for one in found:
        number, this = int(re.sub(r"\D", "", one)), re.sub(r"\d", "", one)
        if this and letter and number == at:
            assert ord(this) == ord(letter) + 1, found
        else:
            assert number == at + 1, found
            assert this in ("", "a"), found
        at, letter = number, this


def references_are_there(page: str) -> None:
    text = _OF_PAPER.sub("", plain(page))
    known = {f"Table {n}" for n in numbers(page, "Table")} | {f"Figure {n}" for n in numbers(page, "Figure")}
    said = re.findall(r"\b(?:Table|Figure) \d+[a-z]?", text)
    assert set(said) <= known
    assert "lacks" not in text
    assert "[[" not in text
    ids = {a.get("id") for _, a in Page(page).elements}
    links = {(a["href"] or "")[1:] for tag, a in Page(page).elements if tag == "a"}
    assert links <= ids


def test_numbers_ascend_without_gaps_and_references_exist(page: str, figures: tuple[DrawnFigure, ...]) -> None:
    tables, drawn = numbers(page, "Table"), numbers(page, "Figure")
    assert len(tables) == page.count("<caption") > 12
    assert len(drawn) == len(figures)
    ascend_without_gaps(tables)
    ascend_without_gaps(drawn)
    references_are_there(page)
    assert page.count('class="ref"') >= 7


def test_the_papers_own_names_stay_visible(page: str) -> None:
    text = plain(page)
    for name, title in (
        ("Table 1", "Domain features, and what steering them does"),
        ("Table 2", "Coherence of the domain features"),
        ("Figure 1", "How many medical words the features promote"),
        ("Figure 2", "How strongly domain features promote their top tokens"),
    ):
        assert re.search(rf"(Table|Figure) \d+a? \(the paper’s {name}\)\. {title}", text), name


@pytest.mark.parametrize("missing", ["unsteered_page", "page_without_placebo", "unmatched_page"])
def test_a_smaller_study_has_no_gaps_either(missing: str, request: pytest.FixtureRequest) -> None:
    whole(request.getfixturevalue(missing))


@pytest.mark.parametrize("steering", [None, SteeringResults(operator="ablate", dose=1.0)])
def test_a_bare_context_leaves_no_gaps(
    comparison: Comparison, context: ReportContext, figures: tuple[DrawnFigure, ...], steering: SteeringResults | None
) -> None:
    around = replace(context, steering=steering, doses=None) if steering else ReportContext()
    whole(render_report(comparison, context=around, figures=figures))


def whole(page: str) -> None:
    ascend_without_gaps(numbers(page, "Table"))
    ascend_without_gaps(numbers(page, "Figure"))
    references_are_there(page)


def test_neighbours_of_a_group_share_a_number() -> None:
    def figure(name: str, group: str = "") -> DrawnFigure:
        return DrawnFigure(name, "", "", "", None, group=group)

    drawn = [figure("a"), figure("b", "g"), figure("c", "g"), figure("d"), figure("e", "h")]
    table = TableView("t", "", (), ())
    labels = number_page([table], drawn).labels
    assert labels == {
        "table:t": "Table 1",
        "figure:a": "Figure 1",
        "figure:b": "Figure 2a",
        "figure:c": "Figure 2b",
        "figure:d": "Figure 3",
        "figure:e": "Figure 4",  # alone in its group: no letter
    }


def test_references_are_links_and_the_rest_escaped() -> None:
    numbering = Numbering({"figure:doses": "Figure 3"})
    assert numbering.refer("<i> [[figure:doses]] [[figure:none]] [[x]]") == (
        '&lt;i&gt; <a class="ref" href="#figure-doses">Figure\u00a03</a> a part that this report lacks [[x]]'
    )
