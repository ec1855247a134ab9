"""Settings of the web app."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

__all__ = ["Settings", "is_loopback"]


@dataclass(frozen=True)
class Settings:
    """How the app is served.

    Attributes:
        host: Address to listen on; any but a loopback address needs a token per rater.
        port: Port to listen on; named in the session cookie, since browsers share cookies between ports.
        names: Further host names that a browser may call the server by, such as that of a proxy, which lets others in.
        max_body: Largest accepted request body, in bytes.
        requests_per_second: Requests that one client may send, on average; 0 for no limit.
        burst: Requests that one client may send at once before that limit applies.
        attempts_per_minute: Wrong tokens that one address may send.
    """

    host: str = "127.0.0.1"
    port: int = 8321
    names: tuple[str, ...] = ()
    max_body: int = 1 << 20
    requests_per_second: float = 0.0
    burst: int = 200
    attempts_per_minute: int = 10

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the app, so that no token is asked for; not so behind a named proxy."""
        return is_loopback(self.host) and all(is_loopback(name) for name in self.names)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
