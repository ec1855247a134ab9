"""The playground in a real browser: over a tiny run, and over the embedded pair."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

Tab = Callable[..., Any]


def until(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait in this process: the page's policy lets nobody evaluate strings."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return value


def status(page: Any) -> str:
    return str(page.inner_text("#status"))


def open_play(page: Any, url: str, query: str = "") -> None:
    page.goto(f"{url}/play{query}", wait_until="domcontentloaded")
    until(lambda: status(page) == "Ready." or page.is_visible("#model-trouble") or status(page).startswith("Done"))


def run_it(page: Any) -> None:
    page.click("#run")
    until(lambda: page.is_visible("#stop") or status(page).startswith("Done"))
    until(lambda: page.is_hidden("#stop"))


def texts(page: Any) -> list[str]:
    return [str(text) for text in page.locator(".answer .text").all_inner_texts()]


@pytest.mark.parametrize("width", [360, 1440])
def test_choose_run_placebo_keep_compare(served: str, tab: Tab, width: int) -> None:
    page = tab(width)
    open_play(page, served)
    page.fill("#prompt", "My doctor said")
    page.fill("#max_new_tokens", "6")
    page.select_option("#arm", "control")
    # With the keyboard alone: search, take the first.
    page.focus("#find")
    page.keyboard.type("a")
    page.wait_for_selector("#found li b")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#chosen li").count() == 1
    run_it(page)
    assert status(page).startswith("Done in")
    assert page.locator(".side").count() == 2 and len(texts(page)) == 4
    page.click("#placebo")
    until(lambda: len(texts(page)) == 6 and page.is_hidden("#stop"))
    page.wait_for_url(re.compile("placebo=matched"))
    page.click("#keep")
    until(lambda: page.locator("#kept-list li").count() >= 1)
    before = texts(page)
    # Whoever opens the address gets the same.
    other = tab(width)
    other.goto(page.url, wait_until="domcontentloaded")
    until(lambda: status(other).startswith("Done"))
    assert texts(other) == before
    page.locator("#kept-list input").first.check()
    page.click("#compare button[type=submit]")
    page.wait_for_selector("article")
    assert texts(page) == before
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.messages == [] and other.messages == []


def test_stop_and_go_on(served: str, tab: Tab) -> None:
    page = tab()
    open_play(page, served)
    page.fill("#max_new_tokens", "110")
    page.uncheck("#ends") if page.is_visible("#ends") else None
    page.click("#run")
    page.wait_for_selector(".answer .text span", state="attached")
    page.keyboard.press("Escape")
    until(lambda: page.is_hidden("#stop"))
    assert status(page).startswith(("Stopped", "Done"))
    page.fill("#max_new_tokens", "3")
    run_it(page)
    assert status(page).startswith("Done") and page.messages == []


def test_a_model_that_is_gone_is_said(run_copy: Path, serve_run: Callable[..., Any], tab: Tab) -> None:
    file = run_copy / "study.yaml"
    text = file.read_text(encoding="utf-8")
    model = next(line.split(": ")[1] for line in text.splitlines() if line.strip().startswith("path:"))
    file.write_text(text.replace(model, model + "-gone"), encoding="utf-8")
    with serve_run(run_copy) as url:
        page = tab()
        open_play(page, url)
        assert "Everything else in this app works" in page.inner_text("#model-trouble")
        assert "-gone" in page.inner_text("#model-what")


def test_no_serious_barrier(served: str, chromium: Any, barriers: Callable[..., Any]) -> None:
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, bypass_csp=True)
    try:
        for theme in ("light", "dark"):
            page = context.new_page()
            context.add_cookies([{"name": "theme", "value": theme, "url": served}])
            open_play(page, served, "?arm=control&feature=3&prompt=My+doctor&max_new_tokens=3")
            assert barriers(page) == []
    finally:
        context.close()


@pytest.mark.real
def test_the_embedded_pair_answers(real_run: Path, serve_run: Callable[..., Any], tab: Tab) -> None:
    import pandas as pd

    features = pd.read_parquet(real_run / "arms" / "control" / "features.parquet").set_index("feature")
    selection = pd.read_parquet(real_run / "arms" / "control" / "selection.parquet")
    domain = features.loc[selection.loc[selection["is_domain"], "feature"]]
    feature = int(domain["density"].idxmax())
    with serve_run(real_run) as url:
        page = tab()
        open_play(page, url, f"?arm=control&feature={feature}")
        page.check('input[name="chat"][value="1"]', force=True)
        page.check('input[name="placebo"][value="matched"]', force=True)
        page.fill("#prompt", "How are you today?")
        page.fill("#max_new_tokens", "12")
        page.fill("#dose", "0.8")
        run_it(page)
        assert status(page).startswith("Done")
        found = texts(page)
        assert len(found) == 6 and all(found) and found[0] != found[1] and found[1] != found[2]
        # The push brings about words at which the feature fires, and these are tinted.
        assert page.locator(".answer.c-steered .text span[class^=a]").count() > 0
        assert page.messages == []
