from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from page_parser import Page
from saeffect.comparison import Comparison
from saeffect.lm.tokens import printable_token
from saeffect.report import DrawnFigure, ReportContext, render_report, write_report
from saeffect.report.cards import feature_lists, showcase
from synthetic_study import HOSTILE


@pytest.fixture(scope="module")
def parsed(page: str) -> Page:
    return Page(page)


def test_the_page_is_balanced(parsed: Page) -> None:
    assert (parsed.unbalanced, parsed.open) == ([], [])


def test_nothing_is_further_that_a_section_names(page: str) -> None:
    assert 'id="further"' not in page


def test_policy_allows_only_our_script(page: str, parsed: Page) -> None:
    assert parsed.count("script") == 1
    script = re.search(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_no_attribute_runs_or_loads_anything(parsed: Page) -> None:
    assert {name for name, _ in parsed.elements} & {"img", "iframe", "object", "embed", "b" + "ase"} == set()
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "action", "xlink:href"):
                assert (value or "").startswith(("#", "data:,")), (tag, name, value)
            assert "http" not in (value or "").replace("http-equiv", ""), (tag, name, value)


def test_the_style_sheet_loads_nothing(page: str) -> None:
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("token", HOSTILE, ids=ascii)
def test_hostile_tokens_are_escaped(token: str, parsed: Page) -> None:
    shown = printable_token(token).strip()
    assert any(text == shown or (text.endswith("…") and shown.startswith(text[:-1])) for text in parsed.isolated)


def test_nothing_that_acts_on_the_page_is_left(page: str) -> None:
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b-\u200f\x00-\x08]", page)
    assert page.count("<script") == 1
    assert "<b>bold</b>" not in page
    assert "49" not in re.findall(r"\{\{.*?\}\}|<bdi>(49)</bdi>", page)


def test_nothing_acts_from_title_prompts_sources_and_labels_either(
    comparison: Comparison, context: ReportContext, figures: tuple[DrawnFigure, ...]
) -> None:
    acting, shown = "a\x1b[31m\u202eb\u2066c\ufeffd", "aU+001B[31mU+202EbU+2066cU+FEFFd"
    hostile = replace(
        context,
        title=f"{acting}\ud800",
        prompts=tuple(f"{acting}{i}" for i, _ in enumerate(context.prompts)),
        facts=(("Text", acting),),
        examples={name: table.assign(source=acting) for name, table in context.examples.items()},
        arms={
            name: replace(arm, selection=arm.selection.assign(label=acting, n_yes=1))
            for name, arm in context.arms.items()
        },
        config=acting,
        provenance={acting: acting},
    )
    page = render_report(comparison, context=hostile, figures=figures)
    page.encode("utf-8")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert f"<title>{shown}U+D800</title>" in page and f"<h1>{shown}U+D800</h1>" in page
    isolated = Page(page).isolated
    assert shown in isolated and any(text.startswith(f"{shown}0") for text in isolated)


def test_the_answer_comes_first(page: str, comparison: Comparison) -> None:
    body = page[page.index("<main>") :]
    assert body.index('class="headline"') < body.index("<figure") < body.index("<table")
    assert "Fine-tuning taught the model the domain medical" in body[: body.index("<figure")]
    text = "".join(Page(page).texts)
    for sentence in (
        comparison.answer["headline"],
        *comparison.answer["sentences"],
        *comparison.answer["caveats"],
    ):
        assert sentence in text


def test_tables_have_captions_and_scoped_headings(parsed: Page) -> None:
    assert parsed.count("caption") == parsed.count("table") >= 6
    assert all(
        attributes.get("scope") in ("col", "row", "rowgroup") for tag, attributes in parsed.elements if tag == "th"
    )


def test_figures_have_their_words(parsed: Page, figures: tuple[DrawnFigure, ...]) -> None:
    labels = [a["aria-labelledby"] for tag, a in parsed.elements if tag == "svg" and a.get("role") == "img"]
    ids = {a.get("id") for _, a in parsed.elements}
    assert len(labels) == len(figures) == 20
    assert set(labels) <= ids


