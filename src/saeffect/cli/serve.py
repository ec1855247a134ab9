"""`saeffect serve`: the web app over a run directory."""

from __future__ import annotations

import errno
import socket
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeffect.cli.console import show
from saeffect.errors import ConfigError, InUse, NotFound
from saeffect.paths import user_path

if TYPE_CHECKING:
    from saeffect.web.settings import Settings

__all__ = ["serve"]

_PORT = 8321
_TRIED_PORTS = 20


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of saeffect run.", parser=user_path)],
    port: Annotated[
        int | None, typer.Option(help=f"Port; by default {_PORT}, or the next free one.", min=0, max=65535)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. By default this machine only.")] = "127.0.0.1",
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
) -> None:
    """Serve the web app over a run directory until Ctrl-C."""
    from saeffect.web.settings import Settings

    if not run.is_dir():
        wrong = "this is a file, and a run directory was expected" if run.exists() else "there is no such run directory"
        raise NotFound(f"{wrong}.", at=str(run), fix="give the folder that saeffect run wrote, such as runs/my-study.")
    listening = _listen(host, port)
    settings = Settings(host=host, port=listening.getsockname()[1])
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{settings.port}/"
    show(f"{run}: {url}")
    show("to stop: Ctrl-C")
    _run(run, settings, listening, None if no_open else url)


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens; InUse if the port is taken, ConfigError if the address is not this machine's."""
    wanted = [_PORT + i for i in range(_TRIED_PORTS)] if port is None else [port]
    for i, number in enumerate(wanted):
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            listening = socket.socket(family, socket.SOCK_STREAM)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, number))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and i + 1 < len(wanted):
                continue
            if error.errno == errno.EADDRINUSE:
                fix = "choose another --port, or leave it out to get a free one."
                raise InUse(f"another program listens on port {number}.", at="--port", fix=fix) from error
            reason = error.strerror or str(error)
            raise ConfigError(
                f"cannot listen on {host!r}, port {number}: {reason}.", at="--host", fix="use 127.0.0.1, or --port 0."
            ) from error
        else:
            return listening
    raise AssertionError


def _run(run: Path, settings: Settings, listening: socket.socket, to_open: str | None) -> None:
    import uvicorn

    from saeffect.web.app import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if to_open is not None:
                webbrowser.open(to_open)

    config = uvicorn.Config(
        create_app(run, settings), log_level="warning", server_header=False, timeout_graceful_shutdown=3
    )
    Server(config).run([listening])
