"""Access to the app: open on this machine; elsewhere raters need tokens, of which only hashes are stored."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from saeffect.errors import BadFile, ConfigError
from saeffect.io import read_json, write_json
from saeffect.lm.tokens import printable_text
from saeffect.web.pages import page, refusal
from saeffect.web.security import Rates
from saeffect.web.site import Settings

__all__ = ["Access", "Raters", "attempts", "own_path", "router"]

_FILE = "raters.json"
_MAX_NAME = 40
_RESTORE = "restore it, or delete it and make new tokens with --rater."
_YEAR = 365 * 24 * 3600
_PUBLIC_PATHS = ("/enter", "/static/")

router = APIRouter()


class Raters:
    """The raters of a run directory, in its `raters.json`: by name, the SHA-256 of a token and its creation time.

    A token is 256 random bits, so a plain hash cannot be inverted. Deleting an entry revokes its token.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / _FILE

    def names(self) -> list[str]:
        """All raters, sorted; BadFile if the file is damaged."""
        return sorted(self._read())

    def add(self, name: str) -> str:
        """Add a rater and return the token, which is not stored.

        ConfigError if the name is taken (upper and lower case are the same) or cannot be shown, BadFile if the file is
        damaged or cannot be written.
        """
        name, raters = unicodedata.normalize("NFC", name.strip()), self._read()
        if not name or len(name) > _MAX_NAME or printable_text(name) != name or "\n" in name or "\t" in name:
            raise ConfigError(
                f"a rater's name has 1 to {_MAX_NAME} visible characters. Got {name[:80]!r} instead.", at="--rater"
            )
        if name.casefold() in {other.casefold() for other in raters}:
            raise ConfigError(
                f"there is a rater {name!r} already, whose token was shown when it was made.",
                at="--rater",
                fix=f"leave --rater {name} out; for a new token, delete the entry from {self._file.name} first.",
            )
        token = secrets.token_urlsafe(32)
        raters[name] = {"sha256": _hash(token), "made": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(self._file, {"raters": raters})
        self._file.chmod(0o600)
        return token

    def rater_of(self, token: str) -> str | None:
        """The rater with this token, or None."""
        digest, rater = _hash(token), None
        for name, entry in self._read().items():
            if hmac.compare_digest(str(entry.get("sha256", "")).encode(), digest.encode()):
                rater = name
        return rater

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._file.exists():
            return {}
        try:
            content = read_json(self._file)
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise BadFile(f"the list of raters cannot be read: {reason}.", at=str(self._file), fix=_RESTORE) from error
        raters = content.get("raters") if isinstance(content, dict) else None
        if not isinstance(raters, dict) or not all(isinstance(entry, dict) for entry in raters.values()):
            raise BadFile("this is no list of raters.", at=str(self._file), fix=_RESTORE)
        return raters


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


class Access:
    """ASGI middleware that requires a token, unless only this machine can reach the app."""

    def __init__(self, app: ASGIApp, settings: Settings, raters: Raters, attempts: Rates) -> None:
        self._app, self._settings, self._raters, self._attempts = app, settings, raters, attempts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._settings.is_local:
            await self._app(scope, receive, send)
            return
        request, path = HTTPConnection(scope), str(scope["path"])
        token, client = _token(request, self._settings), _address(request)
        try:
            rater = self._raters.rater_of(token) if token else None
        except BadFile as error:
            await refusal(scope, 503, f"nobody can be let in: {error.message}")(scope, receive, send)
            return
        if token and rater is None and (wait := self._attempts.wait(client)):
            await refusal(scope, 429, f"too many wrong tokens: wait {wait:.0f} s.")(scope, receive, send)
            return
        scope.setdefault("state", {})["rater"] = rater
        if rater is None and not path.startswith(_PUBLIC_PATHS):
            await self._reject(request)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _reject(self, request: HTTPConnection) -> Response:
        path = request.url.path
        if path.startswith("/api/") or request.scope["method"] not in ("GET", "HEAD"):
            return refusal(request.scope, 401, "a token is needed: open /enter, or send Authorization: Bearer TOKEN.")
        response = RedirectResponse(f"/enter?next={quote(path, safe='/')}", status_code=303)
        response.delete_cookie(_cookie(self._settings))
        return response


def attempts(settings: Settings) -> Rates:
    """The limit of wrong tokens per address."""
    return Rates(settings.attempts_per_minute / 60, settings.attempts_per_minute)


def _cookie(settings: Settings) -> str:
    return f"saeffect-{settings.port}"


def _address(request: HTTPConnection) -> str:
    return request.client.host if request.client else ""


def _token(request: HTTPConnection, settings: Settings) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.cookies.get(_cookie(settings), "")


@router.get("/enter")
def _enter(request: Request, next: str = "/") -> Response:
    """The page that asks for a token; a token behind # in its address never reaches a server's log."""
    return page(request, "enter.html.j2", title="Enter", next=own_path(next), wrong=False)


@router.post("/enter")
async def _submit_token(request: Request) -> Response:
    form = parse_qs((await request.body()).decode("utf-8", "replace"))
    token, target = form.get("token", [""])[0].strip(), own_path(form.get("next", ["/"])[0])
    app = request.app.state
    settings: Settings = app.site.settings
    if app.raters.rater_of(token) is None:
        if wait := app.attempts.wait(_address(request)):
            return refusal(request.scope, 429, f"too many wrong tokens: wait {wait:.0f} s.")
        return page(request, "enter.html.j2", status=401, title="Enter", next=target, wrong=True)
    response = RedirectResponse(target, status_code=303)
    secure = request.url.scheme == "https"
    response.set_cookie(_cookie(settings), token, max_age=_YEAR, httponly=True, samesite="lax", secure=secure)
    return response


@router.post("/leave")
def _leave(request: Request) -> Response:
    response = RedirectResponse("/enter", status_code=303)
    response.delete_cookie(_cookie(request.app.state.site.settings))
    return response


def own_path(path: str) -> str:
    """The path if it is one of this app, else "/": no open redirects.

    Example:
        >>> own_path("/features?q=a"), own_path("//evil.example"), own_path("https://evil.example")
        ('/features?q=a', '/', '/')
    """
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable() else "/"
