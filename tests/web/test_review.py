"""The review's pages: signing in, judging blind, undo, agreement, decisions; and in a browser, by keys alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from saeffect.review.store import NOT_BLIND, STORE, Verdict, VerdictStore
from saeffect.study.review import read_queue


def join(client: Any, name: str, **more: str) -> Any:
    return client.post("/review/join", data={"name": name} | more, follow_redirects=False)


def shown(client: Any) -> dict[str, str]:
    """The hidden fields of the screen."""
    return dict(re.findall(r'name="(item|request)" value="([0-9a-f]{16})"', client.get("/review/queue").text))


def judge(client: Any, verdict: str, **more: str) -> Any:
    return client.post("/api/review/verdict", json=shown(client) | {"verdict": verdict} | more)


def standing(run: Path) -> list[tuple[str, str, str]]:
    with VerdictStore(run / STORE) as store:
        table = store.current()
        return list(zip(table["rater"], table["role"], table["verdict"], strict=True))


def sources(run: Path) -> dict[str, list[str]]:
    """Where the verdicts that stand come from, by rater."""
    with VerdictStore(run / STORE) as store:
        return store.current().groupby("rater")["source"].unique().map(list).to_dict()


def said_of(run: Path) -> str:
    """The page of a feature that is in the queue."""
    item = read_queue(run).candidates[0]
    return f"/features/{item.arm}/{item.feature}"


def everything(run: Path, rater: str, verdict: str) -> None:
    with VerdictStore(run / STORE) as store:
        items = read_queue(run).items
        store.record(rater, *(Verdict(i.arm, i.feature, i.seen, verdict, kind=i.kind) for i in items))


def test_reading_the_pages_writes_nothing(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    for path in ("/review", "/review/agreement", "/review/disagreements"):
        assert client.get(path).status_code == 200
    assert client.get("/review/queue", follow_redirects=False).headers["location"] == "/review"
    assert not (run_copy / STORE).exists()


def test_a_verdict_is_acknowledged_with_the_next_screen(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    assert join(client, "Ann").headers["location"] == "/review/queue"
    first = shown(client)
    said = first | {"verdict": "yes", "label": "cells", "note": "why"}
    answer = client.post("/api/review/verdict", json=said)
    assert answer.status_code == 200
    assert re.match(r"Saved: yes\. 1 of \d+\.", answer.json()["said"])
    assert first["item"] not in answer.json()["html"]
    assert client.post("/api/review/verdict", json=said).status_code == 200  # sent again: counts once
    back = client.post("/api/review/undo", json={})
    assert "Taken back" in back.json()["said"]
    assert first["item"] in back.json()["html"] and 'value="cells"' in back.json()["html"]
    assert standing(run_copy) == []


def test_without_a_script_forms_do_the_same(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    join(client, "Ann")
    fields = shown(client)
    answer = client.post("/review/verdict", data=fields | {"verdict": "no", "label": "", "note": ""})
    assert answer.url.path == "/review/queue" and fields["item"] not in answer.text
    assert fields["item"] in client.post("/review/undo", data=fields).text


def test_the_screen_tells_nothing_that_it_hides(run_copy: Path, client_of: Callable[..., Any]) -> None:
    everything(run_copy, "Zoe", "yes")
    client = client_of(run_copy)
    join(client, "Ann")
    page = client.get("/review/queue").text
    for secret in ("control", "treatment", "placebo", "Zoe", "shuffled", "decoy", "coherence", "known"):
        assert secret not in re.sub(r"<header.*?</header>", "", page, flags=re.S)
    assert not re.search(r"title=", page)


def test_decoys_look_like_candidates(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    join(client, "Ann")
    shapes = set()
    for _ in range(40):
        html = judge(client, "no").json()["html"]
        html = re.sub(r'<ul class="contexts">.*?</ul>|<p class="missing">.*?</p>', "", html, flags=re.S)
        shapes.add((tuple(re.findall(r'<(?!i )(\w+)(?: class="([^"]*)")?', html)), html.count("<li>")))
    assert len(shapes) == 1


def test_a_name_that_was_there_before_is_asked_about(run_copy: Path, client_of: Callable[..., Any]) -> None:
    ann = client_of(run_copy)
    join(ann, "Ann")
    judge(ann, "yes")
    other = client_of(run_copy)
    asked = join(other, " ann ")
    assert asked.headers["location"] == "/review?name=Ann"
    page = other.get("/review?name=Ann").text
    assert "Are you <bdi>Ann</bdi>?" in page and "has judged 1 of" in page
    assert other.get("/review/queue", follow_redirects=False).status_code == 303
    assert join(other, "Ann", again="yes").headers["location"] == "/review/queue"
    assert "1 of" in other.get("/review/queue").text
    other.post("/review/leave")
    assert other.get("/review/queue", follow_redirects=False).status_code == 303


def test_hostile_names_labels_and_forms(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    assert join(client, "<script>alert(1)</script>\u202e").status_code == 303
    judge(client, "yes", label="<img src=x onerror=alert(1)>", note="</textarea><script>")
    for path in ("/review", "/review/queue"):
        page = client.get(path).text
        assert "<script>alert" not in page and "<img" not in page and "\u202e" not in page
    fields = shown(client)
    for bad in ({"verdict": "maybe"}, {"verdict": "yes", "label": "x" * 500}):
        assert client.post("/api/review/verdict", json=fields | bad).status_code == 400
    assert client.post("/api/review/verdict", content=b"\xff\xfe").status_code == 400
    assert client.post("/api/review/verdict", json=[1]).status_code == 400
    gone = client.post("/api/review/verdict", json={"item": "0" * 16, "verdict": "yes"})
    assert gone.status_code == 404 and "no longer part of the review" in gone.json()["error"]
    assert client.post("/api/review/verdict", json=fields, headers={"Origin": "http://evil.example"}).status_code == 403
    assert len(standing(run_copy)) == 1
    assert client_of(run_copy).post("/api/review/verdict", json=fields | {"verdict": "yes"}).status_code == 400


def test_what_others_said_opens_when_one_has_judged_everything(run_copy: Path, client_of: Callable[..., Any]) -> None:
    everything(run_copy, "Ben", "no")
    client = client_of(run_copy)
    for path in ("/review/agreement", "/review/disagreements"):
        page = client.get(path).text
        assert "What people said is hidden" in page and "Krippendorff" not in page
    join(client, "Ann")
    judge(client, "yes")
    for path in ("/review/agreement", "/review/disagreements"):
        page = client.get(path).text
        assert "you have judged 1 of" in page and "Ben" not in page
    assert "Ben" not in client.get(said_of(run_copy)).text
    everything(run_copy, "Ann", "yes")
    assert "Ben" in client.get(said_of(run_copy)).text
    page = unescape(client.get("/review/agreement").text)
    assert "Krippendorff's alpha" in page and "Yes to shuffled tokens" in page and "Cohen's kappa" in page
    page = client.get("/review/disagreements").text
    fields = dict(re.findall(r'name="(item|request)" value="([0-9a-f]{16})"', page))
    assert "wait for a decision" in page and "control" not in page
    client.post("/review/adjudicate", data=fields | {"verdict": "no", "label": "noise"})
    assert ("Ann", "adjudicator", "no") in standing(run_copy)
    total = int(re.findall(r"of (\d+) wait for a decision", page)[0])
    assert f"{total - 1} of {total} wait for a decision" in client.get("/review/disagreements").text
    last = client.get("/review/disagreements?page=99").text  # decided ones go to the end
    assert "Decided: no" in last and ("Next →" not in last)
    assert client.get("/review/disagreements?page=0").status_code == 422
    # What a rater says after looking is marked, and does not count for agreement.
    client.post("/api/review/undo", json={})
    judge(client, "no")
    assert sources(run_copy)["Ann"] == ["app", NOT_BLIND]


def test_a_blind_review_can_be_ended(run_copy: Path, client_of: Callable[..., Any]) -> None:
    everything(run_copy, "Ben", "no")
    everything(run_copy, "Zoe", "yes")
    client = client_of(run_copy)
    join(client, "Ann")
    judge(client, "yes")
    answer = client.post("/review/look", data={"next": "/review/agreement"})
    assert answer.url.path == "/review/agreement" and "Krippendorff" in answer.text
    judge(client, "no")
    assert sources(run_copy)["Ann"] == ["app", NOT_BLIND]
    assert "marked as not blind" in client.get("/review").text
    # Somebody looks first, and judges then.
    other = client_of(run_copy)
    assert (
        other.post("/review/look", data={"next": "//evil.example"}, follow_redirects=False).headers["location"] == "/"
    )
    assert "Krippendorff" in other.get("/review/agreement").text
    assert "marked as not blind" in other.get("/review").text
    join(other, "Cy")
    judge(other, "yes")
    assert sources(run_copy)["Cy"] == [NOT_BLIND]


def test_model_labels_are_hidden_until_all_is_judged(run_copy: Path, client_of: Callable[..., Any]) -> None:
    item = read_queue(run_copy).candidates[0]
    counts = dict.fromkeys(("n_active", "found", "n_silent", "left", "unanswered", "shown"), 5)
    row = {"feature": item.feature, "seen": item.seen, "label": "beating hearts", "accuracy": 0.85, "low": 0.65}
    (run_copy / "labels").mkdir()
    pd.DataFrame([row | {"high": 0.95, "reason": "", "model": "m", **counts}]).to_parquet(
        run_copy / "labels" / f"{item.arm}.parquet"
    )
    client = client_of(run_copy)
    join(client, "Ann")
    pages = [client.get("/review/queue").text, judge(client, "yes").json()["html"]]
    pages += [client.get(path).text for path in ("/review/agreement", "/review/disagreements")]
    assert not any("beating hearts" in page for page in pages)
    everything(run_copy, "Ann", "yes")
    page = client.get("/review/agreement").text
    assert "beside a language model" in page and "beating hearts" in page and "0.65" in page


def test_damaged_store_gives_a_page_and_is_unchanged(run_copy: Path, client_of: Callable[..., Any]) -> None:
    (run_copy / STORE).write_bytes(b"scrap" * 1000)
    answer = client_of(run_copy).get("/review")
    assert answer.status_code == 500 and "cannot be read" in answer.text and "was not changed" in answer.text
    assert (run_copy / STORE).read_bytes() == b"scrap" * 1000
    assert client_of(run_copy).get("/").status_code == 200


def test_a_run_without_features_gets_a_page(run_copy: Path, client_of: Callable[..., Any]) -> None:
    shutil.rmtree(run_copy / "arms")
    answer = client_of(run_copy).get("/review")
    assert answer.status_code == 404 and "no features to review" in answer.text


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1280])
def test_judging_by_keys_alone(
    run_copy: Path, serve_run: Callable[..., Any], tab: Callable[..., Any], width: int
) -> None:
    from playwright.sync_api import expect

    with serve_run(run_copy) as url:
        page = tab(width)
        page.goto(f"{url}/review", wait_until="load")
        page.locator("#name").focus()
        page.keyboard.type("Ann")
        page.keyboard.press("Enter")
        page.wait_for_url("**/review/queue", wait_until="load")
        status, count = page.locator("#status"), page.locator(".judging-head .num")
        page.keyboard.press("l")
        page.keyboard.type("yes, new")  # letters in a field are no verdicts
        page.keyboard.press("Enter")
        expect(count).to_have_text(re.compile("^0 of"))
        page.keyboard.press("y")
        expect(status).to_have_text(re.compile(r"Saved: yes\. 1 of"))
        page.keyboard.press("n")
        expect(status).to_have_text(re.compile(r"Saved: no\. 2 of"))
        page.keyboard.press("u")
        expect(status).to_have_text(re.compile(r"Saved: unsure\. 3 of"))
        page.keyboard.press("z")
        expect(page.locator(".before")).to_contain_text("unsure")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        box = page.locator(".answer-keys").bounding_box()
        assert box["y"] + box["height"] <= 900  # the keys are in sight, however long the texts
        assert page.messages == []
    assert [said for _, _, said in standing(run_copy)] == ["yes", "no"]


@pytest.mark.browser
def test_verdict_is_retried_and_counted_once(
    run_copy: Path, serve_run: Callable[..., Any], tab: Callable[..., Any]
) -> None:
    from playwright.sync_api import expect

    with serve_run(run_copy) as url:
        page = tab(1280)
        page.goto(f"{url}/review", wait_until="load")
        page.fill("#name", "Ann")
        page.keyboard.press("Enter")
        page.wait_for_url("**/review/queue", wait_until="load")
        answers = iter((False, True))

        def lose_the_answer(route: Any) -> None:
            if next(answers, False):
                route.continue_()
            else:
                route.fetch()  # the server has saved it, and the browser never hears of it
                route.abort()

        page.route("**/api/review/verdict", lose_the_answer, times=2)
        page.keyboard.press("y")
        expect(page.locator("#status")).to_contain_text("Trying again")
        page.keyboard.press("n")  # nothing moves meanwhile
        expect(page.locator("#status")).to_have_text(re.compile(r"Saved: yes\. 1 of"))
    assert [said for _, _, said in standing(run_copy)] == ["yes"]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_faults(
    run_copy: Path, serve_run: Callable[..., Any], tab: Callable[..., Any], barriers: Callable[..., Any], scheme: str
) -> None:
    everything(run_copy, "Ben", "no")
    everything(run_copy, "Cy", "yes")
    with serve_run(run_copy) as url:
        page = tab(1280, color_scheme=scheme, bypass_csp=True)
        page.goto(f"{url}/review/agreement", wait_until="load")
        page.get_by_role("button", name="Show what they said").click()
        page.get_by_text("Krippendorff").first.wait_for()
        for path in ("/review", "/review/agreement", "/review/disagreements", "/review/queue"):
            if path == "/review/queue":
                page.goto(f"{url}/review", wait_until="load")
                page.fill("#name", "Ann")
                page.keyboard.press("Enter")
                page.wait_for_url("**/review/queue", wait_until="load")
            else:
                page.goto(f"{url}{path}", wait_until="load")
            assert barriers(page) == [], path
