from __future__ import annotations

import pytest

from saeffect.config import SteeringConfig
from saeffect.study.stages.report import _tested_against


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
