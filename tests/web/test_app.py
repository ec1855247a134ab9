"""The shell: pages and errors, what a browser may do, and who may ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeffect.web.security import HEADERS
from saeffect.web.site import Settings


def test_every_area_is_a_page_with_a_strict_policy(site_run: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(site_run)
    for _, path in client.app.state.areas:
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert "<script>" not in answer.text and " style=" not in answer.text and " onclick" not in answer.text
        assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]


def test_errors_are_pages_and_under_api_json(site_run: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(site_run)
    answer = client.get("/nothing<script>")
    assert answer.status_code == 404
    assert "There is no such page." in answer.text and "<script>" not in answer.text.replace(
        '<script type="module"', ""
    )
    answer = client.get("/api/nothing")
    assert (answer.status_code, answer.json()["error"]) == (404, "there is no such page.")


def test_an_empty_directory_has_a_page(tmp_path: Path, client_of: Callable[..., Any]) -> None:
    answer = client_of(tmp_path).get("/")
    assert "saeffect run STUDY" in answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:8321"}, 421),
        ({"Host": "127.0.0.1:x"}, 421),
        ({"Host": "localhost:8321", "Origin": "http://localhost:8321"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 200),  # a link from elsewhere
    ],
)
def test_host_and_origin(site_run: Path, client_of: Callable[..., Any], headers: dict[str, str], status: int) -> None:
    assert client_of(site_run).get("/", headers=headers).status_code == status


def test_posts_come_from_our_own_pages_and_are_small(site_run: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(site_run, Settings(max_body=100))
    assert client.post("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post("/", content=b"x" * 101).status_code == 413
    assert client.post("/").status_code == 405
    del client.headers["Origin"]
    assert client.post("/").status_code == 403


def test_static_files_are_ours_alone(site_run: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(site_run)
    answer = client.get("/static/tokens.css")
    assert answer.headers["content-type"].startswith("text/css") and "--ink" in answer.text
    for name in ("..%2Fapp.py", "%2Fetc%2Fpasswd", "nothing.js"):
        assert client.get(f"/static/{name}").status_code == 404


def test_a_named_proxy_lets_nobody_in_without_a_token(site_run: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(site_run, Settings(names=("features.example.org",)))
    own = {"Host": "features.example.org", "Origin": "https://features.example.org"}
    assert client.get("/api/progress", headers=own).status_code == 401
    assert client.get("/enter", headers=own).status_code == 200
