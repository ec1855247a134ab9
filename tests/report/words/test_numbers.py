from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from saeffect.report.words.numbers import (
    amount,
    amount_interval,
    bracketed,
    difference,
    fixed,
    is_defined,
    p_value,
    signed,
    undefined,
)
from saeffect.stats.estimate import Estimate


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), np.float64("nan"), pd.NA, "0.5"])
def test_what_is_not_a_finite_number_is_undefined(value: object) -> None:
    assert not is_defined(value)


@pytest.mark.parametrize("value", [0, 0.0, np.int64(3), np.float32(0.5), True])
def test_numbers_are_defined(value: object) -> None:
    assert is_defined(value)


def test_zero_has_no_sign_however_it_came_about() -> None:
    assert [fixed(-0.0), fixed(-0.0004), signed(0.0004), signed(-0.0006)] == [
        "0.000",
        "0.000",
        "0.000",
        "−0.001",
    ]


def test_units() -> None:
    assert amount(0.1234, "share").replace("\u202f", " ") == "12.3 %"
    assert amount(0.05, "points", sign=True).replace("\u202f", " ") == "+5.0 pp"
    assert amount(19.72, "%", sign=True).replace("\u202f", " ") == "+19.7 %"
    assert amount(-0.00104, "points of tokens").replace("\u202f", " ") == "−0.104 pp"
    assert amount(24576, "count") == "24,576"
    assert amount(12.345) == "12.35"
    assert amount(123.4) == "123.4"


def test_interval_leaves_the_unit_to_the_value() -> None:
    assert amount_interval(0.05, 0.15, "points") == "[5.0, 15.0]"
    assert amount_interval(-0.05, 0.15) == "[−0.050, 0.150]"


def test_a_p_is_never_zero() -> None:
    assert p_value(0.0) == "< 0.001"


def test_undefined_always_says_why() -> None:
    assert undefined("") == "undefined: no reason was recorded"


NAN = float("nan")


@pytest.mark.parametrize(
    ("estimate", "unit", "text"),
    [
        (Estimate(0.0312, 0.0118, 0.0501), "share", "+3.1 percentage points, 95 % interval 1.2 to 5.0"),
        (
            Estimate(0.0031, 0.0012, 0.0050),
            "share",
            "+0.31 percentage points, 95 % interval 0.12 to 0.50",
        ),
        (Estimate(0.0, -0.01, 0.01), "share", "0.0 percentage points, 95 % interval \u22121.0 to 1.0"),
        (Estimate(0.02, NAN, NAN), "share", "+2.0 percentage points, without an interval"),
        (Estimate(0.1234, 0.05, 0.2), "coherence", "+0.123, 95 % interval 0.050 to 0.200"),
    ],
)
def test_difference(estimate, unit, text):
    assert difference(estimate, unit) == text.replace(" %", "\u202f%")


def test_number_never_shows_a_signed_zero():
    assert signed(-0.0001, 2) == "0.00"
    assert fixed(-1234.5, 1) == "\u22121,234.5"


def test_brackets_are_those_of_the_tables():
    assert bracketed(Estimate(-0.018, -0.047, 0.010), "coherence") == "\u22120.018 [\u22120.047, 0.010]"
    assert bracketed(Estimate(0.2, NAN, NAN), "share", full=True) == "+20.0 percentage points, without an interval"
