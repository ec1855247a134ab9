"""Pages of the feature browser over a tiny run: whole, half-finished, damaged, hostile, without models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from saeffect.errors import ConfigError
from saeffect.features.embeddings import WordVectors, load_embeddings
from saeffect.review.queue import fingerprint_tokens
from saeffect.review.store import NOT_BLIND, STORE, Verdict, VerdictStore
from saeffect.study.both_models import read_both_models, refuse_remote_code
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study
from saeffect.web.features.catalogue import catalogue
from saeffect.web.features.query import Query
from saeffect.web.features.record import token_pairs
from saeffect.web.play.engine import Engine


@pytest.fixture
def client(run_copy: Path, client_of: Callable[..., Any]) -> Any:
    return client_of(run_copy)


@pytest.fixture(scope="session")
def read_run(site_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose text was read with both models."""
    run = Path(shutil.copytree(site_run, tmp_path_factory.mktemp("both") / "run"))
    assert len(read_both_models(run)) == 6
    assert read_both_models(run) == []
    return run


def test_list_page_and_its_rows(client: Any) -> None:
    whole = client.get("/features?arm=control&sort=feature")
    assert whole.status_code == 200 and whole.text.count('class="open"') == 50
    rows = client.get("/api/features/rows?arm=control&sort=feature&page=2")
    assert rows.status_code == 200 and rows.text.count('class="open"') == 46
    assert "<html" not in rows.text and 'href="/features/control/50?arm=control&amp;sort=feature"' in rows.text
    found = client.get("/api/features?arm=control&q=%2395").json()
    assert (found["total"], found["features"][0]["feature"]) == (1, 95)
    assert "Nothing to sort by" not in whole.text
    assert "“Detection by a model&#39;s label”; no feature" in client.get("/features?sort=accuracy").text


def test_wrong_questions_get_a_page_that_says_what_exists(client: Any) -> None:
    for path, word in (
        ("/features?fate=lost", "kept"),
        ("/features?arm=other", "control"),
        ("/features?page=x", "page"),
    ):
        answer = client.get(path)
        assert answer.status_code == 400 and word in answer.text, path
    for path in ("/features/control/96", "/features/control/x", "/features/control/-1"):
        assert client.get(path).status_code == 404, path
    assert client.get("/features/other/1").status_code == 400
    assert client.get("/api/features/rows?fate=lost").json()["error"]


def test_a_page_shows_what_the_tables_say(run_copy: Path, client: Any) -> None:
    features = pd.read_parquet(run_copy / "arms/treatment/features.parquet")
    steered = pd.read_parquet(run_copy / "arms/treatment/effects.parquet")["feature"].iloc[0]
    text = client.get(f"/features/treatment/{steered}").text
    record = client.get(f"/api/features/treatment/{steered}").json()
    row = features[features["feature"] == steered].iloc[0]
    assert [one["token"] for one in record["top_tokens"]] == row["top_tokens"].tolist()
    assert record["numbers"]["density"] == pytest.approx(row["density"])
    assert record["steering"]["texts"]
    assert re.search(r"(Typical \(median\)|First) pair", text)  # best and worst only where they are others
    assert "Not read in both models yet" in text and record["bottom_tokens"] is None
    assert "Among the strongest" not in text
    assert record["matches"][0]["match_arm"] == "control"


def test_pairs_average_to_the_coherence(run_copy: Path, client: Any) -> None:
    table = pd.read_parquet(run_copy / "arms/control/coherence.parquet").dropna(subset="coherence")
    record = client.get(f"/api/features/control/{table['feature'].iloc[0]}").json()["coherence"]
    mean = sum(pair["share"] * pair["cosine"] for pair in record["pairs"])
    assert mean == pytest.approx(table["coherence"].iloc[0], abs=1e-6)
    toy = WordVectors.from_rows(["cat"], [[1.0]], name="toy")
    assert token_pairs(["cat", "x"], [1.0, 1.0], toy) == []
    assert len(load_embeddings()) > 1000