def test_ids_are_unique(parsed: Page) -> None:
    ids = [a["id"] for _, a in parsed.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_each_term_is_explained_once_before_the_glossary(page: str) -> None:
    before = page[: page.index('id="methods"')]
    explained = re.findall(
        r"<dt>([^<]+)</dt><dd>", "".join(re.findall(r'<dl class="terms">.*?</dl>', before, re.DOTALL))
    )
    assert len(explained) == len(set(explained))
    assert {"95\u202f% interval", "placebo arm", "effect", "q", "coherence", "density", "dose"} <= set(explained)


def test_same_bytes_twice(
    tmp_path: Path, page: str, comparison: Comparison, context: ReportContext, figures: tuple[DrawnFigure, ...]
) -> None:
    path = write_report(comparison, tmp_path / "report.html", context=context, figures=figures)
    assert path.read_bytes() == page.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_an_undefined_coherence_gives_its_reason(page: str) -> None:
    assert "<dt>Coherence</dt><dd>undefined: fewer than two top tokens are in the word vectors</dd>" in page


def test_every_domain_feature_is_listed_with_its_numbers(page: str, arms: dict) -> None:
    assert page.count('<details class="feature"') == sum(len(arm.domain) for arm in arms.values())
    best = arms["treatment"].effects.sort_values("effect").iloc[-1]
    first = page.index('<details class="feature"', page.index('data-list="2"'))
    assert f'<span class="id">{best["feature"]:.0f}</span>' in page[first : first + 900]
    assert f"+{best['effect']:.3f}" in page[first : first + 4000]


def test_the_list_is_capped_and_says_so(comparison: Comparison, context: ReportContext) -> None:
    page = render_report(comparison, context=replace(context, max_features=3), figures=())
    assert page.count('<details class="feature"') == 9
    assert page.count("The first 3 are listed here; all") == 3


@pytest.mark.parametrize("alpha", [0.05, -1.0])  # at -1 nothing passes
def test_the_examples_alone_are_those_of_the_whole_list(context: ReportContext, arms: dict, alpha: float) -> None:
    judged = {n: replace(a, effects=a.effects.assign(passed=a.effects["q"] <= alpha)) for n, a in arms.items()}
    given = replace(context, arms=judged)
    alone = feature_lists(given, list(arms), for_showcase=True)
    assert showcase(alone) == showcase(feature_lists(given, list(arms)))
    assert [len(one.cards) for one in alone] == [3, 3], "no other card is made"


def test_without_a_context(comparison: Comparison) -> None:
    page = render_report(comparison, figures=())
    assert Page(page).unbalanced == []
    assert "The tables of the arms were not handed to this report" in page
    assert "The quality of the SAEs is unknown" in page


def test_with_nothing_tested(unsteered_page: str) -> None:
    page = unsteered_page
    assert "undefined: no feature of control was steered" in page
    assert "undefined: this feature was not tested" in page
    assert "Not drawn: no feature was tested by steering." in page
    assert "no feature was steered in this study" in page
    assert not re.search(r">\s*nan\b", page, flags=re.IGNORECASE)


def test_with_no_domain_feature(
    arms: dict, context: ReportContext, compare_quickly: Callable[[dict], Comparison]
) -> None:
    none = {
        name: replace(
            arm,
            selection=arm.selection.assign(is_domain=False),
            effects=arm.effects.head(0),
            interventions=arm.interventions.head(0),
            direct_effects=arm.direct_effects.head(0),
        )
        for name, arm in arms.items()
    }
    page = render_report(compare_quickly(none), context=replace(context, arms=none), figures=())
    assert page.count("No feature of this arm is of the domain.") == 3
    assert Page(page).unbalanced == []
    assert not re.search(r">\s*nan\b", page, flags=re.IGNORECASE)


def test_a_flaw_of_the_design_leads_its_section(
    arms: dict, context: ReportContext, compare_quickly: Callable[[dict], Comparison]
) -> None:
    flawed = dict(arms)
    flawed["treatment"] = replace(arms["treatment"], facts=replace(arms["treatment"].facts, d_sae=999))
    page = render_report(compare_quickly(flawed), context=context, figures=())
    assert "the arms differ in features (d_sae): each of these could pass for an effect." in page
    table = page[page.index("How the arms differ") :]
    assert table.index("<td") < table.index("flaw") < table.index("intended")


def test_the_gate_table_says_where_a_number_is_missing(comparison: Comparison, context: ReportContext) -> None:
    names = ("explained_variance", "ce_loss_score", "l0", "l2_ratio", "dead_share", "n_tokens")
    gate = pd.DataFrame([{"arm": name, **dict.fromkeys(names, 0.5)} for name in comparison.table1["arm"]])
    gate = gate.assign(perplexity_domain=12.5)
    gate.loc[1, "explained_variance"] = float("nan")
    page = render_report(comparison, context=replace(context, gate=gate), figures=())
    row = page[page.index("Explained variance</th>") :]
    assert re.findall(r"0\.500|undefined: not measured", row)[:3] == ["0.500", "undefined: not measured", "0.500"]
    assert row[row.index("The model&#39;s perplexity, domain text</th>") :].count("<span>12.50") == 3


def test_a_big_study_stays_small(comparison: Comparison, context: ReportContext, page: str) -> None:
    """200 cards an arm may take 8 MB: no card may be larger than its share."""
    cards = re.findall(r'<details class="feature".*?</details>', page, flags=re.DOTALL)
    assert max(len(card.encode()) for card in cards) < 8_000_000 / 600
