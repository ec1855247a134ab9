"""Pages: templates that escape every string and share style and macros with the report. Errors are pages, and JSON
under `/api/`: what is wrong, where, and the fix; never a traceback.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from http import HTTPStatus
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from jinja2 import ChoiceLoader, Environment, PackageLoader
from starlette.exceptions import HTTPException
from starlette.types import Scope

from saeffect.errors import BadFile, ConfigError, InUse, NotFound, SaeffectError
from saeffect.report.html import page_environment, page_style, page_tokens

__all__ = ["add_error_pages", "environment", "page", "refusal", "static_files", "status_of"]

_THEMES = ("light", "dark")


@cache
def static_files() -> dict[str, bytes]:
    """By name, what `/static/` serves: the files of this package's `static` folder, and the report's style."""
    folder = resources.files("saeffect.web").joinpath("static")
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
    return files | {"tokens.css": page_tokens().encode(), "report.css": page_style(tokens=False).encode()}


@cache
def environment() -> Environment:
    """The templates of app and report. Strings are escaped, control characters made visible."""
    templates = page_environment()
    templates.loader = ChoiceLoader([PackageLoader("saeffect.web"), PackageLoader("saeffect.report")])
    templates.globals["static"] = _static_url
    templates.auto_reload = False
    return templates


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from a template that extends `base.html.j2`, which needs a `title`.

    Beside `values` a template sees `areas` (title and path of each, for the navigation), `here` (the path), `study`
    (its name, or that of the directory) and `theme` ("light", "dark", or "" for the system's).
    """
    app = request.app.state
    theme = request.cookies.get("theme", "")
    shared = {
        "areas": app.areas,
        "here": request.url.path,
        "study": app.site.folder.name,
        "theme": theme if theme in _THEMES else "",
        "rater": getattr(request.state, "rater", None),
        "entered": app.site.settings.is_local or getattr(request.state, "rater", None) is not None,
    }
    return HTMLResponse(environment().get_template(template).render(shared | values), status_code=status)


@cache
def _static_url(name: str) -> str:
    """The URL of a static file, which changes with its content, so that browsers may keep it."""
    return f"/static/{name}?v={hashlib.sha256(static_files()[name]).hexdigest()[:12]}"


_STATUS: tuple[tuple[type[SaeffectError], int], ...] = (
    (NotFound, 404), (InUse, 409), (ConfigError, 400), (BadFile, 500),
)  # fmt: skip
_TITLES = {
    400: "That cannot be done",
    401: "A token is needed",
    403: "Not allowed",
    404: "Not here",
    405: "That cannot be done here",
    409: "In use",
    413: "Too large",
    422: "That cannot be done",
    429: "Too many requests",
}


def status_of(error: SaeffectError) -> int:
    """The HTTP status of an error: 404 not found, 409 in use, 400 impossible, 500 a damaged file, else 422.

    Example:
        >>> status_of(NotFound("no such feature.")), status_of(BadFile("truncated."))
        (404, 500)
    """
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 422)


def add_error_pages(app: FastAPI) -> None:
    """Let an app answer with a page (or JSON) for every error."""

    @app.exception_handler(SaeffectError)
    async def saeffect_error(request: Request, error: SaeffectError) -> Response:
        return _problem(request, status_of(error), error.message, error.at, error.fix)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        standard = error.detail == HTTPStatus(error.status_code).phrase
        message = "there is no such page." if standard and error.status_code == 404 else str(error.detail)
        response = _problem(request, error.status_code, message)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        first: dict[str, Any] = next(iter(error.errors()), {"loc": (), "msg": "invalid"})
        file = ".".join(str(part) for part in first["loc"][1:])
        return _problem(request, 422, f"{first['msg']}.", file or None)

    @app.exception_handler(OSError)
    async def system_error(request: Request, error: OSError) -> Response:
        reason = (error.strerror or type(error).__name__).lower()
        file = str(error.filename) if error.filename is not None else None
        return _problem(request, 500, f"a file cannot be read or written: {reason}.", file, "free it, and load again.")

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        logging.getLogger("saeffect.web").error("%s %s", request.method, request.url.path, exc_info=error)
        return _problem(request, 500, "the server made a mistake; what went wrong stands in its terminal.")


def _problem(request: Request, status: int, message: str, at: str | None = None, fix: str | None = None) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message, "at": at, "fix": fix}, status_code=status)
    title = _TITLES.get(status, "Something is broken")
    sentence = message[:1].upper() + message[1:]
    return page(request, "problem.html.j2", status=status, title=title, message=sentence, at=at, fix=fix)


def refusal(scope: Scope, status: int, message: str) -> Response:
    """The answer to a request that no page should see: plain text, or JSON under `/api/`."""
    if scope["path"].startswith("/api/"):
        return JSONResponse({"error": message, "at": None, "fix": None}, status_code=status)
    return PlainTextResponse(f"{message[:1].upper()}{message[1:]}\n", status_code=status)
