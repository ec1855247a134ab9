from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from saeffect.report.words.numbers import amount, amount_interval, fixed, is_defined, p_value, signed, undefined


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
