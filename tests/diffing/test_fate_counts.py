"""Excess counts: by hand, degenerate, and how often their intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from saeffect.diffing.fate_counts import ONE_PLACEBO, excess_paired, excess_unpaired
from saeffect.stats.arguments import Resampling


def test_values_by_hand() -> None:
    own = np.array([True, True, False, False])
    placebos = np.array([[True, False, False, False], [False, False, False, False]])
    found = excess_paired(own, placebos, Resampling(), "gone")
    assert found.value == 2 - 0.5
    assert found.low < 1.5 < found.high
    apart = excess_unpaired(own, [placebos[0], np.array([True, False])], Resampling(), "new")
    assert apart.value == 2 - 4 * (0.25 + 0.5) / 2


def test_pairing_takes_out_what_both_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.random(2000) < 0.5
    own = shared ^ (rng.random(2000) < 0.01)
    paired = excess_paired(own, shared[None], Resampling(), "x")
    apart = excess_unpaired(own, [shared], Resampling(), "x")
    assert paired.high - paired.low < 0.3 * (apart.high - apart.low)


def test_no_spread_and_too_few() -> None:
    same = excess_paired(np.ones(5, bool), np.ones((2, 5), bool), Resampling(), "x")
    assert same.value == 0
    assert np.isnan([same.low, same.high]).all()
    assert "no spread" in same.reason
    assert "too few" in excess_paired(np.ones(1, bool), np.zeros((1, 1), bool), Resampling(), "x").reason
    assert "too few" in excess_unpaired(np.empty(0, bool), [np.ones(5, bool)], Resampling(), "x").reason
    assert "no spread" in excess_unpaired(np.ones(5, bool), [np.zeros(5, bool)], Resampling(), "x").reason


@pytest.mark.parametrize(("n_placebos", "seed_noise"), [(1, 0.0), (2, 0.0), (2, 0.3), (3, 0.0), (4, 0.3)])
def test_intervals_hold_the_truth(n_placebos: int, seed_noise: float) -> None:
    """Features of unlike odds; with several placebos also whole SAEs that are better or worse."""
    hits, n, extra = 0, 500, 0.05
    for seed in range(300):
        rng = np.random.default_rng([seed, n_placebos])
        odds = rng.normal(-1, 1.5, n)
        chance = 1 / (1 + np.exp(-(odds + rng.normal(0, seed_noise, (n_placebos + 1, 1)))))
        absent = rng.random(chance.shape) < chance
        lost = rng.random(n) < extra
        absent[0] |= lost
        # What is expected beyond the placebos, over features and seeds: features lost that seeds would find.
        truth = extra * n * np.mean(1 - 1 / (1 + np.exp(-np.random.default_rng(0).normal(-1, 1.5, 10**5))))
        found = excess_paired(absent[0], absent[1:], Resampling(seed, 400), "gone")
        hits += found.low <= truth <= found.high
    # Resampling features as well as seeds counts some noise twice, so several placebos give wider intervals.
    assert hits / 300 >= 0.95 - 2 * np.sqrt(0.95 * 0.05 / 300)
    if n_placebos == 1:
        assert hits / 300 <= 0.985


def test_one_placebo_says_what_its_interval_does_not_hold() -> None:
    rng = np.random.default_rng(0)
    own, other, third = rng.random((3, 200)) < 0.3
    assert excess_paired(own, other[None], Resampling(), "x").reason == ONE_PLACEBO
    assert excess_unpaired(own, [other], Resampling(), "x").reason == ONE_PLACEBO
    assert excess_paired(own, np.array([other, third]), Resampling(), "x").reason == ""


def test_two_placebos_that_differ_a_lot_give_a_wide_interval() -> None:
    """Counts 100 and 140: t with one degree of freedom, 12.7 times the root of 3 / 2 times 28.3."""
    own = np.arange(1000) < 120
    placebos = np.array([np.arange(1000) < 100, np.arange(1000) < 140])
    found = excess_paired(own, placebos, Resampling(), "x")
    assert found.value == 0
    assert found.high == pytest.approx(12.7062 * np.sqrt(1.5 * 800), rel=0.06)
