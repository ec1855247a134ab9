"""The feature browser in Chromium: typing, filtering, keys, addresses, three widths, no serious barrier."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser


def until(page: Any, condition: str) -> None:
    """Wait for a condition; the page's own policy forbids Playwright's way of polling."""
    for _ in range(1200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def rows(page: Any) -> int:
    return int(page.locator("a.open").count())


def test_list_and_address_follow_each_key(tab: Callable[..., Any], served: str) -> None:
    page = tab()
    page.goto(f"{served}/features?arm=control")
    assert rows(page) == 50
    page.keyboard.press("/")
    page.keyboard.type("#95")
    page.wait_for_url(re.compile(r"/features\?arm=control&q=%2395$"))
    assert rows(page) == 1
    other = tab()
    other.goto(page.url)
    assert other.input_value("#q") == "#95" and rows(other) == 1
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/features/control/95"))
    page.keyboard.press("u")
    page.wait_for_url(re.compile(r"/features\?q=%2395&arm=control"))
    assert page.input_value("#q") == "#95"
    assert page.messages == [] and other.messages == []


def test_filters_say_how_many_they_leave(tab: Callable[..., Any], served: str) -> None:
    page = tab()
    page.goto(f"{served}/features?arm=control")
    page.keyboard.press("f")
    option = page.locator("select[name=domain] option[value=yes]").text_content()
    n = int(re.search(r"\((\d+)\)", option)[1])  # type: ignore[index]
    page.select_option("select[name=domain]", "yes")
    until(page, f"document.getElementById('total').textContent.startsWith('{n} feature')")
    page.wait_for_url(re.compile("domain=yes"))
    assert page.locator(".active-filters li").count() == 1
    page.go_back()
    until(page, "document.getElementById('total').textContent.startsWith('96 features')")
    assert page.input_value("select[name=domain]") == ""
    page.fill("input[name=p_max]", "0.5")
    until(page, "location.search.includes('p_max=0.5')")
    page.click("#clear")
    until(page, "location.search === ''")
    assert page.input_value("input[name=p_max]") == "" and page.messages == []


def test_keys_turn_pages_and_walk_through_features(tab: Callable[..., Any], served: str) -> None:
    page = tab()
    page.goto(f"{served}/features?arm=control&sort=feature")
    page.keyboard.press("n")
    until(page, "document.querySelectorAll('a.open').length === 46")
    page.keyboard.press("p")
    until(page, "document.querySelectorAll('a.open').length === 50")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/features/control/1\\?"))
    page.keyboard.press("j")
    page.wait_for_url(re.compile("/features/control/2\\?"))
    page.keyboard.press("k")
    page.wait_for_url(re.compile("/features/control/1\\?"))


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark"), (2560, "light")])
def test_pages_fit_and_have_no_serious_barrier(
    tab: Callable[..., Any], served: str, barriers: Callable[..., Any], width: int, scheme: str
) -> None:
    page = tab(width, color_scheme=scheme)
    for path in ("/features?arm=control&coherence_min=-1", "/features/treatment/3"):
        page.goto(served + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        assert barriers(page) == [], path
    assert page.messages == []


def test_reading_both_models_from_the_page(
    tab: Callable[..., Any], run_copy: Path, serve_run: Callable[..., Any]
) -> None:
    with serve_run(run_copy) as url:
        page = tab()
        page.goto(f"{url}/features/control/3")
        assert page.locator(".bars.bottom").count() == 0
        page.click("#read-both")
        page.wait_for_selector(".bars.bottom", timeout=300_000)
        assert page.locator("#reading").count() == 0 and page.messages == []


def test_without_scripts_the_form_still_searches(tab: Callable[..., Any], served: str) -> None:
    page = tab(java_script_enabled=False)
    page.goto(f"{served}/features")
    page.fill("#q", "#95")
    page.click(".ask button")
    assert rows(page) == 3
