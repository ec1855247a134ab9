"""Routes of the overview, and the files of the report."""

from __future__ import annotations

import contextlib
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from saeffect.errors import NotFound, SaeffectError
from saeffect.report.html import script_hash
from saeffect.web.overview.content import Content, ContentMaker
from saeffect.web.overview.state import headline, run_state
from saeffect.web.pages import page
from saeffect.web.site import Site

__all__ = ["router", "warm"]

router = APIRouter()

_PATIENCE = 0.25  # seconds that a page waits for its report; then it comes later
# A file of the run is nobody's page: it may run nothing of its own, and sees nothing of the app.
_ALONE = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_KINDS = {".csv": "text/csv", ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png"}


@router.get("/")
def _overview(request: Request) -> Response:
    site: Site = request.app.state.site
    state = run_state(site)
    content = Content() if state.condition == "empty" else _maker(site).get(state.version, _PATIENCE)
    return page(
        request,
        "overview/page.html.j2",
        title=state.title or "No study yet",
        state=state,
        content=content or Content(),
        pending=content is None,
        headline=headline(site) if content is None or not content.body else "",
        files=_files(site),
        folder=str(site.folder),
    )


@router.get("/api/progress")
def _progress(request: Request) -> dict[str, Any]:
    """The `RunState`, and whether the report of its version is ready."""
    site: Site = request.app.state.site
    state = run_state(site)
    ready = state.condition == "empty" or _maker(site).get(state.version, 0.0) is not None
    return state.as_json(ready)


@router.get("/report")
def _report(request: Request) -> Response:
    """The report as the run wrote it, cut off from the app."""
    file = request.app.state.site.path("report.html")
    if not file.is_file():
        fix = "let the study run to its end; the overview shows what there is so far."
        raise NotFound("this run has written no report yet.", fix=fix)
    policy = _ALONE.replace("sandbox;", "sandbox allow-scripts allow-popups;") + f"; script-src '{script_hash()}'"
    return FileResponse(file, media_type="text/html", headers={"Content-Security-Policy": policy})


@router.get("/files/{folder}/{name}")
def _file(request: Request, folder: str, name: str) -> Response:
    """A table or figure of the report, to keep."""
    site: Site = request.app.state.site
    if f"{folder}/{name}" not in {path for names in _files(site).values() for path in names}:
        raise NotFound("there is no such file of the report.", fix="the overview lists them.")
    file = site.path(folder, name)
    headers = {"Content-Security-Policy": _ALONE}
    return FileResponse(file, media_type=_KINDS[file.suffix], filename=name, headers=headers)


def _files(site: Site) -> dict[str, list[str]]:
    """By folder, the paths of the report's tables and figures."""
    found = {}
    for folder, kinds in (("tables", {".csv", ".json"}), ("figures", {".svg", ".png"})):
        place = site.path(folder)
        names = [path.name for path in place.iterdir() if path.suffix in kinds] if place.is_dir() else []
        found[folder] = [f"{folder}/{name}" for name in sorted(names) if site.has(folder, name)]
    return found


def warm(site: Site) -> None:
    """Begin to put the report together, so that it is there when a browser asks."""
    with contextlib.suppress(SaeffectError):
        state = run_state(site)
        if state.condition != "empty":
            _maker(site).get(state.version, 0.0)


def _maker(site: Site) -> ContentMaker:
    return site.cached("overview", (), lambda: ContentMaker(site))
