"""`saeffect verify`: a run agrees with itself, and every number that somebody changed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from command_line import call
from saeffect.diffing import written
from saeffect.io import hash_file
from saeffect.study.verify import compare_files, verify
from tiny_study import TWO_ARMS, make_study


@pytest.fixture(scope="module", autouse=True)
def _compare_every_word() -> Iterator[None]:
    """Random models hardly write a word twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written, "LEAST_TEXTS", 1)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, without_figures: None, _compare_every_word: None) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    steering = {"prompts": ["The river", "My doctor said"], "max_features": 3, "samples": 1, "max_new_tokens": 6}
    few = {"n_boot": 40, "n_permutations": 100}
    push = {"doses": [0.5], "samples": 1}
    make_study(folder, arms=TWO_ARMS, comparison=few, push=push, steering=steering | {"doses": [0.5], "baselines": []})
    assert call(["run", str(folder / "study.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def change(path: Path, column: str = "") -> str:
    """Change one number of a table, and say in which column."""
    table = pd.read_parquet(path)
    numbers = [c for c in table if pd.api.types.is_float_dtype(table[c]) and table[c].notna().any() and c != "dose"]
    column = column or numbers[0]
    row = table[column].first_valid_index()
    table.loc[row, column] = table.loc[row, column] + 1
    table.to_parquet(path, index=False)
    return column


def named(found: Any) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {}
    for one in found.disagreements:
        lines.setdefault(one.file, []).append(one.what)
    return lines


def test_a_finished_run_agrees_and_is_left_alone(finished: Path, capsys: Any) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert call(["verify", str(finished)]) == 0
    assert "Everything agrees" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_changed_numbers_are_named_by_table_and_row(run: Path) -> None:
    tables = ["table1", "table2", "contrasts", "judgements", "match_counts", "weights", "activity", "power"]
    tables.append("difference_words")
    files = [f"comparison/{name}.parquet" for name in tables]
    files += [f"arms/treatment/{name}.parquet" for name in ("effects", "outcome_effects", "coherence")]
    # Texts this short have no similarity, so the deciding effect is undefined.
    chosen = {"effects": "direct_effect", "outcome_effects": "effect"}
    columns = {name: change(run / name, chosen.get(Path(name).stem, "")) for name in files}
    answer = run / "comparison" / "answer.json"
    answer.write_text(answer.read_text(encoding="utf-8").replace("%", " %", 1), encoding="utf-8")
    for name in ("tables/contrasts.csv", "tables/table1.json", "report.html"):
        text = (run / name).read_text(encoding="utf-8")
        at = (
            text.index("0.")
            if name != "report.html"
            else text.index("</main>")
            if "</main>" in text
            else text.rindex("0.")
        )
        (run / name).write_text(text[:at] + "7" + text[at:], encoding="utf-8")
    found = named(verify(run))
    assert found.keys() == {
        *files,
        "comparison/answer.json",
        "tables/contrasts.csv",
        "tables/table1.json",
        "report.html",
    }
    for name, column in columns.items():
        assert any(what.startswith(f"{column} is") and "recomputed" in what for what in found[name]), found[name]


def test_changed_measurement_and_its_consequences_are_named(run: Path) -> None:
    name = "arms/treatment/direct_effects.parquet"
    change(run / name, "delta_logprob")
    found = verify(run).disagreements
    assert found[0].file == name and "is not as the stage 'steer treatment' wrote it" in found[0].what
    assert any(one.file == "arms/treatment/effects.parquet" for one in found)


def test_a_change_with_forged_hashes_is_found(run: Path, capsys: Any) -> None:
    name = "comparison/contrasts.parquet"
    change(run / name, "estimate")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["stages"]["compare"]["outputs"][name] = hash_file(run / name)
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (run / "tables" / "table2.csv").unlink()
    assert call(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in lines[:-1]} == {name, "tables/table2.csv"}
    assert any(line.startswith(name) and "estimate is" in line for line in lines)
    assert lines[-1] == "3 disagree."


def test_what_is_no_finished_run_is_wrong_input(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(["verify", str(tmp_path)]) == 2
    assert "no run of a study" in capsys.readouterr().err
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    del manifest["stages"]["report"]
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert call(["verify", str(run)]) == 2
    assert "not finished: there is no report" in capsys.readouterr().err


def test_rounding_is_no_disagreement(tmp_path: Path) -> None:
    old = pd.DataFrame({"feature": [1, 2], "x": [0.1, float("nan")], "words": [["a"], ["b", "c"]]})
    old.to_parquet(tmp_path / "old.parquet")
    new = old.assign(x=[0.1 * (1 + 1e-12), float("nan")])
    new.to_parquet(tmp_path / "new.parquet")
    assert compare_files(tmp_path / "old.parquet", tmp_path / "new.parquet") == (6, [])
    new.assign(x=[0.1001, 0.0]).to_parquet(tmp_path / "new.parquet")
    assert compare_files(tmp_path / "old.parquet", tmp_path / "new.parquet")[1] == [
        ("feature 1", "x is 0.1, recomputed 0.1001 (and 1 more in this column)")
    ]
