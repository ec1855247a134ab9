"""A tiny finished run, a client without a server, a server for browsers, and the browser."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import app_server


@pytest.fixture(scope="module", autouse=True)
def _pages_without_figures(without_figures: None) -> None:
    """The overview draws a report, whose figures take several times as long as all else; tests/report looks at them."""


@pytest.fixture(scope="session")
def site_run(tiny_run: Path) -> Path:
    """The run directory of a tiny finished study, without figures. Copy it before changing anything."""
    return tiny_run / "run"


@pytest.fixture
def run_copy(site_run: Path, tmp_path: Path) -> Path:
    """A copy of `site_run` that a test may change."""
    return Path(shutil.copytree(site_run, tmp_path / "run"))


@pytest.fixture
def client_of() -> Callable[..., Any]:
    """`client_of(run)`: a client of the app over a run directory, whose posts come from the app's own pages."""
    from fastapi.testclient import TestClient

    from saeffect.web.app import create_app
    from saeffect.web.site import Settings

    def make(run: Path, settings: Settings | None = None, **headers: str) -> TestClient:
        base = "http://127.0.0.1:8321"
        return TestClient(
            create_app(run, settings),
            base_url=base,
            headers={"Origin": base} | headers,
            raise_server_exceptions=False,
        )

    return make


def serving(run: Path, settings: Any = None) -> contextlib.AbstractContextManager[str]:
    """The app over a run directory, served on a free port for a block; gives its address without a last slash."""
    from saeffect.web.app import create_app

    return app_server.serving(create_app(run, settings))


@pytest.fixture(scope="session")
def served(site_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over a copy of `site_run` for the whole session; its address, such as http://127.0.0.1:40123."""
    copy = shutil.copytree(site_run, tmp_path_factory.mktemp("served") / "run")
    with serving(Path(copy)) as url:
        yield url


@pytest.fixture(scope="session")
def serve_run() -> Callable[..., Any]:
    """`with serve_run(folder) as url:` serves any run directory for the block."""
    return serving


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`tab(width=1440, **options)`: an empty tab; `tab.messages` holds errors, console lines, and foreign requests."""
    contexts = []

    def open_tab(width: int = 1440, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        made = context.new_page()
        made.set_default_timeout(60_000)
        made.messages = []
        made.on("console", lambda message: made.messages.append(message.text))
        made.on("pageerror", lambda error: made.messages.append(str(error)))
        made.on(
            "request",
            lambda request: (
                None if request.url.startswith(("http://127.0.0.1:", "data:")) else made.messages.append(request.url)
            ),
        )
        return made

    yield open_tab
    for context in contexts:
        context.close()


@pytest.fixture
def barriers() -> Callable[[Any], list[tuple[str, str, str]]]:
    """`barriers(page)`: what axe finds serious or critical: the rule's name, the element, and what is wrong with it.

    A page that sends a policy must be opened with `bypass_csp`, since axe is put into it.
    """
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()

    def find(page: Any) -> list[tuple[str, str, str]]:
        found = axe.run(page).response["violations"]
        grave = [violation for violation in found if violation["impact"] in ("serious", "critical")]
        return [(v["id"], node["html"][:200], node["failureSummary"]) for v in grave for node in v["nodes"]]

    return find
