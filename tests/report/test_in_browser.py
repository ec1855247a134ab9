"""The report in a real browser: nothing runs, nothing loads, nothing sticks out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def at_width(chromium: Any, page: str, tmp_path: Path) -> Any:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")

    def open_page(width: int, **options: Any) -> tuple[Any, list[str]]:
        tab = chromium.new_context(viewport={"width": width, "height": 900}, **options).new_page()
        tab.set_default_timeout(120_000)
        messages: list[str] = []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else messages.append(request.url),
        )
        tab.goto(file.as_uri())
        return tab, messages

    return open_page


def test_nothing_hostile_runs_and_nothing_is_loaded(at_width: Any) -> None:
    tab, messages = at_width(1280)
    assert tab.evaluate("[typeof window.__pwned, document.scripts.length]") == ["undefined", 1]
    assert messages == []


def test_a_phone_needs_no_sideways_scrolling(at_width: Any) -> None:
    tab, _ = at_width(360)
    tab.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("width", [390, 1280])
def test_tables_fit_phone_and_desktop(at_width: Any, width: int) -> None:
    tab, _ = at_width(width)
    tab.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    wide = (
        "[...document.querySelectorAll('.table-scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.id)"
    )
    assert tab.evaluate(wide) == []


def test_print_unfolds_hides_controls_and_fits(at_width: Any) -> None:
    tab, _ = at_width(688)  # an A4 page within its margins
    tab.emulate_media(media="print")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("document.documentElement.scrollWidth") == 688
    assert not tab.is_visible("nav")
    assert not tab.is_visible("#tools")
    assert tab.is_visible("#row-contrasts-domain_share")
    pdf = tab.pdf(prefer_css_page_size=True, format="A4")
    assert pdf.startswith(b"%PDF")


def test_a_number_of_the_answer_leads_to_its_row(at_width: Any) -> None:
    tab, _ = at_width(1280)
    tab.click(".paragraph a.trace >> nth=0")
    assert tab.evaluate("location.hash") == "#row-glance-domain_share"
    assert "contrasts.parquet" in tab.get_attribute(".paragraph a.trace >> nth=0", "title")


def test_search_filter_and_sort(at_width: Any, arms: dict) -> None:
    tab, _ = at_width(1280)
    shown = "[...document.querySelectorAll('.feature')].filter(f => f.checkVisibility()).length"
    total = sum(len(arm.domain) for arm in arms.values())
    assert tab.evaluate(shown) == total
    tab.select_option("#arm", "2")
    assert tab.evaluate(shown) == len(arms["treatment"].domain)
    tab.select_option("#state", "passed")
    assert tab.evaluate(shown) == int(arms["treatment"].effects["passed"].sum())
    tab.fill("#find", "no-such-token")
    assert tab.evaluate(shown) == 0
    assert tab.inner_text("#shown-count") == f"0 of {total} listed features"
    tab.select_option("#sort", "coherence")
    keys = tab.evaluate(
        "[...document.querySelectorAll('[data-list=\"1\"] .feature')].map(f => f.dataset.coherence).filter(Boolean).map(Number)"
    )
    assert keys == sorted(keys, reverse=True)
    assert len(keys) > 2


def test_it_can_be_read_without_its_script(at_width: Any) -> None:
    tab, _ = at_width(1280, java_script_enabled=False)
    assert not tab.is_visible("#tools")
    tab.click(".feature summary >> nth=0")
    assert tab.is_visible(".feature .numbers >> nth=0")
