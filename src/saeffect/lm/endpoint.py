"""Client of an OpenAI-compatible HTTP endpoint: asks a language model with retries, keeps every answer on disk."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from saeffect.errors import ConfigError, Interrupted, SaeffectError, Unreachable, first_line, unknown_name
from saeffect.io import fingerprint, read_json, write_json
from saeffect.progress import SILENT, Log

__all__ = ["Endpoint", "Question", "chat_endpoint"]

_URL, _KEY, _MODEL = "OPENAI_BASE_URL", "OPENAI_API_KEY", "SAEFFECT_LABEL_MODEL"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_BYTES = 1_000_000  # of an answer
_MAX_WAIT = 60.0  # seconds before the next attempt, whatever the server asks for
_BUSY = {408, 409, 425, 429}
_RESUME = "what was answered is kept, and the same command goes on from there."


@dataclass(frozen=True)
class Question:
    """One message to the model, and the most tokens of its answer."""

    text: str
    max_tokens: int


class _FailedError(Exception):
    """No answer; `wait` seconds before the next attempt, 0: the default wait, None: do not try again."""

    def __init__(self, reason: str, wait: float | None = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """No redirects, so that the key is sent to the named address only."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """Asks one model; safe from several threads. The key is never shown, logged or written.

    Args:
        url: Base address, such as https://host/v1.
        key: "" for none.
        answers: Folder for the answers, a file each, named by a hash of address, model and question.
        attempts: How often a question is sent, after waits of 1, 2, 4, ... times `first_wait` seconds, or as long as
            the server asks.
        timeout: Seconds for one answer.

    Raises `ConfigError`: an invalid address, one that contains a key, or one that would send the key unencrypted to
    another machine.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        *,
        answers: Path,
        attempts: int = 6,
        first_wait: float = 1.0,
        timeout: float = 180.0,
        log: Log = SILENT,
    ) -> None:
        self.url, self.model, self._key, self._answers, self._log = _check_url(url, key), model, key, answers, log
        self._attempts, self._first_wait, self._timeout = attempts, first_wait, timeout
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._options: dict[str, Any] = {"temperature": 0}
        self._limit = "max_tokens"
        self.requests = self.tokens_in = self.tokens_out = 0
        local = urlsplit(self.url).hostname in _LOOPBACK
        proxies: dict[str, str] | None = {} if local else None  # None: those of the environment
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler(proxies))

    def kept(self, question: Question) -> str | None:
        """The stored answer, or None; a damaged file counts as none."""
        with contextlib.suppress(SaeffectError, OSError, KeyError, TypeError):
            answer = read_json(self._file(question))["answer"]
            return answer if isinstance(answer, str) else None
        return None

    def ask(self, question: Question) -> str:
        """The answer, from disk or the server; "" if the model wrote none.

        Raises:
            ConfigError: The server refuses the key or the request; UnknownName if it has no such model.
            Unreachable: It gave no answer in all attempts.
            Interrupted: `stop` was called.
            BadFile: The answer cannot be written.
        """
        answer = self.kept(question)
        if answer is None:
            answer = self._ask(question)
            content = {"model": self.model, "question": _encodable(question.text), "answer": answer}
            write_json(self._file(question), content)
        return answer

    def stop(self) -> None:
        """Send nothing more: threads that ask, or wait for another attempt, raise Interrupted."""
        self._stopped.set()

    def models(self) -> list[str]:
        """Names of the models that the server lists; empty if it lists none."""
        with contextlib.suppress(_FailedError, SaeffectError, KeyError, TypeError):
            return sorted(str(model["id"]) for model in self._send("models")["data"])[:40]
        return []

    def _file(self, question: Question) -> Path:
        return self._answers / f"{fingerprint([self.url, self.model, question.text, question.max_tokens])[:40]}.json"

    def _ask(self, question: Question) -> str:
        failed = _FailedError("it was not asked")
        for attempt in range(self._attempts):
            if attempt:
                wait = min(_MAX_WAIT, failed.wait or self._first_wait * 2 ** (attempt - 1))
                self._log(f"  no answer ({failed}); asking again in {wait:.0f} s")
                self._stopped.wait(wait)
            if self._stopped.is_set():
                raise Interrupted("stopped.", fix=_RESUME)
            try:
                return self._attempt(question)
            except _FailedError as error:
                failed = error
                if failed.wait is None:
                    break
        fix = f"see that it runs; {_RESUME}"
        raise Unreachable(f"the language model gave no answer: {failed}.", at=self.url, fix=fix)

    def _attempt(self, question: Question) -> str:
        message = {"role": "user", "content": _encodable(question.text)}
        body = {"model": self.model, "messages": [message], self._limit: question.max_tokens, **self._options}
        with self._lock:
            self.requests += 1
        reply = self._send("chat/completions", body)
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise _FailedError("what came back is no chat completion") from None
        usage = reply.get("usage")
        with self._lock:
            for name, side in (("tokens_in", "prompt_tokens"), ("tokens_out", "completion_tokens")):
                n = usage.get(side) if isinstance(usage, Mapping) else None
                setattr(self, name, getattr(self, name) + (n if isinstance(n, int) and 0 < n < 2**40 else 0))
        return self._clean(text) if isinstance(text, str) else ""

    def _send(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send one request and return its JSON. `_FailedError`, or a SaeffectError if a retry would not help."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.url}/{path}", data, headers)
            with self._opener.open(request, timeout=self._timeout) as answer:
                return json.loads(self._read(answer))
        except urllib.error.HTTPError as error:
            with error:
                raise self._http_error(error, body or {}) from None
        except (OSError, http.client.HTTPException) as error:
            raise _FailedError(self._clean(first_line(error))) from None
        except (ValueError, RecursionError):
            raise _FailedError("what came back is not JSON") from None

    def _read(self, answer: Any) -> bytes:
        """The body; `_FailedError` beyond a maximum size or time."""
        end, body = time.monotonic() + self._timeout, b""
        while part := answer.read1(65_536):
            body += part
            if len(body) > _MAX_BYTES or time.monotonic() > end:
                raise _FailedError(f"more than {_MAX_BYTES:,} bytes or {self._timeout:.0f} s of answer")
        return body

    def _http_error(self, error: urllib.error.HTTPError, body: Mapping[str, Any]) -> Exception:
        """The error for an HTTP status."""
        body_text = ""
        with contextlib.suppress(_FailedError, OSError, http.client.HTTPException):
            body_text = " ".join(self._clean(self._read(error).decode("utf-8", "replace")).split())
        status = f"HTTP {error.code}" + (f": {body_text[:200]}" if body_text else "")
        if error.code >= 500 or error.code in _BUSY:
            seconds = error.headers.get("Retry-After", "")
            wait = float(seconds if seconds.isdigit() else 0)
            return _FailedError(status, None if "insufficient_quota" in body_text else wait)
        if error.code == 400 and "max_completion_tokens" in body_text and "max_tokens" in body:
            self._limit = "max_completion_tokens"
            return _FailedError(status, 0.01)
        if error.code == 400 and "temperature" in body_text and "temperature" in body:
            self._options = {}
            return _FailedError(status, 0.01)
        if error.code in (401, 403):
            return ConfigError(f"the endpoint refuses the key ({status}).", at=self.url, fix=f"set {_KEY}.")
        if error.code == 404 and body and (models := self.models()) and self.model not in models:
            return unknown_name("model", self.model, models, at=_MODEL)
        fix = f"set {_URL} to the address before /chat/completions, and {_MODEL} to a chat model there."
        return ConfigError(f"the endpoint refuses the request ({status}).", at=self.url, fix=fix)

    def _clean(self, text: str) -> str:
        """Text from the server, without the key, which it may repeat."""
        return _encodable(text.replace(self._key, "(key)") if self._key else text)


