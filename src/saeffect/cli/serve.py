"""`saeffect serve`: the web app over a run directory."""

from __future__ import annotations

import errno
import socket
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeffect.cli.console import show
from saeffect.errors import ConfigError, InUse, NotFound
from saeffect.paths import user_path

if TYPE_CHECKING:
    from saeffect.web.site import Settings

__all__ = ["serve"]

_PORT = 8321
_TRIED_PORTS = 20


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of saeffect run.", parser=user_path)],
    port: Annotated[
        int | None, typer.Option(help=f"Port; by default {_PORT}, or the next free one.", min=0, max=65535)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on, such as 0.0.0.0; all but this machine's own need raters' tokens.")
    ] = "127.0.0.1",
    rater: Annotated[
        list[str] | None, typer.Option(help="Make a token for a rater of this name, and show it once; may be repeated.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Name by which browsers call the server, such as that of a proxy.")
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
) -> None:
    """Serve the web app over a run directory until Ctrl-C."""
    from saeffect.web.site import Settings

    if not run.is_dir():
        what = "this is a file, and a run directory was expected" if run.exists() else "there is no such run directory"
        raise NotFound(f"{what}.", at=str(run), fix="give the folder that saeffect run wrote, such as runs/my-study.")
    server_socket = _listen(host, port)
    names = tuple(alias.lower() for alias in name or ())
    settings = Settings(host=host, port=server_socket.getsockname()[1], names=names)
    address = names[0] if names else "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{address}:{settings.port}/"
    if not settings.is_local:
        settings = replace(settings, requests_per_second=50.0, burst=500)
        _show_tokens(run, rater or (), url)
    elif rater:
        raise ConfigError("tokens are for --host; on this machine nobody needs one.", at="--rater", fix="leave it out.")
    show(f"{run}: {url}")
    show("to stop: Ctrl-C")
    _run(run, settings, server_socket, None if no_open or not settings.is_local else url)


def _show_tokens(run: Path, new: Sequence[str], url: str) -> None:
    """Add raters and show their tokens, which cannot be shown again; ConfigError if there would be no rater at all."""
    from saeffect.web.access import Raters

    raters = Raters(run)
    existing = raters.names()
    if not existing and not new:
        raise ConfigError(
            "anybody on the network could use the app, and no rater has a token yet.",
            at="--host",
            fix="add --rater NAME, once for each person.",
        )
    for name in new:
        token = raters.add(name)
        show(f"token of {name}, shown only now: {token}")
        show(f"  {url}enter#{token}")
    if existing:
        show(f"raters with a token: {', '.join(existing)}")


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens; InUse if the port is taken, ConfigError if the address is not this machine's."""
    ports = [_PORT + attempt for attempt in range(_TRIED_PORTS)] if port is None else [port]
    for attempt, number in enumerate(ports):
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            # Without the protocol number asyncio leaves Nagle's algorithm on: 40 ms more for each answer.
            server_socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server_socket.bind((host, number))
            server_socket.listen(2048)  # a browser that comes before the app is up waits, and is not refused
        except OSError as error:
            if error.errno == errno.EADDRINUSE and attempt + 1 < len(ports):
                continue
            if error.errno == errno.EADDRINUSE:
                fix = "choose another --port, or leave it out to get a free one."
                raise InUse(f"another program listens on port {number}.", at="--port", fix=fix) from error
            reason = error.strerror or str(error)
            raise ConfigError(
                f"cannot listen on {host!r}, port {number}: {reason}.", at="--host", fix="use 127.0.0.1, or --port 0."
            ) from error
        else:
            return server_socket
    raise AssertionError


def _run(run: Path, settings: Settings, server_socket: socket.socket, to_open: str | None) -> None:
    import uvicorn

    from saeffect.web.app import create_app

    # A report is built in a thread while requests come in; they must not wait long for the interpreter.
    sys.setswitchinterval(0.001)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if to_open is not None:
                webbrowser.open(to_open)

    config = uvicorn.Config(
        create_app(run, settings), log_level="warning", server_header=False, timeout_graceful_shutdown=3
    )
    Server(config).run([server_socket])
