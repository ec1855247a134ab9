from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saeffect.comparison import Comparison
from saeffect.report import DrawnFigure, ReportContext, draw_figures, write_figures
from saeffect.report.figures import style
from saeffect.report.figures.style import arm_styles, inline_svg, new_figure, png_bytes, safe_text, svg_text

Compare = Callable[[dict], Comparison]
NAMES = (
    "calibration",
    "effects_a",
    "effects_b",
    "effects_c",
    "doses",
    "match_counts",
    "top_token_weights",
    "mean_activation",
    "density",
    "coherence",
    "contrasts",
    "fates_by_decoder",
    "fates_by_activation",
    "cross_activity",
    "partial_residuals",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, comparison: Comparison, context: ReportContext) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    write_figures(comparison, folder, context=context)
    return folder


def test_each_figure_is_there_in_both_formats(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{n}.{e}" for n in NAMES for e in ("png", "svg"))
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG"), path.name


def test_svg_text_stays_text(folder: Path) -> None:
    root = ElementTree.parse(folder / "match_counts.svg").getroot()
    texts = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"control", "treatment", "placebo", "domain features"} <= texts


def test_drawn_twice_the_bytes_are_equal(folder: Path, figures: tuple[DrawnFigure, ...]) -> None:
    for figure in figures:
        assert svg_text(figure) == (folder / f"{figure.name}.svg").read_text(encoding="utf-8"), figure.name
    assert png_bytes(figures[0]) == (folder / f"{figures[0].name}.png").read_bytes()


def test_saved_twice_the_bytes_are_equal(figures: tuple[DrawnFigure, ...]) -> None:
    for figure in figures:
        assert svg_text(figure) == svg_text(figure), figure.name


def test_captions_count_what_is_drawn(figures: tuple[DrawnFigure, ...], comparison: Comparison) -> None:
    first = next(figure for figure in figures if figure.name == "match_counts")
    for row in comparison.table1.itertuples():
        zero = comparison.match_counts.query("arm == @row.arm and matches == 0")["n"].iloc[0]
        assert f"{row.arm} {zero} (" in first.caption
    effects = next(figure for figure in figures if figure.name == "effects_b")
    passed = comparison.table1.set_index("arm").loc["treatment", "passed"]
    assert f"treatment: {passed} of 10 pass" in effects.alt
    assert f"{passed} of 10 features pass" in effects.caption


def test_arms_differ_in_every_mark() -> None:
    roles = ["control", "treatment", "placebo", "placebo", "placebo"]
    styles = list(arm_styles([(f"arm {i}", role) for i, role in enumerate(roles)]).values())
    for field in ("colour", "marker"):
        assert len({getattr(style, field) for style in styles}) == len(styles), field
    assert len({str(style.line) for style in styles}) == len(styles)


def test_without_data_a_figure_says_why(tmp_path: Path, comparison: Comparison) -> None:
    figures = {figure.name: figure for figure in write_figures(comparison, tmp_path)}
    assert figures["effects"].reason == "no feature was tested by steering."
    assert figures["doses"].reason == "no dose search was recorded."
    assert not (tmp_path / "effects.svg").exists()
    assert (tmp_path / "match_counts.svg").exists()


def test_one_feature_can_be_drawn(arms: dict, context: ReportContext, compare_quickly: Compare) -> None:
    one = {}
    for name, arm in arms.items():
        keep = arm.effects["feature"].head(1)
        selection = arm.selection.assign(is_domain=arm.selection["feature"].isin(keep))
        one[name] = replace(arm, selection=selection, effects=arm.effects.head(1))
    figures = draw_figures(compare_quickly(one), replace(context, arms=one))
    assert [figure.name for figure in figures if figure.figure is not None] == list(NAMES[:-1])
    assert figures[-1].reason.startswith("there is no regression to draw:"), "three features and five terms"


def test_inline_svg_keeps_to_itself(figures: tuple[DrawnFigure, ...]) -> None:
    ids = []
    for figure in figures:
        text = inline_svg(figure)
        ElementTree.fromstring(text)  # one well-formed element
        assert not re.search(r"https?://|<style|<metadata|<!--|<script", text)
        ids += re.findall(r'\bid="([^"]+)"', text)
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {(i, "") for i in ids} | {
            ("", i) for i in ids
        }
    assert len(ids) == len(set(ids))


def test_a_hostile_arm_is_drawn_as_text(arms: dict, context: ReportContext, compare_quickly: Compare) -> None:
    name = "<b>$x$ & \u202e漢"
    hostile = {
        name if k == "treatment" else k: replace(a, name=name) if k == "treatment" else a for k, a in arms.items()
    }
    figures = draw_figures(compare_quickly(hostile), replace(context, arms=hostile))
    for text in map(svg_text, figures):
        assert "<b>" not in text
        assert "\u202e" not in text
    drawn = ElementTree.fromstring(svg_text(next(one for one in figures if one.name == "match_counts")))
    assert safe_text(name) in {"".join(node.itertext()) for node in drawn.iter() if node.tag.endswith("}text")}
    assert safe_text(name) == "<b>$x$ & U+202E□"


def test_densities_are_drawn_to_scale(figures: tuple[DrawnFigure, ...], comparison: Comparison) -> None:
    density = next(figure for figure in figures if figure.name == "density")
    values = comparison.activity.query("arm == 'control' and density > 0")["density"]
    assert f"control has median {100 * np.median(values):.3f}" in density.alt


def test_an_svg_is_drawn_once_for_the_file_and_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = DrawnFigure("x", "", "", "", new_figure(1))
    text, made = svg_text(drawn), []

    def counted(figure: DrawnFigure) -> str:
        made.append(figure)
        return text

    monkeypatch.setattr(style, "svg_text", counted)
    assert drawn.svg == text
    assert inline_svg(drawn).startswith("<svg")
    assert made == [drawn]
