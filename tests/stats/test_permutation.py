from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats

from saeffect.errors import ConfigError, ShapeMismatch, UnknownName
from saeffect.stats.bootstrap import Average
from saeffect.stats.permutation import permutation_test, sign_flip_many

ALTERNATIVES = ["greater", "less", "two-sided"]
SUMMARIES: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}
RNG = np.random.default_rng(21)
PAIRS = RNG.normal(0.4, 1.0, size=10)
MANY_PAIRS = RNG.normal(0.3, 1.0, size=30)
A, B = RNG.normal(0, 1, size=6), RNG.normal(0.8, 1, size=6)
LONG_A, LONG_B = RNG.normal(0, 1, size=30), RNG.normal(0.5, 1, size=40)


def flipped(differences: Any, **options: Any) -> float:
    """p of one row."""
    return float(sign_flip_many([differences], **options)[0])


def test_sign_flips_by_hand() -> None:
    # Sums of +-1 +-2 +-3 with the observed sum 1 - 2 + 3 = 2: of 6, 4, 2, 0, 0, -2, -4, -6 three are >= 2.
    assert flipped([1.0, -2.0, 3.0]) == 3 / 8
    assert flipped([1.0, -2.0, 3.0], alternative="less") == 6 / 8
    assert flipped([1.0, -2.0, 3.0], alternative="two-sided") == 6 / 8


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_exact_sign_flips_agree_with_scipy(alternative: str) -> None:
    theirs = scipy.stats.permutation_test(
        (PAIRS,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        alternative=alternative,
    )
    assert flipped(PAIRS, alternative=alternative) == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_random_sign_flips_agree_with_scipy(alternative: str) -> None:
    theirs = scipy.stats.permutation_test(
        (MANY_PAIRS,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        alternative=alternative,
        rng=np.random.default_rng(0),
    )
    ours = flipped(MANY_PAIRS, alternative=alternative, n_permutations=20_000)
    assert ours == pytest.approx(theirs.pvalue, abs=6 * math.sqrt(max(theirs.pvalue, 1e-4) / 20_000))


def test_fourteen_pairs_are_enumerated_and_fifteen_are_not() -> None:
    assert flipped(np.ones(14), n_permutations=10) == 2**-14
    assert flipped(np.ones(15), n_permutations=10) == 1 / 11


def test_ties_of_the_arithmetic_count_as_ties() -> None:
    # 0.1 + 0.2 is not 0.3 for a computer: -(0.1) - 0.2 + 0.3 + x would miss its twin without a tolerance.
    differences = [0.1, 0.2, -0.3, 1.0]
    sums = [
        sum(s * d for s, d in zip(signs, (1, 2, 3, 10), strict=True)) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert flipped(differences) == sum(total >= 10 for total in sums) / 16


def test_a_random_p_is_never_zero() -> None:
    assert flipped(np.ones(40), n_permutations=99) == 1 / 100
    assert permutation_test(np.zeros(30), np.ones(30), n_permutations=99) == 1 / 100


@pytest.mark.parametrize("n_pairs", [5, 14, 15, 40])
@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_a_row_does_not_depend_on_the_others(n_pairs: int, alternative: str) -> None:
    table = np.random.default_rng(n_pairs).normal(0.2, 1, size=(7, n_pairs))
    p = sign_flip_many(table, alternative=alternative, n_permutations=500, seed=3)
    assert p.tolist() == [flipped(row, alternative=alternative, n_permutations=500, seed=3) for row in table]


def test_blocks_do_not_change_exact_p(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(1).normal(size=(9, 10))
    whole = sign_flip_many(table)
    monkeypatch.setattr("saeffect.stats.permutation._BLOCK", 1000)
    assert sign_flip_many(table).tolist() == whole.tolist()
    assert permutation_test(A, B) == permutation_test(A, B, seed=1)


def test_rows_with_nan_do_not_affect_others() -> None:
    table = np.random.default_rng(1).normal(size=(3, 20))
    clean = sign_flip_many(table)
    table[1, 4] = np.nan
    p = sign_flip_many(table)
    assert np.isnan(p[1])
    assert p[[0, 2]].tolist() == clean[[0, 2]].tolist()


def test_empty_tables() -> None:
    assert np.isnan(sign_flip_many(np.empty((2, 0)))).all()
    assert sign_flip_many(np.empty((0, 5))).shape == (0,)


@pytest.mark.simulation
@pytest.mark.parametrize("n_pairs", [12, 20])
def test_useless_features_pass_as_often_as_alpha_says(n_pairs: int) -> None:
    n_features = 4000
    # Separate seeds for half of the rows: the rows of one call share their sign patterns.
    heavy = np.random.default_rng(5).standard_t(3, size=(n_features, n_pairs))
    p = np.concatenate([sign_flip_many(half, seed=i) for i, half in enumerate(np.split(heavy, 2))])
    for alpha in (0.05, 0.2):
        assert np.mean(p <= alpha) == pytest.approx(alpha, abs=4 * math.sqrt(alpha * (1 - alpha) / n_features))


def test_useful_features_pass() -> None:
    p = sign_flip_many(np.random.default_rng(6).normal(1.0, 1.0, size=(200, 16)))
    assert np.mean(p <= 0.05) > 0.9


def test_sign_flips_of_degenerate_data() -> None:
    assert flipped([3.0]) == 0.5
    assert flipped([0.0, 0.0, 0.0]) == 1.0
    assert flipped([2.0, 2.0, 2.0]) == 1 / 8
    assert math.isnan(flipped([1.0, math.inf]))


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_exact_permutations_agree_with_scipy(statistic: Average) -> None:
    summary = SUMMARIES[statistic]
    theirs = scipy.stats.permutation_test(
        (B, A),
        lambda b, a, axis: summary(b, axis=axis) - summary(a, axis=axis),
        vectorized=True,
        n_resamples=np.inf,
    )
    assert permutation_test(A, B, statistic=statistic) == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_random_permutations_agree_with_scipy(statistic: Average) -> None:
    summary = SUMMARIES[statistic]
    theirs = scipy.stats.permutation_test(
        (LONG_B, LONG_A),
        lambda b, a, axis: summary(b, axis=axis) - summary(a, axis=axis),
        vectorized=True,
        n_resamples=5000,
        rng=np.random.default_rng(0),
    )
    ours = permutation_test(LONG_A, LONG_B, statistic=statistic, n_permutations=5000)
    assert ours == pytest.approx(theirs.pvalue, abs=6 * math.sqrt(theirs.pvalue / 5000))


def test_permutations_by_hand_with_unequal_groups() -> None:
    # Of the 4 ways to choose b's single value from 1, 2, 3, 10 one is as far from the others' mean as 10.
    assert permutation_test([1, 2, 3], [10]) == 1 / 4
    assert permutation_test([10, 9, 8], [1]) == 1 / 4
    assert permutation_test([1, 2], [3, 4]) == 2 / 6


@pytest.mark.simulation
def test_equal_groups_have_nominal_error_rate() -> None:
    rng = np.random.default_rng(8)
    n_studies = 500
    p = [
        permutation_test(rng.exponential(size=12), rng.exponential(size=20), n_permutations=199, seed=rng)
        for _ in range(n_studies)
    ]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / n_studies))


def test_permutations_of_degenerate_data() -> None:
    assert permutation_test([1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0
    assert permutation_test([0.1] * 30, [0.1] * 30) == 1.0
    assert permutation_test([1.0], [2.0]) == 1.0
    for a, b in (([], [1.0]), ([1.0], []), ([1.0, math.nan], [1.0]), ([1.0], [math.inf, 1.0])):
        assert math.isnan(permutation_test(a, b))


def test_equal_seeds_give_equal_p() -> None:
    assert flipped(MANY_PAIRS, seed=4) == flipped(MANY_PAIRS, seed=4)
    assert permutation_test(LONG_A, LONG_B, seed=4) == permutation_test(LONG_A, LONG_B, seed=4)
    assert permutation_test(LONG_A, LONG_B, seed=4) != permutation_test(LONG_A, LONG_B, seed=5)


def test_as_many_splits_as_asked_for_are_still_enumerated() -> None:
    splits = math.comb(12, 6)  # 924
    exact = permutation_test(A, B, n_permutations=splits)
    assert exact == permutation_test(A, B, n_permutations=splits, seed=9) == permutation_test(A, B)
    assert permutation_test(A, B, n_permutations=splits - 1) != exact


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UnknownName, match="'mode'"):
        permutation_test([1.0], [2.0], statistic="mode")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean 'greater'"):
        flipped([1.0], alternative="greter")
    for n_permutations in (0, -1, 10.0, True):
        with pytest.raises(ConfigError, match="n_permutations"):
            flipped([1.0], n_permutations=n_permutations)
        with pytest.raises(ConfigError, match="n_permutations"):
            permutation_test([1.0], [2.0], n_permutations=n_permutations)  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch):
        sign_flip_many([1.0, 2.0])
