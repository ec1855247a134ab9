"""Times in words."""

from __future__ import annotations

import pytest

from saeffect.progress import duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (0.04, "0 s"), (0.24, "0.2 s"), (45.4, "45 s"), (59.7, "1 min"), (60, "1 min"), (3599, "1 h"), (3661, "1 h 1 min"),
        (12_000, "3 h 20 min"), (47 * 3600, "47 h"), (172_800, "2 d"), (300_000, "3 d 11 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
