from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil

import pytest

import saeffect.stats as stats
from saeffect.stats.estimate import Estimate, undefined


def test_every_public_function_explains_itself() -> None:
    found = [
        importlib.import_module(f"saeffect.stats.{module.name}") for module in pkgutil.iter_modules(stats.__path__)
    ]
    public = {name: getattr(module, name) for module in found for name in module.__all__}
    for name, what in public.items():
        if inspect.isfunction(what) and what.__module__ != "saeffect.stats.arguments":
            assert "Example:" in (what.__doc__ or "") or name in ("check_average", "expanded_quantiles"), name


def test_estimates_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Estimate(1.0, 0.0, 2.0, 3).value = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("low", "high", "sign"),
    [
        (0.1, 0.2, 1),
        (-0.2, -0.1, -1),
        (-0.1, 0.1, 0),
        (0.0, 0.1, 0),
        (-0.1, 0.0, 0),
        (math.nan, 0.1, 0),
        (0.1, math.inf, 0),
    ],
)
def test_sign_needs_an_interval_on_one_side_of_zero(low: float, high: float, sign: int) -> None:
    estimate = Estimate(0.15, low, high)
    assert estimate.sign == sign
    assert estimate.defined == (math.isfinite(low) and math.isfinite(high))


def test_defaults_say_that_nothing_is_known() -> None:
    estimate = Estimate(1.0, 0.0, 2.0)
    assert (estimate.n, estimate.reason) == (0, "")
    assert math.isnan(estimate.p)


def test_text_carries_the_reason() -> None:
    assert str(undefined("one value", 1, 1.0)) == "1 [nan, nan] (n = 1; one value)"
    assert str(Estimate(1.0, 0.5, 1.5, 3)) == "1 [0.5, 1.5] (n = 3)"
    assert math.isnan(undefined("none").value)
