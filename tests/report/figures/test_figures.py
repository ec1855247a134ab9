from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison import Comparison
from saeffect.report import DrawnFigure, ReportContext, draw_figures, write_figures
from saeffect.report.figures import FIGURES, drawn_into
from saeffect.report.figures.style import Figure, arm_styles, inline_svg, new_figure, safe_text

Compare = Callable[[dict], Comparison]
NAMES = (
    "learned",
    "where",
    "written",
    "put_back",
    "crossed",
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
WITH_PNG = ("learned", "where", "coherence", "fates_by_decoder", "partial_residuals")
"""Of these the PNG is rendered too; some are laid out and some are not."""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    comparison: Comparison,
    context: ReportContext,
    figures: tuple[DrawnFigure, ...],
) -> Path:
    """The fixture `figures`, written, of each third one its PNG."""
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saeffect.report.figures.draw_figures", lambda *_: figures)
        for figure in figures:
            if figure.name not in WITH_PNG:
                patch.setitem(figure.__dict__, "png", b"")
        write_figures(comparison, folder, context=context)
    return folder


def test_each_figure_is_there_in_both_formats(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{n}.{e}" for n in NAMES for e in ("png", "svg"))
    for name in WITH_PNG:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_svg_text_stays_text(folder: Path) -> None:
    root = ElementTree.parse(folder / "match_counts.svg").getroot()
    texts = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"control", "treatment", "placebo", "domain features"} <= texts


def test_drawn_twice_the_bytes_are_equal(folder: Path, comparison: Comparison, context: ReportContext) -> None:
    again = draw_figures(comparison, context, only=WITH_PNG)
    assert tuple(figure.name for figure in again) == WITH_PNG
    for figure in again:
        assert figure.svg == (folder / f"{figure.name}.svg").read_text(encoding="utf-8"), figure.name
        assert figure.png == (folder / f"{figure.name}.png").read_bytes(), figure.name


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
    table1 = pd.DataFrame({"arm": [f"arm {i}" for i in range(5)], "role": roles})
    styles = list(arm_styles(SimpleNamespace(table1=table1)).values())  # type: ignore[arg-type]
    for field in ("colour", "marker", "line"):
        assert len({str(getattr(style, field)) for style in styles}) == len(styles), field


def test_without_data_a_figure_says_why(
    tmp_path: Path, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [kind for kind in FIGURES if kind.name in ("effects", "doses", "coherence", "match_counts")]
    monkeypatch.setattr("saeffect.report.figures.FIGURES", kept)
    figures = {figure.name: figure for figure in write_figures(comparison, tmp_path)}
    assert figures["effects"].reason == "no feature was tested by steering."
    assert figures["doses"].reason == "no dose search was recorded."
    assert figures["coherence"].reason == "no domain feature has a value of coherence."
    assert figures["doses"].svg == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["match_counts.png", "match_counts.svg"]


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
    named = [figure for figure in figures if figure.name in ("effects_b", "match_counts", "contrasts")]
    assert len(named) == 3
    for figure in named:
        assert "<b>" not in figure.svg
        assert "\u202e" not in figure.svg
    drawn = ElementTree.fromstring(named[1].svg)
    assert safe_text(name) in {"".join(node.itertext()) for node in drawn.iter() if node.tag.endswith("}text")}
    assert safe_text(name) == "<b>$x$ & U+202E□"


def test_densities_are_drawn_to_scale(figures: tuple[DrawnFigure, ...], comparison: Comparison) -> None:
    density = next(figure for figure in figures if figure.name == "density")
    values = comparison.activity.query("arm == 'control' and density > 0")["density"]
    assert f"control has median {100 * np.median(values):.3f}" in density.alt


def test_svg_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[object] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: (saved.append(args[0]), save(*args, **options)))
    drawn = DrawnFigure("x", "", figure=new_figure(1))
    assert drawn.svg.startswith("<?xml")
    assert inline_svg(drawn).startswith("<svg")
    assert saved == [drawn.figure]


def test_a_figure_goes_into_the_place_of_axes(comparison: Comparison, context: ReportContext) -> None:
    whole = Figure(figsize=(8, 4))
    left, right = whole.subplots(1, 2)
    with drawn_into(right):
        (drawn,) = draw_figures(comparison, context, only=["contrasts"])
    assert drawn.figure is not None and drawn.figure in whole.subfigs
    assert left in whole.axes and right not in whole.axes and set(drawn.figure.axes) <= set(whole.axes)
    (alone,) = draw_figures(comparison, context, only=["contrasts"])  # afterwards a figure is its own again
    assert alone.figure is not None and not whole.subfigs[1:]
