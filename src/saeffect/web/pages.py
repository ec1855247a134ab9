"""Pages: templates that escape every string, with the report's pieces and one style for both."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import ChoiceLoader, Environment, PackageLoader

from saeffect.report.html import page_environment, page_style, page_tokens

__all__ = ["environment", "page", "static_files"]

_THEMES = ("light", "dark")


@cache
def static_files() -> dict[str, bytes]:
    """By name, what `/static/` serves: the files of this package's `static` folder, and the report's style."""
    folder = resources.files("saeffect.web").joinpath("static")
    own = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
    return own | {"tokens.css": page_tokens().encode(), "report.css": page_style(tokens=False).encode()}


@cache
def environment() -> Environment:
    """The templates of the app and the pieces of the report. Every string is escaped, characters that act are shown."""
    made = page_environment()
    made.loader = ChoiceLoader([PackageLoader("saeffect.web"), PackageLoader("saeffect.report")])
    made.globals["static"] = _static_url
    made.auto_reload = False
    return made


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from a template that extends `base.html.j2`, which needs a `title`.

    Beside `values` a template sees `areas` (title and path of each, for the navigation), `here` (the path), `study`
    (its name, or that of the directory) and `theme` ("light", "dark", or "" for the system's).
    """
    app = request.app.state
    theme = request.cookies.get("theme", "")
    known = {
        "areas": app.areas,
        "here": request.url.path,
        "study": app.site.folder.name,
        "theme": theme if theme in _THEMES else "",
        "rater": getattr(request.state, "rater", None),
        "entered": app.site.settings.is_local or getattr(request.state, "rater", None) is not None,
    }
    return HTMLResponse(environment().get_template(template).render(known | values), status_code=status)


@cache
def _static_url(name: str) -> str:
    """The URL of a static file, which changes with its content, so that browsers may keep it."""
    return f"/static/{name}?v={hashlib.sha256(static_files()[name]).hexdigest()[:12]}"
