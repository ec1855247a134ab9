from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats

from saeffect.errors import ConfigError, ShapeMismatch, UnknownName
from saeffect.stats import permutation_test, sign_flip_many, sign_flip_test

ALTERNATIVES = ["greater", "less", "two-sided"]
SUMMARIES: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}
RNG = np.random.default_rng(21)
PAIRS = RNG.normal(0.4, 1.0, size=10)
MANY_PAIRS = RNG.normal(0.3, 1.0, size=30)
A, B = RNG.normal(0, 1, size=6), RNG.normal(0.8, 1, size=6)
LONG_A, LONG_B = RNG.normal(0, 1, size=30), RNG.normal(0.5, 1, size=40)


def test_sign_flips_by_hand() -> None:
    # Sums of +-1 +-2 +-3 with the observed sum 1 - 2 + 3 = 2: of 6, 4, 2, 0, 0, -2, -4, -6 three are >= 2.
    result = sign_flip_test([1.0, -2.0, 3.0])
    assert result.p == 3 / 8
    assert result.statistic == pytest.approx(2 / 3)
    assert (result.n, result.method, result.reason) == (3, "exact sign-flip test, greater", "")
    assert sign_flip_test([1.0, -2.0, 3.0], alternative="less").p == 6 / 8
    assert sign_flip_test([1.0, -2.0, 3.0], alternative="two-sided").p == 6 / 8


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
    assert sign_flip_test(PAIRS, alternative=alternative).p == pytest.approx(theirs.pvalue)


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
    ours = sign_flip_test(MANY_PAIRS, alternative=alternative, n_permutations=20_000)
    assert ours.p == pytest.approx(theirs.pvalue, abs=6 * math.sqrt(max(theirs.pvalue, 1e-4) / 20_000))
    assert ours.method == f"sign-flip test, 20000 random patterns, {alternative}"


def test_fourteen_pairs_are_enumerated_and_fifteen_are_not() -> None:
    assert sign_flip_test(np.ones(14), n_permutations=10).p == 2**-14
    assert sign_flip_test(np.ones(14)).method == "exact sign-flip test, greater"
    assert sign_flip_test(np.ones(15), n_permutations=10).method == "sign-flip test, 10 random patterns, greater"


