"""The overview of a run directory in every state that one can be in."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeffect.io import read_json, write_json
from saeffect.progress import Log, Progress
from saeffect.study.progress_file import ProgressFile, read_progress
from saeffect.web.overview.state import run_state
from saeffect.web.site import Site


def page_of(client: Any) -> str:
    """The overview once its report is there."""
    for _ in range(1200):
        if client.get("/api/progress").json()["ready"]:
            return str(client.get("/").text)
        time.sleep(0.05)
    raise AssertionError("the report is never ready")


def headings(page: str) -> list[str]:
    return [re.sub("<[^>]*>", "", text) for text in re.findall(r"<h[12][^>]*>(.*?)</h[12]>", page, flags=re.DOTALL)]


def test_finished_run_shows_its_report_unchanged(run_copy: Path, client_of: Callable[..., Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}
    client = client_of(run_copy)
    page, report = page_of(client), (run_copy / "report.html").read_text()
    answer = read_json(run_copy / "comparison" / "answer.json")
    assert answer["headline"] in page.replace("&#39;", "'")
    for table in ("glance", "table1", "table2", "design", "gate", "threats"):
        found = re.search(rf'<table role="table" class="[^"]*t-{table}".*?</table>', report, flags=re.DOTALL)
        assert found and found[0] in page, table
    assert "<style" not in page and " style=" not in page and "Not finished" not in page
    for path in ("/report", "/files/tables/table1.csv", "/nothing"):
        client.get(path)
    assert {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")} == before


def test_models_and_saes_may_be_gone(run_copy: Path, client_of: Callable[..., Any]) -> None:
    study = run_copy / "study.yaml"
    text = study.read_text()
    gone = re.sub(r"(path|sae): (/\S+/)(base|tuned|saes/\w+)$", r"\1: \2gone/\3", text, flags=re.MULTILINE)
    assert gone != text
    study.write_text(gone)
    page = page_of(client_of(run_copy))
    assert 'id="table-table1"' in page and "cannot be shown" not in page


def test_unfinished_run_shows_results_and_next_step(run_copy: Path, client_of: Callable[..., Any]) -> None:
    manifest = read_json(run_copy / "manifest.json")
    for key in ("compare", "report", "steer treatment"):
        del manifest["stages"][key]
    write_json(run_copy / "manifest.json", manifest)
    client = client_of(run_copy)
    page = page_of(client)
    assert "Not finished" in page and "goes on from here" in page
    assert 'id="table-gate"' in page and 'id="table-table1"' not in page
    statuses = {stage["key"]: stage["status"] for stage in client.get("/api/progress").json()["stages"]}
    assert (statuses["steer control"], statuses["steer treatment"], statuses["compare"]) == ("done", *["waiting"] * 2)


def test_a_run_has_its_page_after_each_stage(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    stages = client.get("/api/progress").json()["stages"]
    manifest = read_json(run_copy / "manifest.json")
    for stage in reversed(stages):
        for output in manifest["stages"].pop(stage["key"])["outputs"]:
            (run_copy / output).unlink(missing_ok=True)
        write_json(run_copy / "manifest.json", manifest)
        page = page_of(client)
        assert "cannot be shown" not in page, stage["key"]
        assert "Not finished" in page or "No study yet" in page


def test_a_table_that_is_damaged_takes_nothing_else_away(run_copy: Path, client_of: Callable[..., Any]) -> None:
    (run_copy / "comparison" / "contrasts.parquet").write_bytes(b"PAR1")
    page = page_of(client_of(run_copy))
    assert "cannot be shown" in page and "contrasts.parquet" in page
    assert read_json(run_copy / "comparison" / "answer.json")["headline"] in page.replace("&#39;", "'")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "YAML"),
        ("nonsense: 1\n", ", name"),
        ("- 1\n", "mapping"),
    ],
)
def test_a_study_that_cannot_be_read_says_why(
    run_copy: Path, client_of: Callable[..., Any], text: str, words: str
) -> None:
    (run_copy / "study.yaml").write_text(text)
    answer = client_of(run_copy).get("/")
    assert answer.status_code >= 400 and words in answer.text and "What to do" in answer.text


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": 3}', '{"stages": {"gate control": 1}, "arms": {"a": 2}}'])
def test_a_damaged_manifest_is_no_crash(run_copy: Path, client_of: Callable[..., Any], text: str) -> None:
    (run_copy / "manifest.json").write_text(text)
    assert "Not finished" in page_of(client_of(run_copy))


def test_a_running_study_is_followed_from_its_first_moment(tmp_path: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(tmp_path)
    assert "No study yet" in client.get("/").text
    now = [100.0]
    with ProgressFile(tmp_path, "tiny", "A <b>tiny</b> study", ("gate a", "compare"), clock=lambda: now[0]) as file:
        file.begin("gate a")
        log = file.following(Log())
        now[0] += 10
        log.progress("reading", 10, 40, "rows")
        log.progress("reading", 11, 40, "rows")  # too soon to be written
        state = client.get("/api/progress").json()
        assert (state["condition"], state["share"]) == ("running", 0.25)
        assert state["doing"].startswith("reading: 10 of 40 rows, about 30 s left")
        assert [stage["status"] for stage in state["stages"]] == ["running", "waiting"]
        page = page_of(client)
        assert "cannot be shown" not in page
        assert "A &lt;b&gt;tiny&lt;/b&gt; study" in page and "Running" in page
    assert client.get("/api/progress").json()["condition"] == "empty"
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_is_not_running(tmp_path: Path) -> None:
    note = {"study": "s", "title": "", "stages": ["gate a"], "pid": 2**22 + 1, "host": socket.gethostname()}
    (tmp_path / "progress.json").write_text(json.dumps(note))
    found = read_progress(tmp_path)
    assert found is not None and not found.is_alive()
    assert run_state(Site(tmp_path)).condition == "empty"
    (tmp_path / "progress.json").write_text(json.dumps(note | {"pid": os.getpid()}))
    assert run_state(Site(tmp_path)).condition == "running"


@pytest.mark.parametrize("text", ["", "[]", '{"stages": 1}', '{"study": 1, "title": "", "stages": []}'])
def test_another_file_of_that_name_is_no_progress(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert read_progress(tmp_path) is None
    with ProgressFile(tmp_path, "tiny", "", ("gate a",)) as file:
        file.begin("gate a")
    assert (tmp_path / "progress.json").read_text() == text, "it is somebody's own"


def test_progress_is_passed_on_and_no_disk_stops_it(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with ProgressFile(tmp_path / "no" / "file", "s", "", ()) as file:
        (tmp_path / "no").write_text("a file") if not (tmp_path / "no").exists() else None
        file.following(Log(None, seen.append)).progress("reading", 1, 2, "rows")
    assert seen == [Progress("reading", 1, 2, "rows")]


@pytest.mark.parametrize(
    "path",
    [
        "/files/tables/..%2Fmanifest.json",
        "/files/..%2F..%2Fetc/passwd",
        "/files/comparison/answer.json",
        "/files/tables/%2Fetc%2Fpasswd",
        "/files/tables/link.csv",
    ],
)
def test_no_file_but_the_reports(run_copy: Path, client_of: Callable[..., Any], path: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (run_copy / "tables" / "link.csv").symlink_to(tmp_path / "secret")
    answer = client_of(run_copy).get(path)
    assert answer.status_code == 404 and "secret" not in answer.text


def test_files_of_the_run_are_sandboxed(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    answer = client.get("/files/tables/table1.csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    policy = client.get("/report").headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts") and "allow-same-origin" not in policy
    assert "default-src 'none'" in policy and "'self'" not in policy
