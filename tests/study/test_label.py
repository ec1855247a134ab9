"""Labels of a run by a scripted language model: what is sent, scored, kept, and lost (nothing)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from chat_server import Raw, Seen, chat_server
from command_line import call
from saeffect.errors import BadFile, ConfigError, EmptySelection, InUse, NotFound, SaeffectError, Unreachable
from saeffect.io import sole_writer
from saeffect.lm import endpoint as asking
from saeffect.progress import Log
from saeffect.study.label import Cost, label, label_file, read_labels
from saeffect.study.label_contexts import LabelPlan, read_contexts
from saeffect.study.run import run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study
from tiny_study import TWO_ARMS, make_study

PLAN = LabelPlan(contexts=4, per_request=4)
KEY = "sk-secret-123"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label")
    study = Study.open(make_study(folder, arms=TWO_ARMS, steering=None))
    run_study(study, folder / "run", stages=("gate", "features", "coherence", "select"))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEFFECT_LABEL_MODEL", "m")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(asking.Endpoint.__init__, "__kwdefaults__", {**WAITS, "first_wait": 0.01, "attempts": 2})
    return Path(shutil.copytree(finished, tmp_path / "run"))


WAITS = dict(asking.Endpoint.__init__.__kwdefaults__ or {})


def ask(run: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[pd.DataFrame, Cost]:
    costs: list[Cost] = []
    monkeypatch.setenv("OPENAI_BASE_URL", seen.url)
    options = {"plan": PLAN, "limit": 6, "confirm": lambda cost: costs.append(cost) or True} | more
    return label(run, **options), costs[0]


def contexts_of(run: Path) -> pd.DataFrame:
    (file,) = (run / "labels").glob("contexts-*.parquet")
    return pd.read_parquet(file)


def texts_in(text: str) -> int:
    return len(re.findall(r"^\d+\. ", text, flags=re.MULTILINE))


class Oracle:
    """Labels every feature by its number, and knows from such a label which contexts activate it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        table = pd.read_parquet(run / "arms" / "treatment" / "features.parquet")
        names = ([token.strip() for token in tokens] for tokens in table["top_tokens"])
        self.numbers = {json.dumps(name, ensure_ascii=True): n for n, name in zip(table["feature"], names, strict=True)}

    def __call__(self, text: str, _: int = 0) -> str:
        if "What does it stand for?" in text:
            tokens = json.loads(re.search(r"more likely: (\[.*\])\n", text)[1])
            return f"Label: unit {self.numbers[json.dumps(tokens, ensure_ascii=True)]}"
        number = int(re.search(r'stands for: "unit (\d+)"', text)[1])
        own = contexts_of(self.run)
        own = own[(own["feature"] == number) & (own["kind"] == "active")]
        active = {"".join(tokens) for tokens in own["tokens"]}
        quoted = [json.loads(line.split(" ", 1)[1]) for line in text.split("\n") if re.match(r"\d+\. ", line)]
        return str([int(one in active) for one in quoted])


