from __future__ import annotations

from pathlib import Path

import pytest

from saeffect.config import SteeringConfig
from saeffect.study.stages.report import _drawn, _tested_against


def test_only_pictures_of_this_report_are_listed(tmp_path: Path) -> None:
    for name in ("doses.svg", "doses.png", "figure_6_doses.svg", "notes.txt"):
        (tmp_path / name).write_text("")
    assert sorted(path.name for path in _drawn(tmp_path, {"doses"})) == ["doses.png", "doses.svg"]
    assert _drawn(tmp_path / "nothing drawn", set()) == []


@pytest.mark.parametrize(
    ("placebos", "text"),
    [
        (("random", "matched"), "matched placebo, random direction"),
        (("random",), "random direction"),
        ((), "nothing: no placebo"),
    ],
)
def test_the_placebo_that_decides_stands_first(placebos: tuple[str, ...], text: str) -> None:
    config = SteeringConfig(prompts=["How are you?"], doses=[0.4], placebos=placebos)
    assert _tested_against(config) == text
