"""What a stage leaves in the run directory, and what becomes of it when the stage is done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from saeffect.errors import ConfigError
from saeffect.io import hash_file
from saeffect.progress import SILENT, Log
from saeffect.study.run import run_study
from saeffect.study.run_folder import KeptRows, RunFolder, drop_kept_rows
from saeffect.study.study import Study
from tiny_study import make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.open(make_study(tmp_path_factory.mktemp("study")))


def leave(run: RunFolder, inputs: int, *names: str) -> bool:
    """Do a stage that writes files of these names."""

    def work() -> list[Path]:
        paths = [run.path("tables", name) for name in names]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{inputs} {path.name}")
        return paths

    return run.stage("compare", inputs, work, SILENT)


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.path("tables").iterdir())


def test_outdated_outputs_are_removed(study: Study, tmp_path: Path) -> None:
    assert leave(RunFolder(tmp_path, study), 1, "a", "b")
    again = RunFolder(tmp_path, study)
    assert not leave(again, 1, "a", "b")
    assert leave(again, 2, "b", "c")
    assert names(again) == ["b", "c"]
    assert again.is_done("compare", 2)


def test_changed_or_added_files_stay(study: Study, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, study)
    leave(run, 1, "a", "b")
    run.path("tables", "a").write_text("mine")
    run.path("tables", "notes").write_text("mine too")
    leave(run, 2, "c")
    assert names(run) == ["a", "c", "notes"]


def test_optional_table_must_be_in_the_manifest(study: Study, tmp_path: Path) -> None:
    run, table = RunFolder(tmp_path, study), pd.DataFrame({"a": [1]})
    path = run.path("comparison", "fates_null.parquet")
    run.stage("match", 1, lambda: [run.write_table(path, table)], SILENT)
    pd.testing.assert_frame_equal(run.table_or_none(path), table)
    run.write_table(path, table.assign(a=2))  # somebody changed it, so it stays when the stage makes none
    run.stage("match", 2, lambda: [], SILENT)
    assert path.exists()
    assert RunFolder(tmp_path, study).table_or_none(path) is None


def test_missing_output_does_no_harm(study: Study, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, study)
    leave(run, 1, "a")
    run.path("tables", "a").unlink()
    assert leave(run, 1, "a")
    run.path("tables", "a").unlink()
    leave(run, 2, "b")
    assert names(run) == ["b"]


def noted(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    "content",
    [b"", b'{"stages": {', b"[]", b'{"stages": [], "study": "tiny"}', b'{"stages": {}}', b"\xff", b"[" * 100_000],
    ids=lambda content: content[:8].decode("latin-1"),
)
def test_damaged_manifest_counts_as_none(study: Study, tmp_path: Path, content: bytes) -> None:
    leave(RunFolder(tmp_path, study), 1, "a")
    (tmp_path / "manifest.json").write_bytes(content)
    run = RunFolder(tmp_path, study)
    run.refuse_foreign()
    assert "manifest.json is damaged" in run.damage[0]
    assert leave(run, 1, "a")
    assert not RunFolder(tmp_path, study).damage
    assert RunFolder(tmp_path, study).is_done("compare", 1)


@pytest.mark.parametrize(
    "note", [3, {}, {"fingerprint": 1}, {"outputs": []}, {"outputs": {"tables/a": 1}}, {"versions": [1]}]
)
def test_damaged_note_redoes_its_stage(study: Study, tmp_path: Path, note: Any) -> None:
    run = RunFolder(tmp_path, study)
    leave(run, 1, "a")
    run.stage("select", 1, lambda: [], lambda line: None)
    manifest = noted(tmp_path)
    stages = manifest["stages"]
    stages["compare"] = stages["compare"] | note if isinstance(note, dict) and note else note
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    again = RunFolder(tmp_path, study)
    assert [("compare" in line) for line in again.damage] == [True]
    assert again.is_done("select", 1)
    assert leave(again, 1, "a")


def test_a_hostile_manifest_deletes_nothing_outside(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    leave(RunFolder(folder, study), 1, "a", "b")
    (tmp_path / "elsewhere").mkdir()
    others = [tmp_path / "mine", tmp_path / "elsewhere" / "mine", folder / "notes.txt"]
    for other in others:
        other.write_text("precious")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "tables" / "link").symlink_to(tmp_path / "mine")
    names = ["../mine", str(tmp_path / "mine"), "link/mine", "tables/link", "tables/../../mine"]
    names += ["\0", "x" * 5_000, "\ud800", "tables", "", ".", "notes.txt"]
    manifest = noted(folder)
    manifest["stages"]["compare"]["outputs"] |= dict.fromkeys(names, hash_file(tmp_path / "mine"))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run = RunFolder(folder, study)
    assert not run.is_done("compare", 1), "a file outside is none of the run's"
    leave(run, 2, "b")
    assert [other.read_text() for other in others] == ["precious"] * 3
    assert (folder / "tables" / "link").is_symlink()
    assert not (folder / "tables" / "a").exists(), "what is the run's own goes"


@pytest.mark.parametrize("place", ["tables", "arms", "arms/control", "partial", "partial/steer-control"])
def test_a_linked_folder_is_refused(study: Study, tmp_path: Path, place: str) -> None:
    run = RunFolder(tmp_path / "run", study)
    leave(run, 1)
    (tmp_path / "elsewhere").mkdir()
    run.path(place).parent.mkdir(parents=True, exist_ok=True)
    run.path(place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link") as refused:
        run.refuse_foreign()
    assert refused.value.at == str(run.path(place))


def test_linked_run_directory_is_allowed(study: Study, tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "big-disk")
    run = RunFolder(tmp_path / "run", study)
    run.refuse_foreign()
    leave(run, 1, "a", "b")
    leave(run, 2, "a")
    assert names(run) == ["a"]
    assert run.is_done("compare", 2)


@pytest.mark.parametrize("name", ["study.yaml", "report.html", "manifest.json", "tables", "figures", "comparison"])
def test_foreign_files_are_not_overwritten(study: Study, tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.write_text('{"name": "my site"}') if "." in name else mine.mkdir()
    with pytest.raises(ConfigError, match="not as a run of a study left it") as refused:
        run_study(study, tmp_path)
    assert refused.value.at == str(mine)
    assert "--out" in (refused.value.fix or "")
    assert list(tmp_path.iterdir()) == [mine], "refused before anything is computed"


def test_foreign_tables_of_an_arm_are_not_overwritten(study: Study, tmp_path: Path) -> None:
    mine = tmp_path / "arms" / "control" / "features.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="not as a run of a study left it"):
        run_study(study, tmp_path)
    assert mine.read_text() == "mine"


def test_changed_study_file_is_not_overwritten(study: Study, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, study)
    leave(run, 1, "a")
    written = run.path("study.yaml").read_text()
    run.refuse_foreign()
    # With other settings or with a damaged manifest it is still the run's own.
    other = Study(study.config.model_copy(update={"seed": 8}), study.source)
    run.path("manifest.json").write_text("")
    RunFolder(tmp_path, other).refuse_foreign()
    run.path("study.yaml").write_text("# my comments\n" + written)
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        run.refuse_foreign()


def test_leftovers_go_and_hidden_files_stay(study: Study, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, study)
    leave(run, 1, "a")
    left = [tmp_path / ".saeffect-writing-manifest.abcd_123.json", tmp_path / "tables/.saeffect-writing-t.abcd_123.csv"]
    mine = [tmp_path / ".notes.abcd_123.json", tmp_path / "tables" / ".a.12345678.csv"]
    for path in left + mine:
        path.write_text("x")
    run.remove_leftovers()
    assert [path.exists() for path in left + mine] == [False, False, True, True]


def test_kept_rows_go_when_the_stage_ends(study: Study, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, study)
    for inputs in (1, 2):
        run.kept("compare", inputs).add(pd.DataFrame({"x": [inputs]}))
    run.kept("steer gone", 1).add(pd.DataFrame({"x": [3]}))
    found = run.kept("compare", 2).read()
    assert found is not None
    assert found["x"].tolist() == [2]
    assert run.kept("compare", 3).read() is None
    leave(run, 2, "a")
    assert [p.name for p in run.path("partial").iterdir()] == ["steer-gone"]
    run.drop_kept()
    assert not run.path("partial").exists()


def test_damaged_pieces_are_ignored_foreign_files_stay(tmp_path: Path) -> None:
    kept = KeptRows(tmp_path / "pieces", "f" * 64)
    for number in range(3):
        kept.add(pd.DataFrame({"x": [number]}))
    files = sorted((tmp_path / "pieces").iterdir())
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-9])
    said: list[str] = []
    found = kept.read(Log(said.append))
    assert found is not None
    assert len(found) == 1
    assert len(said) == 2
    (tmp_path / "pieces" / "mine.parquet").write_bytes(b"mine")
    drop_kept_rows(tmp_path / "pieces")
    assert [p.name for p in (tmp_path / "pieces").iterdir()] == ["mine.parquet"]
    (tmp_path / "link").symlink_to(tmp_path / "pieces")
    kept.add(pd.DataFrame({"x": [1]}))
    drop_kept_rows(tmp_path / "link")
    assert len(list((tmp_path / "pieces").iterdir())) == 2
