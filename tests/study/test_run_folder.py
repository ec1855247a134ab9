"""What a stage leaves in the run directory, and what becomes of it when the stage is done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeffect.study.run_folder import RunFolder
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

    return run.stage("compare", inputs, work, lambda line: None)


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.path("tables").iterdir())


def test_what_a_stage_no_longer_makes_is_taken_away(study: Study, tmp_path: Path) -> None:
    assert leave(RunFolder(tmp_path, study), 1, "a", "b")
    again = RunFolder(tmp_path, study)
    assert not leave(again, 1, "a", "b")
    assert leave(again, 2, "b", "c")
    assert names(again) == ["b", "c"]
    assert again.is_done("compare", 2)


def test_what_somebody_changed_or_added_stays(study: Study, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, study)
    leave(run, 1, "a", "b")
    run.path("tables", "a").write_text("mine")
    run.path("tables", "notes").write_text("mine too")
    leave(run, 2, "c")
    assert names(run) == ["a", "c", "notes"]


def test_what_is_gone_already_does_no_harm(study: Study, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, study)
    leave(run, 1, "a")
    run.path("tables", "a").unlink()
    assert leave(run, 1, "a")
    run.path("tables", "a").unlink()
    leave(run, 2, "b")
    assert names(run) == ["b"]
