"""Who gets in: a token per rater, of which only a hash is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeffect.errors import BadFile, ConfigError
from saeffect.web.access import Raters
from saeffect.web.security import Rates
from saeffect.web.site import Settings

OPEN = Settings(host="0.0.0.0", attempts_per_minute=3)


@pytest.fixture
def raters(tmp_path: Path) -> Raters:
    return Raters(tmp_path)


def test_the_token_itself_is_not_kept(raters: Raters, tmp_path: Path) -> None:
    token = raters.add("Ada")
    assert token not in (tmp_path / "raters.json").read_text()
    assert (raters.rater_of(token), raters.rater_of(token[:-1]), raters.rater_of("")) == ("Ada", None, None)
    assert (tmp_path / "raters.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["", " ", "a" * 41, "a\nb", "\u202eada", "ADA"])
def test_a_name_is_short_visible_and_taken_once(raters: Raters, name: str, tmp_path: Path) -> None:
    raters.add("Ada")
    before = (tmp_path / "raters.json").read_bytes()
    with pytest.raises(ConfigError):
        raters.add(name)
    assert (tmp_path / "raters.json").read_bytes() == before


def test_a_damaged_list_lets_nobody_in(raters: Raters, tmp_path: Path, client_of: Callable[..., Any]) -> None:
    (tmp_path / "raters.json").write_text(json.dumps({"raters": ["ada"]}))
    with pytest.raises(BadFile):
        raters.rater_of("x")
    answer = client_of(tmp_path, OPEN, Authorization="Bearer x").get("/api/progress")
    assert answer.status_code == 503 and "no list of raters" in answer.json()["error"]


def test_without_a_token_there_is_only_the_door(run_copy: Path, client_of: Callable[..., Any]) -> None:
    token = Raters(run_copy).add("ada")
    client = client_of(run_copy, OPEN)
    answer = client.get("/features?q=a", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/enter?next=/features")
    assert client.get("/api/progress").status_code == 401
    door = client.get("/enter")
    assert door.status_code == 200 and run_copy.name not in door.text.split("<main")[0].replace("<html", "")
    answer = client.post("/enter", data={"token": token, "next": "//evil.example"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=lax" in answer.headers["set-cookie"]
    assert client.get("/api/progress").status_code == 200
    assert ">ada<" in client.get("/").text
    client.post("/leave")
    assert client.get("/api/progress").status_code == 401
    assert client.get("/api/progress", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_guessing_is_slowed_down(run_copy: Path, client_of: Callable[..., Any]) -> None:
    Raters(run_copy).add("ada")
    client = client_of(run_copy, OPEN)
    statuses = [client.post("/enter", data={"token": "guess"}).status_code for _ in range(5)]
    assert statuses == [401, 401, 401, 429, 429]


def test_a_token_taken_back_opens_nothing(run_copy: Path, client_of: Callable[..., Any]) -> None:
    token = Raters(run_copy).add("ada")
    client = client_of(run_copy, OPEN, Authorization=f"Bearer {token}")
    assert client.get("/api/progress").status_code == 200
    (run_copy / "raters.json").unlink()
    assert client.get("/api/progress").status_code == 401


def test_requests_of_one_client_are_limited(site_run: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(site_run, Settings(requests_per_second=0.001, burst=2))
    assert [client.get("/static/app.css").status_code for _ in range(3)] == [200, 200, 429]


def test_an_allowance_fills_up_again() -> None:
    now = [0.0]
    rates = Rates(2.0, 4.0, clock=lambda: now[0])
    assert [rates.wait("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    now[0] = 0.5
    assert (rates.wait("a"), rates.wait("a")) == (0, 0.5)
