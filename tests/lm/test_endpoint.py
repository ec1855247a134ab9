"""A chat endpoint: kept answers, failures of every kind, and a key that goes nowhere else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chat_server import Raw, chat_server
from saeffect.errors import ConfigError, Interrupted, SaeffectError, UnknownName, Unreachable
from saeffect.lm import endpoint as module
from saeffect.lm.endpoint import Endpoint, Question, chat_endpoint
from saeffect.progress import Log

KEY = "sk-secret-123"
WHAT = Question("What is it? \ud83d", 20)


def endpoint(url: str, folder: Path, **more: Any) -> Endpoint:
    return Endpoint(url, "m", KEY, answers=folder / "answers", **({"first_wait": 0.01, "timeout": 5.0} | more))


def test_answers_are_cached_without_the_key(tmp_path: Path) -> None:
    with chat_server(lambda *_: f"a heart, said with {KEY}") as seen:
        found = endpoint(seen.url, tmp_path)
        assert found.kept(WHAT) is None
        assert found.ask(WHAT) == "a heart, said with (key)"
        assert (found.requests, found.tokens_in, found.tokens_out) == (1, 7, 2)
    assert endpoint(seen.url, tmp_path).ask(WHAT) == "a heart, said with (key)"  # the server is gone
    sent = seen.chats[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("m", 20, 0)
    assert sent["messages"] == [{"role": "user", "content": "What is it? ?"}]
    assert seen.headers[0]["Authorization"] == f"Bearer {KEY}"
    files = list((tmp_path / "answers").iterdir())
    assert len(files) == 1 and KEY not in files[0].read_text()
    for other in (Question(WHAT.text, 21), Question("What?", 20)):
        assert endpoint(seen.url, tmp_path).kept(other) is None
    files[0].write_bytes(files[0].read_bytes()[:-9])
    assert endpoint(seen.url, tmp_path).kept(WHAT) is None


@pytest.mark.parametrize(
    "failure",
    [
        Raw(429, b"slow down", {"Retry-After": "0"}),
        Raw(500, b"{}"),
        Raw(503, b"loading", {"Retry-After": "soon"}),
        Raw(0),
        Raw(200, b"<html>welcome to the hotel</html>"),
        Raw(200, b"[" * 100_000),
        Raw(200, b'{"choices": []}'),
        Raw(200, b'"text"'),
        Raw(200, b'{"cho', {"Content-Length": "100"}),
        Raw(200, b"{}" + b" " * 2_000_000),
    ],
    ids=lambda failure: f"{failure.status} {failure.body[:12].decode()}",
)
def test_a_failure_is_followed_by_another_attempt(failure: Raw, tmp_path: Path) -> None:
    lines: list[str] = []
    with chat_server(lambda _, n: failure if n < 2 else "at last") as seen:
        assert endpoint(seen.url, tmp_path, log=Log(lines.append)).ask(WHAT) == "at last"
    assert len(seen.chats) == 3 and len(lines) == 2
    assert all("asking again" in line and KEY not in line for line in lines)


def test_no_answer_in_all_attempts_is_an_error(tmp_path: Path, complains: Callable[..., Any]) -> None:
    with chat_server(lambda *_: Raw(500, f"key {KEY}".encode())) as seen:
        with complains(Unreachable, "HTTP 500: key (key)", "kept", at=seen.url):
            endpoint(seen.url, tmp_path, attempts=3).ask(WHAT)
        assert len(seen.chats) == 3
    with complains(Unreachable, "refused"):  # nobody listens any more
        endpoint(seen.url, tmp_path, attempts=2).ask(WHAT)
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (Raw(401, b"wrong key"), ConfigError, "OPENAI_API_KEY"),
        (Raw(404, b"no such model"), UnknownName, "valid: big, small"),
        (Raw(422, b"what?"), ConfigError, "HTTP 422: what?"),
        (Raw(429, b'{"code": "insufficient_quota"}'), Unreachable, "insufficient_quota"),
        (Raw(302, b"", {"Location": "/v1/elsewhere"}), ConfigError, "HTTP 302"),
    ],
)
def test_permanent_errors_are_not_retried(
    answer: Raw, kind: type[SaeffectError], said: str, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    with chat_server(lambda *_: answer, models=("small", "big")) as seen, complains(kind, said):
        endpoint(seen.url, tmp_path).ask(WHAT)
    assert len(seen.chats) == 1


def test_unsupported_parameters_are_dropped(tmp_path: Path) -> None:
    def answer(_: str, n: int) -> str | Raw:
        body = seen.chats[n]
        if "max_tokens" in body:
            return Raw(400, b"Unsupported parameter: use max_completion_tokens")
        return Raw(400, b"temperature is not supported") if "temperature" in body else "fine"

    with chat_server(answer) as seen:
        found = endpoint(seen.url, tmp_path)
        assert (found.ask(WHAT), found.ask(Question("And this?", 5))) == ("fine", "fine")
    assert len(seen.chats) == 4 and seen.chats[3]["max_completion_tokens"] == 5


def test_no_text_is_an_empty_answer(tmp_path: Path) -> None:
    with chat_server(lambda *_: None) as seen:
        assert endpoint(seen.url, tmp_path).ask(WHAT) == ""


def test_an_endless_answer_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", 100)
    with chat_server(lambda *_: "word " * 100) as seen, pytest.raises(Unreachable, match="more than 100 bytes"):
        endpoint(seen.url, tmp_path, attempts=1).ask(WHAT)


def test_stopping_ends_a_long_wait(tmp_path: Path) -> None:
    with chat_server(lambda *_: Raw(503, b"", {"Retry-After": "50"})) as seen:
        found = endpoint(seen.url, tmp_path)
        threading.Timer(0.2, found.stop).start()
        with pytest.raises(Interrupted):
            found.ask(WHAT)
    assert len(seen.chats) == 1


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("host/v1", "no address"),
        ("ftp://host/v1", "no address"),
        ("https://host:99999/v1", "no address"),
        ("https://host/v1\nHost: x", "no address"),
        (f"https://me:{KEY}@host/v1", "a name, password or query"),
        (f"https://host/v1?key={KEY}", "a name, password or query"),
        ("http://example.org/v1", "unencrypted"),
    ],
)
def test_invalid_or_leaking_address_is_refused(
    url: str, said: str, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    with complains(ConfigError, said, at="OPENAI_BASE_URL"):
        endpoint(url, tmp_path)
    with pytest.raises(ConfigError) as caught:
        endpoint(url, tmp_path)
    assert KEY not in str(caught.value)


def test_the_environment_names_the_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "SAEFFECT_LABEL_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with complains(ConfigError, "no endpoint", at="OPENAI_BASE_URL"):
        chat_endpoint(tmp_path)
    with chat_server(lambda *_: "yes", models=("small", "big")) as seen:
        monkeypatch.setenv("OPENAI_BASE_URL", seen.url + "/")
        with complains(ConfigError, "big, small", at="SAEFFECT_LABEL_MODEL"):
            chat_endpoint(tmp_path)
        monkeypatch.setenv("SAEFFECT_LABEL_MODEL", "big")
        found = chat_endpoint(tmp_path)
        assert (found.url, found.model, found.ask(WHAT)) == (seen.url, "big", "yes")
    assert "Authorization" not in seen.headers[0]
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with complains(ConfigError, "no key has", at="OPENAI_API_KEY"):
        chat_endpoint(tmp_path)


def test_loopback_goes_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with chat_server(lambda *_: json.dumps("past it")) as seen:
        assert endpoint(seen.url, tmp_path, attempts=1).ask(WHAT) == '"past it"'
