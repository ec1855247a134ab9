"""The stage that puts changed features back, on a tiny study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from saeffect.config import StudyConfig
from saeffect.diffing import put_back as method
from saeffect.diffing.put_back_shares import COLUMNS
from saeffect.diffing.trace import OPENINGS
from saeffect.errors import ConfigError
from saeffect.progress import SILENT, Log, Progress
from saeffect.study.run import _method
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.put_back import _named, put_back_inputs, put_back_rows, run_put_back
from saeffect.study.study import Study
from tiny_study import make_study

SMALL = {"rows": 4, "tokens_per_row": 16, "sizes": [1, 5], "sizes_reversed": [5]}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("put-back"), put_back=SMALL)


def _changed(path: Path, **keys: Any) -> Study:
    config = yaml.safe_load(path.read_text()) | keys
    new = path.with_name("other.yaml")
    new.write_text(yaml.safe_dump(config), encoding="utf-8")
    return Study.open(new)


def _run(study: Study, out: Path) -> tuple[RunFolder, pd.DataFrame]:
    run = RunFolder(out, study)
    run.stage("put back", put_back_inputs(run), lambda: run_put_back(run, SILENT), SILENT)
    return run, run.read_table(run.path("comparison", "put_back.parquet"))


def test_the_table(path: Path, tmp_path: Path) -> None:
    run, table = _run(Study.open(path), tmp_path)
    assert tuple(table.columns) == (*COLUMNS, "chosen_on")
    assert set(table["chosen_on"]) == {"the other half of the rows"}
    rows = table.groupby("source")["n_rows"].first()
    assert rows.to_dict() == {"domain": 4, "general": 4, "own writing": 24}
    whole = table[(table["features"] == "model") & (table["source"] == "own writing")].set_index("edited")["effect"]
    assert whole["tuned"] > 0 > whole["base"]  # each model is the worse one at what the other writes
    assert set(table["n_tokens"]) == {60, 360}
    own = table[(table["features"] == "changed") & (table["kind"] == "own")]
    by_model = {edited: sorted(set(rows["n_features"])) for edited, rows in own.groupby("edited")}
    assert by_model == {"tuned": [1, 5, 96], "base": [5, 96]}
    assert not list(run.path("partial").glob("*/*"))


def test_it_resumes_with_the_same_numbers(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "_LOGITS", 1)  # a row of text a batch
    monkeypatch.setattr("saeffect.study.stages.put_back.OPENINGS", OPENINGS[:4])
    study = Study.open(path)
    _, whole = _run(study, tmp_path / "whole")
    run = RunFolder(tmp_path / "stopped", study)

    def stop(progress: Progress) -> None:
        if "put back" in progress.what and progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("put back", put_back_inputs(run), lambda: run_put_back(run, Log(show=stop)), SILENT)
    assert len(list(run.path("partial", "put-back").glob("*.parquet"))) == 5
    measured: list[Any] = []
    monkeypatch.setattr(method, "_measure_batch", _counting(method._measure_batch, measured))
    run, table = _run(study, tmp_path / "stopped")
    assert len(measured) == 7 + 12  # of the tuned model's 12 rows, 5 were done
    pd.testing.assert_frame_equal(table, whole)


def _counting(function: Any, calls: list[Any]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return counted


def _changes(run: RunFolder, names: dict[str, list[int]]) -> None:
    feature = np.arange(96)
    table = pd.DataFrame({"feature": feature, "basis": "read", "base": 1.0, "tuned": 1.0 + feature / 96})
    groups = pd.DataFrame({"name": list(names), "features": list(names.values()), "claimed": [True, True, False]})
    written = {"changes": table.assign(change=table["tuned"] - table["base"]), "change_groups": groups}
    paths = [run.path("comparison", f"{name}.parquet") for name in written]
    run.stage(
        "changes",
        {},
        lambda: [run.write_table(*pair) for pair in zip(paths, written.values(), strict=True)],
        SILENT,
    )


def test_features_and_groups_of_the_study_are_measured_on_later_rows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.open(path)
    rows, fresh = put_back_rows(study, 8)
    assert fresh and np.array_equal(rows.ids, study.rows().ids[8:16, :16])
    rows, fresh = put_back_rows(study, 32)  # behind the study's own text
    known = {row.tobytes() for row in study.rows().ids[:, :16]}
    assert fresh and len(rows) == 8 and not any(row.tobytes() in known for row in rows.ids)
    rows, fresh = put_back_rows(study, 10_000)  # there is no such text
    assert not fresh and np.array_equal(rows.ids, study.rows().ids[:8, :16])
    monkeypatch.setattr("saeffect.study.stages.put_back._n_changes_rows", lambda _: 8)
    chosen = []
    monkeypatch.setattr(
        "saeffect.study.stages.put_back.sets_of_changed",
        lambda *args, **keys: (chosen.append(keys["order"]), method.sets_of_changed(*args, **keys))[1],
    )
    run = RunFolder(tmp_path, study)
    before = put_back_inputs(run)
    _changes(run, {"fever, cough": [3, 4], "river": [7, 8, 9], "no": [1]})
    assert put_back_inputs(run) != before
    _, table = _run(study, tmp_path)
    assert chosen == [list(range(95, -1, -1))]
    assert set(table["chosen_on"]) == {"other text"}
    sizes = table[table["kind"] == "own"].groupby("features")["n_features"].first()
    assert sizes[["fever, cough", "river", "all named groups"]].tolist() == [2, 3, 5]
    assert "no" not in sizes.index


@pytest.mark.parametrize(("n", "names"), [(0, []), (1, ["fever, cough"]), (3, ["fever, cough", "river"])])
def test_as_many_named_groups_as_asked_for(path: Path, tmp_path: Path, n: int, names: list[str]) -> None:
    run = RunFolder(tmp_path, _changed(path, put_back=SMALL | {"groups": n}))
    _changes(run, {"fever, cough": [3, 4], "river": [7, 8, 9], "no": [1]})
    assert list(_named(run)) == [*names, "all named groups"]


def test_what_cannot_be_put_back(path: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    study = _changed(path, text=yaml.safe_load(path.read_text())["text"] | {"tokens": 256, "context_size": 256})
    study.rows()
    short = _changed(path, text=yaml.safe_load(path.read_text())["text"] | {"tokens": 256, "context_size": 128})
    assert len(study.rows()) == 1 and len(short.rows()) == 2
    assert list(run_put_back(RunFolder(tmp_path / "one", study), Log(lines.append))) == []
    assert lines == ["  one row of text cannot both choose features and measure what they cause"]
    _, table = _run(short, tmp_path / "two")
    of_text = table[table["source"] != "own writing"]
    assert of_text["share"].isna().all()
    assert set(of_text["reason"]) <= {"one unit shows no spread"}


def test_the_keys() -> None:
    arms = {role: {"role": role, "model": "m", "sae": role} for role in ("control", "treatment")}
    smallest = {"name": "x", "arms": arms, "text": {"bundled": "smollm2-sampled"}}
    assert StudyConfig.read(smallest, at="x").put_back is not None
    off = StudyConfig.read(smallest | {"put_back": None}, at="x")
    assert off.put_back is None
    for wrong, message in (({"sizes": [0, 2]}, "at least one feature"), ({"sizes": [2, 2]}, "there twice")):
        with pytest.raises(ConfigError, match=message):
            StudyConfig.read(smallest | {"put_back": wrong}, at="x")


def test_it_is_a_step_only_where_it_is_asked_for(path: Path) -> None:
    steps = [step.key for step in _method(Study.open(path))]
    assert steps.index("put back") > steps.index("match")
    assert "put back" not in [step.key for step in _method(_changed(path, put_back=None))]


def test_the_call_for_a_notebook(path: Path) -> None:
    from saeffect.lm.activations import TokenRows
    from saeffect.study.notebook import put_back

    study = Study.open(path)
    text = study.rows().head(8)
    rows = TokenRows(np.ascontiguousarray(text.ids[:, :16]), text.sources, text.names)
    table = put_back(study.arms["control"], study.arms["treatment"], rows, sizes=(5,))
    assert tuple(table.columns) == COLUMNS
    own = table[(table["features"] == "changed") & (table["kind"] == "own")]
    assert sorted(set(own["n_features"])) == [5, 96]
    assert set(own["edited"]) == {"tuned", "base"}
