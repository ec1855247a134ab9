"""The playground's pages and streams over a tiny finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study
from saeffect.web.play.ask import keep

Client = Callable[..., Any]


@pytest.fixture(scope="module")
def ask(site_run: Path) -> dict[str, Any]:
    """A request that steers the feature that fires most."""
    run = RunFolder(site_run, Study.open(site_run / "study.yaml"))
    table = run.read_table(run.arm("control", "features.parquet"))
    feature = int(table.sort_values("max_activation")["feature"].iloc[-1])
    return {
        "prompt": "My doctor said",
        "arm": "control",
        "features": [feature],
        "max_new_tokens": 6,
        "placebo": "random",
    }


def events(client: Any, asked: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post("/api/play/run", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_stream_ends_with_the_result(run_copy: Path, client_of: Client, ask: dict[str, Any]) -> None:
    client = client_of(run_copy)
    first, again = events(client, ask | {"client": "tab"}), events(client, ask)
    kinds = [event["type"] for event in first]
    assert kinds[0] == "job" and kinds[-1] == "done" and kinds.count("start") == 1 and kinds.count("prompt") == 2
    assert kinds.count("tokens") >= 2 * ask["max_new_tokens"]
    assert first[-1]["result"] == again[-1]["result"]
    page = client.get(f"/play?{first[0]['query']}").text
    assert "My doctor said" in page and 'data-asked="1"' in page and f'data-feature="{ask["features"][0]}"' in page
    assert [row["condition"] for row in first[-1]["result"]["sides"][0]["rows"]] == ["unsteered", "steered", "random"]


def test_a_result_is_kept_shown_compared_and_deleted(run_copy: Path, client_of: Client, ask: dict[str, Any]) -> None:
    client = client_of(run_copy)
    names = []
    for seed in (1, 2):
        *_, done = events(client, ask | {"seed": seed, "top_p": 1.0})
        kept = client.post("/api/play/keep", json={"job": done["job"]}).json()
        assert client.post("/api/play/keep", json={"job": done["job"]}).json()["id"] == kept["id"]
        names.append(kept["id"])
    # Another server, later, without the models.
    page = client_of(run_copy).get(f"/play/kept?id={names[0]}&id={names[1]}")
    assert page.status_code == 200 and page.text.count("<article") == 2 and "My doctor said" in page.text
    assert "Run again" in page.text and " style=" not in page.text
    assert client.post("/api/play/forget", json={"id": names[0]}).status_code == 200
    assert client.get(f"/play/kept?id={names[0]}").status_code == 404
    assert names[1] in client.get("/play").text and names[0] not in client.get("/play").text


def test_only_results_of_this_server_are_kept(run_copy: Path, client_of: Client) -> None:
    client = client_of(run_copy)
    assert client.post("/api/play/keep", json={"job": "x"}).status_code == 404
    for name in ("../../secret", "0" * 16, "", "%2e%2e"):
        assert client.get("/play/kept", params={"id": name}).status_code == 404
    (run_copy / "play").mkdir()
    (run_copy / "play" / ("a" * 16 + ".json")).write_text('{"ask": 1}', encoding="utf-8")
    assert client.get("/play/kept", params={"id": "a" * 16}).status_code == 500
    assert client.get("/play").status_code == 200


def test_hostile_texts_are_shown_and_do_nothing(run_copy: Path, client_of: Client) -> None:
    client = client_of(run_copy)
    evil = "<img src=x onerror=alert(1)>\u202e"
    row = {"condition": "unsteered", "label": evil, "text": evil, "tokens": [[evil, []]]}
    side = {"name": evil, "role": "control", "model": evil, "rows": [row], "prompt": [[evil, []]]}
    name = keep(client.app.state.site, {"ask": {"prompt": evil}, "sides": [side], "scale": []})
    for page in (client.get(f"/play/kept?id={name}").text, client.get("/play", params={"prompt": evil}).text):
        assert "<img" not in page and "\u202e" not in page and "&lt;img" in page


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"dose": "many"}, 400),
        ({"features": [1, 1]}, 400),
        ({"prompt": ""}, 400),
        ({"nothing": 1}, 400),
    ],
)
def test_a_wrong_request_is_refused(
    site_run: Path, client_of: Client, ask: dict[str, Any], changes: dict[str, Any], status: int
) -> None:
    answer = client_of(site_run).post("/api/play/run", json=ask | changes)
    assert answer.status_code == status and answer.json()["error"]


def test_model_errors_end_the_stream(site_run: Path, client_of: Client, ask: dict[str, Any]) -> None:
    client = client_of(site_run)
    assert events(client, ask | {"features": [10**6]})[-1]["what"].startswith("arm control has no feature")
    assert "chat template" in events(client, ask | {"chat": True})[-1]["what"]


def test_a_wrong_address_is_a_page_that_says_so(site_run: Path, client_of: Client) -> None:
    client = client_of(site_run)
    for query in ("arm=control&feature=99999999", "dose=x", "arm=nobody&feature=1", "features=1,1&arm=control"):
        answer = client.get(f"/play?{query}")
        assert answer.status_code == 200 and 'class="trouble" role="alert"' in answer.text
    assert 'data-feature="3"' in client.get("/play?arm=treatment&feature=3").text


def test_features_are_found_by_number_token_and_label(run_copy: Path, client_of: Client) -> None:
    client = client_of(run_copy)
    table = RunFolder(run_copy, Study.open(run_copy / "study.yaml")).read_table(
        run_copy / "arms" / "control" / "features.parquet"
    )
    token = next(t.strip() for t in table["top_tokens"][5] if t.strip().isalpha())

    def found(q: str) -> list[int]:
        answer = client.get("/api/play/features", params={"arm": "control", "q": q})
        return [row["feature"] for row in answer.json()]

    assert found("17")[0] == 17
    hits = found(token.upper())
    assert hits and all(token.lower() in " ".join(table["top_tokens"][f]).lower() for f in hits)
    assert 0 < len(found("")) <= 12 and found("no such token at all") == []
    assert client.get("/api/play/features", params={"arm": "nobody"}).status_code == 400


def test_a_model_that_is_gone_leaves_the_pages(run_copy: Path, client_of: Client, ask: dict[str, Any]) -> None:
    file = run_copy / "study.yaml"
    text = file.read_text(encoding="utf-8")
    model = next(line.split(": ")[1] for line in text.splitlines() if line.strip().startswith("path:"))
    file.write_text(text.replace(model, model + "-gone"), encoding="utf-8")
    client = client_of(run_copy)
    assert client.get("/play").status_code == client.get("/").status_code == 200
    assert events(client, ask)[-1]["type"] == "error"
    state = client.get("/api/play/state").json()
    assert state["state"] == "failed" and "gone" in state["what"] and state["fix"]
    assert client.get("/api/export?arm=control&feature=1&format=csv").status_code == 200


def test_an_empty_directory_has_a_page(tmp_path: Path, client_of: Client) -> None:
    answer = client_of(tmp_path).get("/play")
    assert answer.status_code == 200 and "no model and no feature" in answer.text


def test_stopping_by_number(site_run: Path, client_of: Client) -> None:
    assert client_of(site_run).post("/api/play/stop", json={"job": "x"}).json() == {"stopped": False}


@pytest.mark.parametrize(
    ("query", "status", "begins"),
    [
        ("arm=treatment&feature=4&feature=8&format=csv", 200, b"arm,feature"),
        ("arm=treatment&feature=4&format=neuronpedia", 200, b"{"),
        ("arm=control&group=domain&format=safetensors&dose=0.5", 200, b""),
        ("arm=control&feature=1&format=gguf", 400, b"{"),  # the tiny SAE reads before block 1
        ("arm=control&format=csv", 400, b"{"),
        ("arm=control&feature=1&format=exe", 400, b"{"),
        ("arm=nobody&feature=1&format=csv", 400, b"{"),
        ("arm=control&feature=x&format=csv", 422, b"{"),
    ],
)
def test_downloads(site_run: Path, client_of: Client, query: str, status: int, begins: bytes) -> None:
    answer = client_of(site_run).get(f"/api/export?{query}")
    assert answer.status_code == status and answer.content.startswith(begins)
    if status == 200:
        assert answer.headers["content-disposition"].startswith('attachment; filename="')


def test_links_of_the_page_are_those_of_the_app(site_run: Path, client_of: Client) -> None:
    page = client_of(site_run).get("/play?arm=control&feature=3").text
    links = [part.split('"')[0] for part in page.split('href="')[1:]]
    assert {"/features/control/3", "/play"} <= {urlsplit(link).path for link in links}
    assert all(link.startswith(("/", "#")) for link in links)