def test_both_models_read_like_the_run(read_run: Path, client_of: Callable[..., Any]) -> None:
    own = pd.read_parquet(read_run / "arms/control/examples.parquet")
    features = pd.read_parquet(read_run / "arms/control/features.parquet")
    (both,) = (read_run / "cache").glob("both-control-*-contexts.parquet")
    contexts = pd.read_parquet(both)
    peaks = contexts.apply(lambda row: row["tokens"][row["position"]], axis=1)
    assert not peaks.str.contains("endoftext").any()
    at_end = own.apply(lambda row: "endoftext" in row["tokens"][row["position"]], axis=1)
    plain = set(own["feature"]) - set(own.loc[at_end, "feature"])
    assert len(plain) > 10
    own = own[own["feature"].isin(plain)]
    same = contexts[(contexts["chosen_in"] == "control") & contexts["feature"].isin(plain)]
    for known, now in zip(own.itertuples(), same.itertuples(), strict=True):
        n = len(now.tokens)  # the end of a text at the end of a row is left out
        assert list(known.tokens)[:n] == list(now.tokens) and {"<|endoftext|>"} >= set(known.tokens[n:])
        inside = [i for i in range(n) if known.tokens[i] != "<|endoftext|>"]
        assert [known.activations[i] for i in inside] == [now.activations[i] for i in inside]
    assert any(np.asarray(row).any() for row in same["activations_beside"])
    table = pd.read_parquet(next(path for path in (read_run / "cache").glob("both-control-*") if path != both))
    assert table["density"].tolist() == features["density"].tolist()
    assert np.allclose(table["mean_activation"], features["mean_activation"], equal_nan=True)
    assert [sum(bars) for bars in table["counts"]] == features["n_active"].tolist()
    # The least of what a decoder row promotes is below all its top tokens.
    assert all(
        row.bottom_weights[0] < min(top) for row, top in zip(table.itertuples(), features["top_weights"], strict=True)
    )
    number = int(features.sort_values("n_active")["feature"].iloc[-1])
    text = client_of(read_run).get(f"/features/control/{number}").text
    assert "Base model" in text and "Fine-tuned model" in text and "Suppresses" in text
    assert "Not read in both models yet" not in text


