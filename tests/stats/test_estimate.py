from __future__ import annotations

import dataclasses
import math

import pytest

import saeffect.stats as stats
from saeffect.stats import Estimate, TestResult


def test_the_package_exports_what_it_says_in_order() -> None:
    assert stats.__all__ == sorted(stats.__all__)
    assert all(hasattr(stats, name) for name in stats.__all__)


def test_every_public_function_explains_itself() -> None:
    for name in stats.__all__:
        document = getattr(stats, name).__doc__
        assert document and "Example:" in document, name


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Estimate(1.0, 0.0, 2.0, 3).value = 2.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        TestResult(1.0, 0.5, 3, "m").p = 0.0  # type: ignore[misc]


def test_a_result_without_a_reason_is_defined() -> None:
    assert Estimate(1.0, 0.0, 2.0, 3).reason == ""
    assert TestResult(1.0, 0.5, 3, "m").reason == ""


def test_text_carries_the_reason() -> None:
    assert "(n = 1; one value)" in str(Estimate(1.0, math.nan, math.nan, 1, "one value"))
    assert str(TestResult(1.0, 0.25, 3, "coin")) == "1, p = 0.25 (n = 3, coin)"
