from __future__ import annotations

import pytest

from saeffect.comparison.judgement import Gap
from saeffect.report.words.numbers import bracketed, difference, fixed, signed

NAN = float("nan")


@pytest.mark.parametrize(
    ("gap", "text"),
    [
        (Gap("a", "b", 0.0312, 0.0118, 0.0501, "share"), "+3.1 percentage points, 95 % interval 1.2 to 5.0"),
        (
            Gap("a", "b", 0.0031, 0.0012, 0.0050, "share"),
            "+0.31 percentage points, 95 % interval 0.12 to 0.50",
        ),
        (Gap("a", "b", 0.0, -0.01, 0.01, "share"), "0.0 percentage points, 95 % interval \u22121.0 to 1.0"),
        (Gap("a", "b", 0.02, NAN, NAN, "share", "why"), "+2.0 percentage points, without an interval"),
        (Gap("a", "b", 0.1234, 0.05, 0.2, "coherence"), "+0.123, 95 % interval 0.050 to 0.200"),
    ],
)
def test_difference(gap, text):
    assert difference(gap) == text.replace(" %", "\u202f%")


def test_number_never_shows_a_signed_zero():
    assert signed(-0.0001, 2) == "0.00"
    assert fixed(-1234.5, 1) == "\u22121,234.5"


def test_brackets_are_those_of_the_tables():
    gap = Gap("a", "b", -0.018, -0.047, 0.010, "coherence")
    assert bracketed(gap) == "\u22120.018 [\u22120.047, 0.010]"
    assert bracketed(Gap("a", "b", 0.2, NAN, NAN, "share"), full=True) == "+20.0 percentage points, without an interval"
