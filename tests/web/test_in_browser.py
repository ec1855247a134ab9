"""The app in Chromium: nothing hostile runs, nothing is loaded from elsewhere, every page can be used by everybody."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from saeffect.io import read_json, write_json
from saeffect.study.progress_file import ProgressFile
from saeffect.web.app import AREAS

pytestmark = pytest.mark.browser

HOSTILE = '<script>window.__pwned=1</script><img src=x onerror="window.__pwned=1">'
PATHS = [area.path for area in AREAS]


def opened(tab: Any, url: str) -> Any:
    tab.goto(url, wait_until="domcontentloaded")
    if tab.locator("#live").count():
        tab.wait_for_selector("#live[data-ready=yes]")
    return tab


@pytest.fixture(scope="module")
def hostile(site_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose study, tokens and answer try to run a script."""
    run = Path(shutil.copytree(site_run, tmp_path_factory.mktemp("hostile") / "run"))
    study = yaml.safe_load((run / "study.yaml").read_text())
    study["title"] = HOSTILE
    (run / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    answer = read_json(run / "comparison" / "answer.json")
    write_json(run / "comparison" / "answer.json", answer | {"headline": HOSTILE, "sentences": [HOSTILE]})
    for arm in (run / "arms").iterdir():
        features = pd.read_parquet(arm / "features.parquet")
        features["top_tokens"] = [
            [HOSTILE, "</script>", "javascript:alert(1)", *row[3:]] for row in features["top_tokens"]
        ]
        features.to_parquet(arm / "features.parquet", index=False)
    (run / "report.html").write_text(f"<!doctype html><title>x</title>{HOSTILE}<p id=there>report")
    return run


def test_nothing_hostile_runs(tab: Callable[..., Any], hostile: Path, serve_run: Callable[..., Any]) -> None:
    with serve_run(hostile) as url:
        for path in PATHS:
            page = opened(tab(), url + path)
            assert page.evaluate("typeof window.__pwned") == "undefined", path
            assert page.messages == [], path
        page = tab()
        page.goto(f"{url}/report", wait_until="domcontentloaded")
        assert page.locator("#there").count() == 1
        assert page.evaluate("typeof window.__pwned") == "undefined"
        assert page.evaluate("origin") == "null"


@pytest.mark.parametrize("width", [360, 1440, 2560])
def test_no_page_scrolls_sideways(tab: Callable[..., Any], served: str, width: int) -> None:
    for path in [*PATHS, "/nothing"]:
        page = opened(tab(width), served + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


# The areas' own tests look at their pages in the dark.
@pytest.mark.parametrize(("scheme", "paths"), [("light", PATHS), ("dark", ["/"])])
def test_axe_finds_nothing_serious(
    tab: Callable[..., Any], served: str, barriers: Callable[..., Any], scheme: str, paths: list[str]
) -> None:
    for path in [*paths, "/nothing", "/enter"]:
        page = opened(tab(1280, color_scheme=scheme, bypass_csp=True), served + path)
        assert barriers(page) == [], path


def test_the_keyboard_reaches_the_content_first(tab: Callable[..., Any], served: str) -> None:
    page = opened(tab(), served)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_dark_is_kept_and_written_by_the_server(tab: Callable[..., Any], served: str) -> None:
    page = opened(tab(color_scheme="light"), served)
    page.click("#theme")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(14, 18, 22)"
    page.goto(f"{served}/nothing", wait_until="domcontentloaded")
    assert page.get_attribute("html", "data-theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_a_page_follows_a_run(tab: Callable[..., Any], tmp_path: Path, serve_run: Callable[..., Any]) -> None:
    with serve_run(tmp_path) as url:
        page = opened(tab(), url)
        assert page.inner_text("h1") == "No study yet"
        with ProgressFile(tmp_path, "tiny", "A tiny study", ("gate a", "compare")) as file:
            file.begin("gate a")
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            page.wait_for_selector("text=A tiny study")
            assert page.inner_text(".s-running").startswith("gate a")
            file.begin("compare")
            page.wait_for_selector(".s-running >> text=compare")
        page.wait_for_selector("text=No study yet", timeout=30_000)
        assert page.messages == []


def test_a_rater_enters_by_a_link(tab: Callable[..., Any], site_run: Path, tmp_path: Path, serve_run: Any) -> None:
    from saeffect.web.access import Raters
    from saeffect.web.site import Settings

    run = Path(shutil.copytree(site_run, tmp_path / "run"))
    token = Raters(run).add("ada")
    with serve_run(run, Settings(host="0.0.0.0")) as url:
        page = tab()
        page.goto(url, wait_until="domcontentloaded")
        assert page.inner_text("h1") == "Enter with your token"
        page.goto(f"{url}/enter#{token}", wait_until="domcontentloaded")
        page.reload(wait_until="domcontentloaded")  # the hash alone is no new page
        page.wait_for_selector(".who >> text=ada")
        assert token not in page.url and page.evaluate("document.cookie") == ""
