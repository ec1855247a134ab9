"""What `saeffect finetune` says about the nulls that it made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from saeffect.cli.finetune import _study_line
from saeffect.config_file import read_config_file
from saeffect.study.study import Study


@pytest.mark.parametrize("place", ["nulls", "runs/nulls", "elsewhere/nulls", "runs/a: b #c'\"é"])
def test_the_line_names_the_folder_from_the_study(tmp_path: Path, place: str) -> None:
    bundled = Study.open("bundled:smollm2-medical")
    study = Study(bundled.config, tmp_path / "runs" / "mine.yaml")
    folder = tmp_path / place
    folder.mkdir(parents=True)
    study.source.parent.mkdir(exist_ok=True)
    line = _study_line(folder, study)
    assert str(tmp_path) not in line
    study.source.write_text(line, encoding="utf-8")
    assert Path(read_config_file(study.source, "study")["nulls"]).resolve() == folder.resolve()


def test_a_bundled_study_is_in_no_folder_of_yours(tmp_path: Path) -> None:
    line = _study_line(tmp_path / "nulls", Study.open("bundled:smollm2-medical"))
    assert yaml.safe_load(line) == {"nulls": (tmp_path / "nulls").resolve().as_posix()}