def _encodable(text: str) -> str:
    """The text with lone surrogates, which cannot be encoded, replaced."""
    return text.encode("utf-8", "replace").decode()


def chat_endpoint(answers: Path, *, log: Log = SILENT) -> Endpoint:
    """The endpoint that the environment names: OPENAI_BASE_URL, SAEFFECT_LABEL_MODEL, OPENAI_API_KEY if it wants one.

    Nothing is sent, unless the model is not named: then the error lists the server's models. ConfigError if a variable
    is missing or wrong.
    """
    url, key, model = (os.environ.get(name, "").strip() for name in (_URL, _KEY, _MODEL))
    if not url:
        fix = f"set {_URL}, such as http://127.0.0.1:8080/v1, {_MODEL}, and {_KEY} if it wants one."
        raise ConfigError("no endpoint of a language model is named.", at=_URL, fix=fix)
    endpoint = Endpoint(url, model, key, answers=answers, log=log)
    if not model:
        fix = f"set {_MODEL} to one of: {', '.join(endpoint.models()) or '(the endpoint lists none)'}."
        raise ConfigError("the language model is not named.", at=_MODEL, fix=fix)
    return endpoint


def _check_url(url: str, key: str) -> str:
    """The address without a trailing slash; ConfigError if address or key cannot be used."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host or not _is_plain(url):
        raise ConfigError("this is no address of an endpoint.", at=_URL, fix="write it as https://host/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        fix = f"give the key in {_KEY}, which is kept out of logs and files."
        raise ConfigError("an address with a name, password or query is not taken.", at=_URL, fix=fix)
    if not _is_plain(key):
        raise ConfigError("the key holds characters that no key has.", at=_KEY, fix="copy it again.")
    if key and parts.scheme == "http" and host not in _LOOPBACK:
        fix = f"use https, or unset {_KEY} if this server wants none."
        raise ConfigError(f"the key would travel to {host} unencrypted.", at=_URL, fix=fix)
    return url.rstrip("/")


def _is_plain(text: str) -> bool:
    return all("!" <= c <= "~" for c in text)
