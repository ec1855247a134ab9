"""Checks of every request: Host, Origin, size and rate; and the security headers of every response."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from functools import cached_property
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saeffect.web.pages import refusal
from saeffect.web.site import Settings, is_loopback

__all__ = ["HEADERS", "Guard", "Rates"]

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_MAX_CLIENTS = 10_000


class Rates:
    """Token buckets: each client may spend `burst` at once, and `per_second` on average."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._left: dict[str, tuple[float, float]] = {}

    def wait(self, client: str, cost: float = 1.0) -> float:
        """Spend of a client's allowance; the seconds to wait if it is spent, else 0.

        Example:
            >>> rates = Rates(1.0, 2.0, clock=lambda: 0.0)
            >>> rates.wait("a"), rates.wait("a"), rates.wait("a"), rates.wait("b")
            (0.0, 0.0, 1.0, 0.0)
        """
        now = self._clock()
        left, last = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - last) * self._per_second)
        lacking = max(0.0, cost - left)
        self._left[client] = (left if lacking else left - cost, now)
        if len(self._left) > _MAX_CLIENTS:  # drop the least recent one
            self._left.pop(next(iter(self._left)))
        return lacking / self._per_second


class Guard:
    """ASGI middleware around the whole app; refused requests never reach a page."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        per_second = settings.requests_per_second
        self._rates = Rates(per_second, settings.burst) if per_second > 0 else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no web sockets here
        headers = Headers(scope=scope)
        body = _Body(receive, self._settings.max_body)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
                out.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._refusal(scope, headers)
        try:
            if refused is not None:
                await refusal(scope, *refused)(scope, receive, answer)
            else:
                await self._app(scope, body.receive, answer)
        except _TooLarge:
            await refusal(scope, 413, self._size_limit)(scope, receive, answer)

    @cached_property
    def _size_limit(self) -> str:
        return f"a request may hold at most {self._settings.max_body:,} bytes."

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """(status, why) for a request that no page should see."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own_host(hosts[0]):
            return 421, "this server is not called by that name: open the address that it printed."
        if (reason := _cross_site_reason(scope, headers, hosts[0])) is not None:
            return 403, reason
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return 400, "the Content-Length is no number."
        if int(length) > self._settings.max_body:
            return 413, self._size_limit
        if self._rates is not None and scope.get("client"):
            seconds = self._rates.wait(str(scope["client"][0]))
            if seconds:
                return 429, f"too many requests: wait {seconds:.0f} s."
        return None

    def _is_own_host(self, host: str) -> bool:
        """Whether a Host header names this server, against DNS rebinding."""
        try:
            parts = urlsplit(f"//{host}")
            name = (parts.hostname or "").rstrip(".")
            parts.port  # noqa: B018 - raises for what is no port
        except ValueError:
            return False
        if name == self._settings.host.lower() or name in self._settings.names or is_loopback(name):
            return True
        if self._settings.is_local:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in _host_names()
        return True  # an IP address cannot be rebound


def _host_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local", socket.getfqdn().lower()}


def _cross_site_reason(scope: Scope, headers: Headers, host: str) -> str | None:
    """Why a request is refused as not from one of our pages; None if it is, or need not be.

    Browsers send Origin with every request that changes something, and pages cannot forge it. Other programs must send
    it too.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    is_safe = scope["method"] in _SAFE_METHODS
    if site in ("cross-site", "same-site") and (not is_safe or scope["path"].startswith("/api/")):
        return "this request comes from a page of another site."
    if origin is not None:
        parts = urlsplit(origin)
        if parts.netloc.lower() != host.lower() or parts.scheme not in ("http", "https"):
            return "this request comes from a page of another site."
    elif not is_safe and site not in ("same-origin",):
        return f"a request that changes something needs the header Origin: http://{host}."
    return None


class _TooLarge(Exception):  # noqa: N818 - not an error of ours, but a signal
    pass


class _Body:
    """Counts the bytes of a body that does not say its length."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._left = receive, limit

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise _TooLarge
        return message
