"""The sections on evidence, drawn and written for a study with matches, and for studies that lack what they need."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from page_parser import Page
from saeffect.comparison import Comparison, MatchTables
from saeffect.report import DrawnFigure, ReportContext, render_report, write_tables

SECTIONS = (
    *("answer", "separate", "chance", "steering", "sentences", "tables", "figures", "features", "fates", "activity"),
    *("regression", "threats", "design", "methods", "provenance"),
)
DRAWN = (
    "calibration",
    "fates_by_decoder",
    "fates_by_activation",
    "cross_activity",
    "partial_residuals",
)


@pytest.fixture(scope="module")
def pictures(figures: tuple[DrawnFigure, ...]) -> dict[str, DrawnFigure]:
    return {one.name: one for one in figures}


def whole(page: str) -> str:
    """A page that is whole, whatever is missing from the study."""
    assert Page(page).unbalanced == []
    assert not re.search(r">\s*nan\b|\bnan\s*<|\bNone\b<", page, flags=re.IGNORECASE)
    return page


def section(page: str, name: str) -> str:
    start = page.index(f'<section id="{name}"')
    ends = [page.find(f'<section id="{other}"', start + 1) for other in SECTIONS]
    return page[start : min([end for end in ends if end > start], default=len(page))]


def test_sections_and_their_links_are_in_one_order(page: str) -> None:
    places = [page.index(f'<section id="{name}"') for name in SECTIONS]
    assert places == sorted(places)
    links = re.findall(r'<a href="#(\w+)">', page[page.index("<nav") : page.index("</nav>")])
    assert tuple(links) == SECTIONS


def test_the_paragraph_stands_at_the_top(page: str, comparison: Comparison) -> None:
    text = "".join(Page(page).texts).replace("\u00a0", " ")
    assert comparison.answer["paragraph"] in text
    assert page.index('class="paragraph"') < page.index('id="table-glance"')


def test_evidence_names_its_source_files(page: str) -> None:
    for name in ("chance", "fates", "activity", "regression", "threats"):
        part = section(page, name)
        n_tables, n_figures = part.count("<table"), part.count("<figcaption>")
        assert n_tables, name
        assert len(re.findall(r"Source: (?:comparison|arms)/", part)) == n_tables + n_figures, name


def test_new_terms_are_explained_where_they_first_appear(page: str) -> None:
    for name, terms in {
        "answer": ("null fine-tune",),
        "separate": ("95\u202f% interval",),
        "chance": ("calibration", "nominal rate", "Wilson interval", "power", "by chance"),
        "tables": ("Newcombe interval", "hierarchical bootstrap", "difference-in-differences", "Cliff's delta"),
        "fates": ("counterpart", "kept, moved, gone, new", "absorbed", "mutual nearest neighbour", "excess"),
        "regression": ("HC3 errors", "cluster-robust errors", "partial residual"),
    }.items():
        part = section(page, name).replace("&#39;", "'")
        for term in terms:
            assert f"<dt>{term}</dt>" in part, (name, term)


def test_figures_are_drawn_and_say_what_they_show(pictures: dict[str, DrawnFigure]) -> None:
    assert all(pictures[name].figure is not None for name in DRAWN)
    flow = pictures["fates_by_decoder"]
    assert (
        "+14 gone (95 % interval 8 to 20, which excludes zero) and +11 new (95 % interval −1 to 23, which includes"
        in (flow.caption)
    )
    assert "1 moved, 2 gone, 1 absorbed, 3 new" in flow.caption
    drawn = re.findall(r">([^<>]+)</text>", flow.svg)
    assert {"kept", "moved", "absorbed", "gone", "new"} <= set(drawn)
    # 60 gone by similarity, one of them absorbed by others; 46 between seeds
    assert any(text.startswith("59 (") for text in drawn)
    assert any(text.startswith("46 (") for text in drawn)
    activity = pictures["cross_activity"]
    assert "7 of 118 features fire more strongly in the fine-tuned model and 2 more weakly" in activity.alt
    assert "of the 10 medical features 5 and 2" in activity.alt
    assert "Not drawn: 1 that fire in one model only." in activity.caption


def test_all_tables_are_written(tmp_path: Path, comparison: Comparison) -> None:
    write_tables(comparison, tmp_path)
    for name in (
        "calibration",
        "by_chance",
        "power",
        "regression",
        "partial_residuals",
        "threats",
        *MatchTables.names(),
    ):
        assert (tmp_path / f"{name}.csv").is_file(), name
        assert (tmp_path / f"{name}.json").is_file(), name
    threats = pd.read_csv(tmp_path / "threats.csv")
    assert threats["threat"].tolist() == comparison.threats["threat"].tolist()


def test_nothing_was_matched(unmatched_page: str) -> None:
    page = whole(unmatched_page)
    assert "Features were not matched in this study" in section(page, "fates")
    assert "was not applied to the fine-tuned model" in section(page, "activity")
    assert "<table" not in section(page, "fates")


def test_no_placebo_arm(page_without_placebo: str) -> None:
    page = whole(page_without_placebo)
    assert "There is no placebo arm, so nothing here separates fine-tuning from SAE noise." in page
    assert "What cannot be concluded." in section(page, "chance")
    assert "one SAE of the control" in section(page, "chance")
    assert "No feature can be called kept, moved, gone or new" in section(page, "fates")
    assert "Serious" in section(page, "threats")


def test_nothing_steered(unsteered_page: str) -> None:
    page = whole(unsteered_page)
    assert "What cannot be concluded." in section(page, "regression")
    assert "nothing was steered" in section(page, "regression")
    assert "Not drawn: there is no regression to draw: nothing was steered" in section(page, "regression")


def test_empty_tables_with_columns(comparison: Comparison, context: ReportContext) -> None:
    emptied = MatchTables(**{name: getattr(comparison.matches, name).head(0) for name in MatchTables.names()})
    bare = replace(comparison, matches=emptied, calibration=comparison.calibration.head(0))
    page = whole(render_report(bare, context=context, figures=()))
    assert "Features were not matched" in section(page, "fates")


def test_hostile_tokens_stay_text(page: str) -> None:
    part = section(page, "activity") + section(page, "fates")
    assert "&lt;script&gt;" in part
    assert "<script>" not in part
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b-\u200f]", part)
