"""The stage that pushes the base model along the mean activation difference, on a tiny study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from saeffect.diffing import trace, written
from saeffect.errors import Undefined
from saeffect.progress import SILENT, Log, Progress
from saeffect.study.run import stage_keys
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages import push
from saeffect.study.stages.changes import changes_inputs
from saeffect.study.stages.push import push_inputs, run_push
from saeffect.study.stages.trace import read_trace, run_trace, trace_inputs, trace_path
from saeffect.study.study import Study
from tiny_study import TWO_ARMS, make_study

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (trace, written, push):
            patch.setattr(module, "OPENINGS", trace.OPENINGS[:3])
        patch.setattr(trace, "NEW_TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with a trace, and three nulls in whose place other directions stand."""
    folder = tmp_path_factory.mktemp("push")
    path = make_study(folder, arms=TWO_ARMS, push={"doses": [0.1, 20.0], "nulls": 2, "samples": 2}, nulls="./nulls")
    plain = Study.open(_without_nulls(path))
    run = RunFolder(folder / "run", plain)
    run.stage("trace", trace_inputs(run), lambda: run_trace(run, SILENT), SILENT)
    found, random = read_trace(run), np.random.default_rng(0)
    (folder / "nulls").mkdir()
    for k in (1, 2, 3):
        halves = random.standard_normal(found.halves.shape).astype(np.float32)
        replace(found, name=f"null-{k}", halves=halves).save(folder / "nulls" / f"null-{k}.safetensors")
    return RunFolder(folder / "run", Study.open(path))


def _without_nulls(path: Path) -> Path:
    config = yaml.safe_load(path.read_text())
    del config["nulls"]
    (other := path.with_name("plain.yaml")).write_text(yaml.safe_dump(config), encoding="utf-8")
    return other


def _pushed(run: RunFolder, log: Log = SILENT) -> tuple[pd.DataFrame, pd.DataFrame]:
    run.stage("push", push_inputs(run), lambda: run_push(run, log), SILENT, redo=True)
    texts, words = (run.read_table(run.path("comparison", f"{name}.parquet")) for name in push.PUSH_TABLES)
    return texts, words


def test_the_tables_and_their_lines_in_the_docs(traced: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "LEAST_TEXTS", 1)
    texts, words = _pushed(traced)
    assert len(texts) == 3 * 2 * (1 + 3 * 2)  # openings × samples × (no push, and fine-tune and two nulls at two doses)
    assert texts["fine_tune"].unique().tolist() == ["", "treatment", "null-1", "null-2"]
    assert texts["opening"].unique().tolist() == list(trace.OPENINGS[:3])
    base = traced.study.open_model("control")
    unpushed = texts[texts["dose"] == 0]
    assert unpushed["text"].tolist()[:2] == [base.decode(ids) for ids in read_trace(traced).base_texts[:2]]
    far = texts[texts["dose"] == 20].set_index(["fine_tune", "opening", "sample"])["text"]
    assert far["treatment"].tolist() != far["null-1"].tolist() != unpushed["text"].tolist()
    assert set(words["reason"]) == {
        "with 2 nulls no p that counts the search is below 1/3: it takes 19 to find something at 0.05"
    }
    assert words["p_search"].min() >= 1 / 3
    page = (DOCS / "files.md").read_text(encoding="utf-8")
    for name, table in (("difference_texts", texts), ("difference_words", words)):
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}.parquet`"))
        assert not [column for column in table if f"`{column}`" not in line]


def test_it_resumes_with_the_same_texts(traced: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = _pushed(traced)

    def stop(progress: Progress) -> None:
        if "pushed" in progress.what and progress.done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _pushed(traced, Log(show=stop))
    assert len(list(traced.path("partial", "push").glob("*.parquet"))) == 2
    prompts: list[Any] = []
    generate = written.generate
    monkeypatch.setattr(written, "generate", lambda *args, **keys: prompts.append(args[2]) or generate(*args, **keys))
    texts, _ = _pushed(traced)
    assert len(prompts) == 1
    pd.testing.assert_frame_equal(texts, whole)
    assert not list(traced.path("partial").glob("*/*"))


def test_without_nulls_there_is_a_reason(traced: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "LEAST_TEXTS", 1)  # random models hardly write a word twice
    run = RunFolder(traced.folder, Study.open(traced.study.source.with_name("plain.yaml")))
    texts, words = _pushed(run)
    assert texts["fine_tune"].unique().tolist() == ["", "treatment"]
    assert words["p_search"].isna().all()
    assert set(words["reason"]) == {"no null fine-tunes to compare with"}


def test_without_a_difference_nothing_is_pushed(traced: RunFolder) -> None:
    lines: list[str] = []
    found, path = read_trace(traced), trace_path(traced)
    content = path.read_bytes()
    try:
        replace(found, halves=np.zeros_like(found.halves)).save(path)
        assert not list(run_push(traced, Log(lines.append)))
        path.unlink()
        assert not list(run_push(traced, Log(lines.append)))
    finally:
        path.write_bytes(content)
    assert "the models are the same at the hook" in lines[0]
    assert "the arms' models differ in size" in lines[1]
    null = replace(found, name="null-1", halves=np.zeros_like(found.halves))
    with pytest.raises(Undefined, match="of null-1 is zero"):
        next(written.difference_steering(traced.study.open_model("control"), "blocks.1.hook_resid_pre", found, [null]))


def test_a_study_without_a_push_has_the_same_earlier_stages(traced: RunFolder) -> None:
    study = traced.study
    off = Study(study.config.model_copy(update={"push": None}), study.source)
    assert [key for key in stage_keys(study) if key != "push"] == list(stage_keys(off))
    plain = RunFolder(traced.folder, off)
    assert trace_inputs(plain) == trace_inputs(traced)
    assert changes_inputs(plain) == changes_inputs(traced)
