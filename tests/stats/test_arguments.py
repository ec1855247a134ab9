from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from saeffect.errors import ConfigError, ShapeMismatch, Undefined
from saeffect.stats.arguments import (
    Resampling,
    check_level,
    check_resamples,
    fault,
    generator,
    sample,
)


def test_sample_reads_lists_series_and_missing_values() -> None:
    assert sample([1, 2]).dtype == np.float64
    assert sample(pd.Series([1.0, 2.0])).tolist() == [1.0, 2.0]
    missing: Any
    for missing in ([1, None], pd.Series([1, None], dtype="Float64"), pd.Series([1, None])):
        assert np.isnan(sample(missing)[1])


def test_sample_refuses_other_shapes_and_words() -> None:
    with pytest.raises(ShapeMismatch, match=r"a must have 1 dimension\(s\), got shape \(1, 2\)"):
        sample([[1, 2]], "a")
    with pytest.raises(ShapeMismatch):
        sample(3.0)
    with pytest.raises(Undefined):
        sample(["yes", "no"])
    with pytest.raises(Undefined):
        sample([[1, 2], [3]])


def test_fault_counts_what_is_wrong() -> None:
    assert fault(np.array([np.nan, np.nan, 1.0]), "x") == "x: 2 of 3 values are NaN"
    assert fault(np.array([np.inf, -np.inf, 1.0]), "x") == "x: 2 of 3 values are infinite"


def test_generator_is_its_own_for_a_seed_and_moves_on_when_given() -> None:
    assert generator(3).random() == generator(3).random() != generator(4).random()
    given = np.random.default_rng(3)
    assert generator(given) is given
    assert generator(np.int64(3)).random() == generator(3).random()  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None, True])
def test_generator_refuses_what_is_no_seed(seed: object) -> None:
    with pytest.raises(ConfigError):
        generator(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.5, float("nan")])
def test_levels_are_shares(level: float) -> None:
    with pytest.raises(ConfigError, match="level"):
        check_level(level)


def test_resamples_must_reach_both_ends() -> None:
    check_resamples(40, 0.95)
    check_resamples(200, 0.99)
    for n_boot, level in ((39, 0.95), (199, 0.99), (0, 0.5), (100.0, 0.9)):
        with pytest.raises(ConfigError, match="n_boot"):
            check_resamples(n_boot, level)  # type: ignore[arg-type]


def test_each_name_has_its_own_stream() -> None:
    assert Resampling(seed=3).seed_for("a") != Resampling(seed=3).seed_for("b")
    assert Resampling(seed=3).seed_for("a") != Resampling(seed=4).seed_for("a")
    assert (
        Resampling(seed=3).seed_for("a", "b") == Resampling(seed=3).seed_for("a|b") != Resampling(seed=3).seed_for("a")
    )