def test_perfect_answers_score_one_and_are_cached(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(Oracle(run)) as seen:
        found, cost = ask(run, seen, monkeypatch)
    scored = found[found["reason"] == ""]
    assert len(found) == 6 and len(scored) >= 4 and found["accuracy"].notna().sum() == len(scored)
    assert (scored["accuracy"] == 1).all() and (scored["low"] > 0.5).all() and (scored["high"] == 1).all()
    assert (scored["found"] == scored["n_active"]).all() and (scored["left"] == scored["n_silent"]).all()
    assert (scored["n_active"] + scored["n_silent"]).max() == 8 and found["label"].str.startswith("unit ").all()
    assert len(seen.chats) == cost.requests and found[["n_active", "n_silent"]].sum().sum() == cost.n_contexts
    sent = sum(len(chat["messages"][0]["content"].encode()) for chat in seen.chats)
    assert sent <= 3.5 * cost.tokens_in
    n = cost.requests
    again, cost = ask(run, seen, monkeypatch)  # the server is gone
    assert (cost.requests, cost.kept) == (0, n)
    pd.testing.assert_frame_equal(again, found)
    pd.testing.assert_frame_equal(read_labels(run, "treatment"), found)
    files = [path for path in (run / "labels").rglob("*") if path.is_file()]
    assert len(files) == n + 2 and not any(KEY.encode() in path.read_bytes() for path in files)


def test_always_yes_is_chance(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda text, _: str([1] * texts_in(text)) if "stands for" in text else "anything") as seen:
        found, _ = ask(run, seen, monkeypatch, features=[3, 5])
    assert found["feature"].tolist() == [3, 5] and (found["accuracy"] == 0.5).any()
    assert ((found["accuracy"] == 0.5) | (found["reason"] != "")).all()


def test_contexts_are_what_they_are_said_to_be(run: Path) -> None:
    folder = RunFolder(run, Study.open(run / "study.yaml"))
    features = list(range(0, 96, 7))
    table = read_contexts(folder, "treatment", features, PLAN)
    pd.testing.assert_frame_equal(table, read_contexts(folder, "treatment", features, PLAN))
    arm, rows = folder.study.open_arm("treatment"), folder.study.rows()
    strings = arm.lm.token_strings()
    texts = ["".join(strings[token] for token in row) for row in rows.ids]
    with torch.inference_mode():
        parts = folder.study.residuals.batches(arm.lm, arm.hook, rows)
        acts = torch.cat([arm.sae.encode(x) for _, _, x in parts])[:, 1:, features].numpy()
    kinds = table.groupby(["feature", "kind"]).size().unstack(fill_value=0)
    assert (kinds.loc[kinds["active"] > 0, "silent"] > 0).any() and kinds["active"].sum() > 20
    for i, feature in enumerate(features):
        own = table[table["feature"] == feature]
        parts = {
            kind: ["".join(tokens) for tokens in own.loc[own["kind"] == kind, "tokens"]] for kind in set(own["kind"])
        }
        holds_shown = {n for n, text in enumerate(texts) if any(part in text for part in parts.get("shown", ()))}
        for kind in ("active", "silent"):
            for text in parts.get(kind, ()):
                where = {n for n, whole in enumerate(texts) if text in whole}
                assert where - holds_shown, "it comes from a row that holds none of the shown contexts"
                assert any((acts[n, :, i].max() > 0) == (kind == "active") or kind == "silent" for n in where)
        fires = np.flatnonzero(acts[:, :, i].max(axis=1) > 0)
        if len(fires) < 2 * PLAN.contexts:  # a rare one keeps half of its rows for the test
            assert len(parts.get("shown", ())) <= -(-len(fires) // 2) or len(fires) > len(parts["shown"]) + 3


def test_a_feature_without_examples_has_no_shown_context(run: Path) -> None:
    folder = RunFolder(run, Study.open(run / "study.yaml"))
    examples = folder.read_table(folder.arm("treatment", "examples.parquet"))
    feature = int(examples["feature"].iloc[0])
    examples[examples["feature"] != feature].to_parquet(folder.arm("treatment", "examples.parquet"))
    table = read_contexts(folder, "treatment", [feature], PLAN)
    assert len(table)
    assert "shown" not in set(table["kind"])


def test_a_rerun_asks_only_what_failed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, broken = Oracle(run), [True]
    with chat_server(lambda text, n: oracle(text) if n < 8 or not broken else Raw(500)) as seen:
        with pytest.raises(Unreachable, match="HTTP 500"):
            ask(run, seen, monkeypatch, plan=LabelPlan(contexts=4, per_request=4, parallel=1))
        assert 2 <= len(read_labels(run, "treatment")) < 6 and len(seen.chats) == 8 + 2
        broken.clear()
        found, cost = ask(run, seen, monkeypatch)
    assert len(seen.chats) - 10 == cost.requests > 0 and cost.kept == 8
    assert (found.loc[found["reason"] == "", "accuracy"] == 1).all()


def test_ctrl_c_keeps_what_is_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(progress: Any) -> None:
        if progress.what.startswith("labels") and progress.done == 2:
            raise KeyboardInterrupt

    with chat_server(Oracle(run)) as seen:
        with pytest.raises(KeyboardInterrupt):
            ask(run, seen, monkeypatch, log=Log(show=stop))
        assert len(read_labels(run, "treatment")) == 2
        found, cost = ask(run, seen, monkeypatch)
        assert cost.kept >= 4 and len(found) == 6
    ask(run, seen, monkeypatch, features=found["feature"].tolist()[:1])
    assert len(read_labels(run, "treatment")) == 6  # others stay


def test_without_a_yes_nothing_is_sent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(Oracle(run)) as seen:
        monkeypatch.setenv("OPENAI_BASE_URL", seen.url)
        found = label(run, plan=PLAN, limit=2, confirm=lambda _: False)
    assert found.empty and not seen.chats and not label_file(run, "treatment").exists()


def test_garbage_and_hostile_answers_are_contained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {0: "!!!", 1: "<script>alert(1)</script>\x1b[31m", 2: "fine"}

    def answer(text: str, n: int) -> str:
        if "What does it stand for?" in text:
            return answers[sum("What does" in chat["messages"][0]["content"] for chat in seen.chats[:n])]
        return "Ignore the question." if "fine" in text else str([0, 1, 0, 1][: texts_in(text)])

    with chat_server(answer) as seen:
        plan = LabelPlan(contexts=4, per_request=4, parallel=1)
        found, _ = ask(run, seen, monkeypatch, limit=3, plan=plan)
    none, hostile, fine = found.to_dict("records")
    assert none["label"] == "" and "gave no label" in none["reason"] and np.isnan(none["accuracy"])
    assert hostile["label"] == "<script>alert(1)</script>U+001B[31m" and hostile["reason"] == ""
    assert fine["label"] == "fine" and "contexts got no answer" in fine["reason"] and fine["unanswered"] > 4


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"arm": "other"}, SaeffectError, "control"),
        ({"features": [7, 999]}, ConfigError, "no feature 999"),
        ({"features": []}, EmptySelection, "no feature"),
        ({"features": "medical"}, SaeffectError, "domain"),
        ({"plan": LabelPlan(contexts=0)}, ConfigError, "contexts"),
    ],
)
def test_wrong_input_sends_and_writes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: type[SaeffectError], said: str
) -> None:
    with chat_server(lambda *_: "x") as seen, pytest.raises(kind, match=said):
        ask(run, seen, monkeypatch, **options)
    assert not seen.chats and not (run / "labels").exists()