def test_models_with_own_code_are_not_loaded(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run_copy / "study.yaml"
    study = yaml.safe_load(file.read_text())
    study["arms"]["control"]["model"]["trust_remote_code"] = True
    file.write_text(yaml.safe_dump(study))
    with pytest.raises(ConfigError, match="somebody else"):
        read_both_models(run_copy)
    engine = Engine(lambda: RunFolder(run_copy, Study.open(file)))
    with pytest.raises(ConfigError, match="somebody else"):
        list(engine.warm())
    monkeypatch.setenv("SAEFFECT_TRUST_REMOTE_CODE", "1")
    refuse_remote_code(Study.open(file), "control")


def test_pages_work_when_no_model_loads_any_more(read_run: Path, tmp_path: Path, client_of: Callable[..., Any]) -> None:
    """The study names folders that are gone; the page still has all that was read."""
    run = Path(shutil.copytree(read_run, tmp_path / "run"))
    text = (run / "study.yaml").read_text(encoding="utf-8")
    (run / "study.yaml").write_text(re.sub(r"/(base|tuned|saes)\b", r"/gone-\1", text), encoding="utf-8")
    client = client_of(run)
    assert client.get("/features?q=heart").status_code == 200
    answer = client.get("/features/control/3")
    assert answer.status_code == 200 and "Suppresses" in answer.text
    shutil.rmtree(run / "cache")
    job = client.post("/api/both-models")
    assert job.status_code == 202
    state: dict[str, Any] = {"state": "running"}
    while state["state"] == "running":
        state = client.get("/api/both-models").json()
    assert state["state"] == "failed" and "gone-" in json.dumps(state)
    assert "Not read in both models yet" in client.get("/features/control/3").text


def test_half_finished_and_damaged_runs_have_pages(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    assert client.get("/features").status_code == 200
    for name in ("coherence", "effects", "interventions", "examples", "selection"):
        (run_copy / f"arms/control/{name}.parquet").unlink()
    shutil.rmtree(run_copy / "comparison")
    (run_copy / "arms/placebo/features.parquet").write_bytes(b"PAR1")
    answer = client.get("/features")
    assert answer.status_code == 200 and "placebo</bdi> has no features here" in answer.text
    text = client.get("/features/control/5").text
    assert "The stage that writes it has not finished" in text
    assert client.get("/features/placebo/5").status_code == 404
    shutil.rmtree(run_copy / "arms")
    assert "No feature fits" in client.get("/features").text


def test_an_empty_directory_says_how_to_begin(tmp_path: Path, client_of: Callable[..., Any]) -> None:
    answer = client_of(tmp_path).get("/features")
    assert answer.status_code == 404 and "saeffect run" in answer.text


def test_hostile_tokens_and_labels_stay_text(run_copy: Path, client_of: Callable[..., Any]) -> None:
    for name, column in (("features", "top_tokens"), ("examples", "tokens")):
        path = run_copy / f"arms/control/{name}.parquet"
        table = pd.read_parquet(path)
        table[column] = [['"><script>alert(1)</script>', "\u202eevil", *row[2:]] for row in map(list, table[column])]
        table.to_parquet(path, index=False)
    path = run_copy / "arms/control/selection.parquet"
    pd.read_parquet(path).assign(label="<img src=x onerror=alert(1)>", n_yes=1).to_parquet(path, index=False)
    client = client_of(run_copy)
    for url in ("/features?q=%22%3E%3Cscript%3E", "/features/control/1", "/api/features/rows?q=<script>"):
        answer = client.get(url)
        assert answer.status_code == 200
        rest = answer.text.replace('<script type="module"', "")
        assert "<script" not in rest and "<img" not in rest and "\u202e" not in rest, url
    assert "alert(1)" in client.get("/api/features/control/1").json()["label"]


def test_verdicts_given_in_the_app_are_shown_and_filtered(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    tokens = client.get("/api/features/control/7").json()["top_tokens"]
    seen = fingerprint_tokens([one["token"] for one in tokens])
    assert client.get("/api/features?arm=control&verdict=yes").json()["total"] == 0
    with VerdictStore(run_copy / STORE) as store:
        store.join("ada")
        store.record("ada", Verdict("control", 7, seen, "yes", "hearts", "clear"))
        store.record("ada", Verdict("control", 8, "other tokens", "yes", "", ""))
        store.record("ada", Verdict("control", 5_000, seen, "yes", "", ""))
        # Hidden until somebody says that they will not judge blind.
        assert client.get("/api/features?arm=control&verdict=yes").json()["total"] == 0
        text = client.get("/features/control/7").text
        assert "What people said is hidden" in text and "ada" not in text
        assert "What people said is hidden" in client.get("/features").text
        assert client.post("/review/look", data={"next": "/features?q=a"}).url.path == "/features"
        found = client.get("/api/features?arm=control&verdict=yes").json()
        assert [row["feature"] for row in found["features"]] == [7] and found["features"][0]["label"] == "hearts"
        assert client.get("/api/features?q=hearts").json()["total"] == 1
        text = client.get("/features/control/7").text
        assert "1 yes, 0 no" in text and "ada" in text and "clear" in text
        blind = catalogue(client.app.state.site, blind=True)
        assert blind.record("control", 7)["verdicts"]["given"] == []
        assert blind.index.find(Query(verdict="yes")).total == 0
        store.record("ada", Verdict("control", 7, seen, "no", "", "", role="adjudicator"))
        assert client.get("/api/features?arm=control&verdict=no").json()["total"] == 1


def test_label_is_corrected_on_the_feature_page(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client, page = client_of(run_copy), "/features/control/7"
    assert "Write your name" in client.get(page).text
    said = {"verdict": "no", "label": "a <b>better</b> name", "next": f"{page}?q=a"}
    assert client.post(f"{page}/verdict", data=said).status_code == 400  # nobody is signed in
    client.post("/review/join", data={"name": "ada", "next": page})
    assert "What others said is hidden" in client.get(page).text and 'class="relabel"' not in client.get(page).text
    client.post("/review/look", data={"next": page})
    assert 'class="relabel"' in client.get(page).text
    answer = client.post(f"{page}/verdict", data=said)
    assert answer.url.path == page and "a &lt;b&gt;better&lt;/b&gt; name" in answer.text
    assert 'value="no" required checked' in answer.text
    assert client.get("/api/features?q=better").json()["features"][0]["verdict"] == "no"
    with VerdictStore(run_copy / STORE) as store:
        assert store.current()["source"].tolist() == [NOT_BLIND]
    for path, verdict, status in (("/features/control/5000", "no", 404), (page, "maybe", 400)):
        assert client.post(f"{path}/verdict", data=said | {"verdict": verdict}).status_code == status
    assert client.post(f"{page}/verdict", data=said | {"next": "https://elsewhere.example"}).url.path == "/"


def test_model_labels_are_marked_and_hidden_from_raters(run_copy: Path, client_of: Callable[..., Any]) -> None:
    client = client_of(run_copy)
    assert "language model" not in client.get("/features/control/7").text
    seen = {
        number: fingerprint_tokens(
            [one["token"] for one in client.get(f"/api/features/control/{number}").json()["top_tokens"]]
        )
        for number in (7, 9)
    }
    counts = {"n_active": 10, "found": 8, "n_silent": 10, "left": 9, "unanswered": 0, "shown": 6, "model": "m-1"}
    scored = {"accuracy": 0.85, "low": 0.65, "high": 0.95, "reason": ""}
    hidden = {"accuracy": np.nan, "low": np.nan, "high": np.nan, "reason": "no context activates it"}
    rows = [
        {"feature": 7, "seen": seen[7], "label": "beating <b>hearts</b>", **scored, **counts},
        {"feature": 8, "seen": "of other tokens", "label": "hearts of stone", **scored, **counts},
        {"feature": 9, "seen": seen[9], "label": "hearts, queens", **hidden, **counts},
        {"feature": 5_000, "seen": seen[7], "label": "hearts beyond", **scored, **counts},
    ]
    (run_copy / "labels").mkdir()
    pd.DataFrame(rows).to_parquet(run_copy / "labels" / "control.parquet")
    page = client.get("/features/control/7").text
    assert "Label by a language model" in page and "beating &lt;b&gt;hearts&lt;/b&gt;" in page
    assert "0.85" in page and "[0.65, 0.95]" in page and "8 of 10" in page and "m-1" in page
    assert "0 yes" not in page and "Nobody has judged it yet" in page
    assert "no context activates it" in client.get("/features/control/9").text
    assert "language model" not in client.get("/features/control/8").text
    listed = client.get("/api/features?q=hearts&sort=accuracy").json()["features"]
    assert [(row["feature"], row["model_label"][:7], row["label"]) for row in listed] == [
        (7, "beating", ""),
        (9, "hearts,", ""),
    ]
    assert "detection 0.85 [0.65, 0.95]" in client.get("/features?q=hearts").text
    assert client.get("/api/features/control/7").json()["model_label"]["accuracy"] == 0.85
    blind = catalogue(client.app.state.site, blind=True)
    assert blind.record("control", 7)["model_label"] is None and blind.index.find(Query(q="hearts")).total == 0
    (run_copy / "labels" / "control.parquet").write_bytes(b"scrap")
    assert client.get("/features/control/7").status_code == 200 and client.get("/features?q=hearts").status_code == 200