def test_ties_of_the_arithmetic_count_as_ties() -> None:
    # 0.1 + 0.2 is not 0.3 for a computer: -(0.1) - 0.2 + 0.3 + x would miss its twin without a tolerance.
    differences = [0.1, 0.2, -0.3, 1.0]
    sums = [
        sum(s * d for s, d in zip(signs, (1, 2, 3, 10), strict=True)) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert sign_flip_test(differences).p == sum(total >= 10 for total in sums) / 16


def test_a_random_p_is_never_zero() -> None:
    assert sign_flip_test(np.ones(40), n_permutations=99).p == 1 / 100
    assert permutation_test(np.zeros(30), np.ones(30), n_permutations=99).p == 1 / 100


def test_rows_give_what_single_tests_give() -> None:
    for n_pairs in (5, 14, 15, 40):
        table = np.random.default_rng(n_pairs).normal(0.2, 1, size=(7, n_pairs))
        for alternative in ALTERNATIVES:
            p = sign_flip_many(table, alternative=alternative, n_permutations=500, seed=3)
            single = [sign_flip_test(row, alternative=alternative, n_permutations=500, seed=3).p for row in table]
            assert p.tolist() == single


def test_blocks_do_not_change_exact_p(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(1).normal(size=(9, 10))
    whole = sign_flip_many(table)
    monkeypatch.setattr("saeffect.stats.permutation._BLOCK", 1000)
    assert sign_flip_many(table).tolist() == whole.tolist()
    assert permutation_test(A, B).p == permutation_test(A, B, seed=1).p


def test_rows_that_hold_nan_are_nan_and_disturb_no_other() -> None:
    table = np.random.default_rng(1).normal(size=(3, 20))
    clean = sign_flip_many(table)
    table[1, 4] = np.nan
    p = sign_flip_many(table)
    assert np.isnan(p[1])
    assert p[[0, 2]].tolist() == clean[[0, 2]].tolist()


def test_empty_tables() -> None:
    assert np.isnan(sign_flip_many(np.empty((2, 0)))).all()
    assert sign_flip_many(np.empty((0, 5))).shape == (0,)


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
    assert sign_flip_test([]).reason == "differences: there are none"
    assert math.isnan(sign_flip_test([]).p)
    assert sign_flip_test([3.0]).p == 0.5
    assert sign_flip_test([0.0, 0.0, 0.0]).p == 1.0
    assert sign_flip_test([2.0, 2.0, 2.0]).p == 1 / 8
    assert sign_flip_test([1.0, math.nan]).reason == "differences: 1 of 2 values are NaN"


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_exact_permutations_agree_with_scipy(statistic: str, alternative: str) -> None:
    summary = SUMMARIES[statistic]
    theirs = scipy.stats.permutation_test(
        (B, A),
        lambda b, a, axis: summary(b, axis=axis) - summary(a, axis=axis),
        vectorized=True,
        n_resamples=np.inf,
        alternative=alternative,
    )
    ours = permutation_test(A, B, statistic=statistic, alternative=alternative)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert ours.statistic == pytest.approx(theirs.statistic)
    assert ours.method == f"exact permutation test, {statistic}, {alternative}"


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_random_permutations_agree_with_scipy(statistic: str) -> None:
    summary = SUMMARIES[statistic]
    theirs = scipy.stats.permutation_test(
        (LONG_B, LONG_A),
        lambda b, a, axis: summary(b, axis=axis) - summary(a, axis=axis),
        vectorized=True,
        n_resamples=5000,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    ours = permutation_test(LONG_A, LONG_B, statistic=statistic, alternative="greater", n_permutations=5000)
    assert ours.p == pytest.approx(theirs.pvalue, abs=6 * math.sqrt(theirs.pvalue / 5000))
    assert ours.n == 70


def test_permutations_by_hand_with_unequal_groups() -> None:
    # Of the 4 ways to choose b's single value from 1, 2, 3, 10 one is as high as 10, and none as low as -8.
    assert permutation_test([1, 2, 3], [10], alternative="greater").p == 1 / 4
    assert permutation_test([1, 2, 3], [10], alternative="less").p == 1.0
    assert permutation_test([1, 2, 3], [10]).p == 1 / 4
    assert permutation_test([1, 2, 3], [10]).statistic == 8.0


def test_equal_groups_are_told_apart_as_often_as_alpha_says() -> None:
    rng = np.random.default_rng(8)
    n_studies = 500
    p = [
        permutation_test(rng.exponential(size=12), rng.exponential(size=20), n_permutations=199, seed=rng).p
        for _ in range(n_studies)
    ]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / n_studies))


def test_permutations_of_degenerate_data() -> None:
    assert permutation_test([1.0, 1.0], [1.0, 1.0, 1.0]).p == 1.0
    assert permutation_test([0.1] * 30, [0.1] * 30).p == 1.0
    assert permutation_test([], [1.0]).reason == "a: there are none"
    assert permutation_test([1.0], []).reason == "b: there are none"
    assert math.isnan(permutation_test([1.0, math.nan], [1.0]).p)
    assert permutation_test([1.0, math.nan], [1.0]).reason == "a: 1 of 2 values are NaN"
    assert permutation_test([1.0], [2.0]).p == 1.0


def test_equal_seeds_give_equal_p() -> None:
    assert sign_flip_test(MANY_PAIRS, seed=4) == sign_flip_test(MANY_PAIRS, seed=4)
    assert permutation_test(LONG_A, LONG_B, seed=4) == permutation_test(LONG_A, LONG_B, seed=4)
    assert permutation_test(LONG_A, LONG_B, seed=4).p != permutation_test(LONG_A, LONG_B, seed=5).p


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UnknownName, match="'mode'"):
        permutation_test([1.0], [2.0], statistic="mode")
    with pytest.raises(UnknownName):
        sign_flip_test([1.0], alternative="bigger")
    for n_permutations in (0, -1, 10.0, True):
        with pytest.raises(ConfigError, match="n_permutations"):
            sign_flip_test([1.0], n_permutations=n_permutations)  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch):
        sign_flip_many([1.0, 2.0])
    with pytest.raises(ShapeMismatch):
        sign_flip_test([[1.0, 2.0]])


def test_three_hundred_features_are_quick() -> None:
    table = np.random.default_rng(0).normal(size=(300, 16))
    start = time.process_time()
    sign_flip_many(table)
    sign_flip_many(table[:, :14])
    assert time.process_time() - start < 1.0