def test_a_run_that_cannot_be_labelled_says_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda *_: "x") as seen:
        with sole_writer(run / "labels"), pytest.raises(InUse):
            ask(run, seen, monkeypatch)
        (run / "arms" / "treatment" / "features.parquet").unlink()
        with pytest.raises(BadFile, match="features"):
            ask(run, seen, monkeypatch)
        with pytest.raises(NotFound):
            ask(run / "nowhere", seen, monkeypatch)
    assert not seen.chats


def test_the_command_asks_before_it_sends(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    command = ["label", str(run), "--limit", "2", "--contexts", "4", "--price", "2", "8"]
    with chat_server(Oracle(run)) as seen:
        monkeypatch.setenv("OPENAI_BASE_URL", seen.url)
        assert call(command) == 2 and not seen.chats
        said = capsys.readouterr()
        assert "nobody said yes" in said.err and "At most 6 requests." in said.out and "at these prices" in said.out
        assert call([*command, "--yes"]) == 0
        said = capsys.readouterr()
        assert "2 labels. Detection (balanced accuracy, 0.5 is chance): 1.00" in said.out
        assert "6 requests were sent; the server counted 42 tokens in and 12 out" in said.err
        assert KEY not in said.out + said.err
        assert call(command) == 0 and "At most 0 requests; 6 were answered before." in capsys.readouterr().out
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert call(command) == 2 and "OPENAI_BASE_URL" in capsys.readouterr().err
