from __future__ import annotations

import pytest

from saeffect.config import SteeringConfig
from saeffect.study.stages.report import _placebo_words


@pytest.mark.parametrize(
    ("placebos", "text"),
    [
        (("random", "matched"), "matched placebo, random direction"),
        (("random",), "random direction"),
        ((), "nothing: no placebo"),
    ],
)
def test_the_primary_placebo_is_first(placebos: tuple[str, ...], text: str) -> None:
    config = SteeringConfig(prompts=["How are you?"], doses=[0.4], placebos=placebos)
    assert _placebo_words(config) == text
