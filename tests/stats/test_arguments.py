from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from saeffect.errors import ConfigError, ShapeMismatch, Undefined
from saeffect.stats.arguments import (
    Resampling,
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


def test_generator_from_seed_or_passed_through() -> None:
    assert generator(3).random() == generator(3).random() != generator(4).random()
    given = np.random.default_rng(3)
    assert generator(given) is given
    assert generator(np.int64(3)).random() == generator(3).random()  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None, True])
def test_generator_refuses_what_is_no_seed(seed: object) -> None:
    with pytest.raises(ConfigError):
        generator(seed)  # type: ignore[arg-type]


def test_resamples_must_reach_both_ends() -> None:
    check_resamples(40)
    check_resamples(np.int64(40))  # type: ignore[arg-type]
    for n_boot in (39, 0, 100.0):
        with pytest.raises(ConfigError, match="n_boot"):
            check_resamples(n_boot)  # type: ignore[arg-type]


def test_each_name_has_its_own_stream() -> None:
    assert Resampling(seed=3).seed_for("a") != Resampling(seed=3).seed_for("b")
    assert Resampling(seed=3).seed_for("a") != Resampling(seed=4).seed_for("a")
    assert (
        Resampling(seed=3).seed_for("a", "b") == Resampling(seed=3).seed_for("a|b") != Resampling(seed=3).seed_for("a")
    )


def test_every_refusal_in_full() -> None:
    refusals = [
        (Undefined, "x must be numbers in an array of 2 dimension(s): ", lambda: sample(["yes"], "x", ndim=2)),
        (ShapeMismatch, "values must have 2 dimension(s), got shape (1,).\n  at:  values", lambda: sample([1], ndim=2)),
        (
            ConfigError,
            "seed must be a non-negative integer or a numpy Generator, got -1.\n  at:  seed",
            lambda: generator(-1),
        ),
        (
            ConfigError,
            "n_boot must be an integer of at least 40 for a 95 % interval, got 39.\n  at:  n_boot\n  fix: 2000 is usual.",
            lambda: check_resamples(39),
        ),
        (
            ConfigError,
            "n_boot must be an integer of at least 40 for a 95 % interval, got True.",
            lambda: check_resamples(True),
        ),
    ]
    for kind, message, call in refusals:
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value).startswith(f"{kind.__name__}: {message}")
    with pytest.raises(Undefined) as caught:
        sample(["yes"], "x")
    assert str(caught.value).endswith(".\n  at:  x") and caught.value.__cause__ is not None


def test_seeds_and_resamples_at_their_limits() -> None:
    assert generator(0).random() == np.random.default_rng(0).random()
    assert sample([[1, 2]], ndim=2).shape == (1, 2)


def test_faults_and_seeds_by_hand() -> None:
    assert fault(np.array([np.nan, np.inf])) == "values: 1 of 2 values are NaN"
    assert fault(np.array([])) == "values: there are none" and fault(np.array([]), "y") == "y: there are none"
    defaults = Resampling()
    assert (defaults.seed, defaults.n_boot, defaults.n_permutations) == (0, 2_000, 10_000)
    import zlib

    expected = np.random.SeedSequence([3, zlib.crc32(b"a|b")]).generate_state(1)[0]
    assert Resampling(seed=3).seed_for("a", "b") == int(expected)
