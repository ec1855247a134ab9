"""An OpenAI-compatible server with scripted answers, in a thread."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

__all__ = ["Raw", "Seen", "chat_server"]


@dataclass(frozen=True)
class Raw:
    """An answer as it goes over the wire; status 0 hangs up."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    """What a server was asked: bodies of chat requests, and all headers."""

    url: str
    chats: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def chat_server(answer: Callable[[str, int], str | Raw | None], models: tuple[str, ...] = ("m",)) -> Iterator[Seen]:
    """`answer(text, n)` gives the text of the nth answer (from 0) to a message, or what comes over the wire instead."""
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(Raw(200, json.dumps({"data": [{"id": name} for name in models]}).encode()))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                n = len(seen.chats)
                seen.chats.append(body)
                seen.headers.append(dict(self.headers))
            found = answer(body["messages"][0]["content"], n)
            if not isinstance(found, Raw):
                message = {"choices": [{"message": {"content": found}}]}
                found = Raw(200, json.dumps(message | {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}).encode())
            self._send(found)

        def _send(self, found: Raw) -> None:
            if not found.status:
                self.connection.close()
                return
            with contextlib.suppress(OSError):  # the client may be gone
                self.send_response(found.status)
                for name, value in ({"Content-Length": str(len(found.body))} | found.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(found.body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    seen = Seen(f"http://127.0.0.1:{server.server_port}/v1")
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
