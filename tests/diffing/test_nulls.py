"""Changes of features judged against null fine-tunes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saeffect.diffing.matched_null import MIN_STRATUM, strata
from saeffect.diffing.nulls import pooled_p, smallest_p
from saeffect.errors import ShapeMismatch


def test_by_hand() -> None:
    # Feature 0: 6 and 0, 0, 3: mean 2.25, variance 8.25; distances from the mean of the others 5, 3, 3, 1.
    # Feature 1: 0 and 1, -1, 0: mean 0, variance 2/3; distances 0, 4/3, 4/3, 0. Usual variance 4.458.
    # Spreads: sqrt((4 x 4.458 + 3 x 8.25) / 7) = 2.467 and sqrt((4 x 4.458 + 2) / 7) = 1.683.
    # Scores of the nulls: 1.216, 1.216, 0.405 and 0.792, 0.792, 0; of the fine-tune 2.027 and 0.
    p = pooled_p([6.0, 0.0], [[0.0, 1.0], [0.0, -1.0], [3.0, 0.0]], [0.1, 0.2]).p
    assert p.tolist() == pytest.approx([1 / 7, 7 / 7])
    # 1.5 instead of 6: distances 0.5, 1.5, 1.5, 2.5, so two features' nulls are beyond all but the last.
    p = pooled_p([1.5, 0.0], [[0.0, 1.0], [0.0, -1.0], [3.0, 0.0]], [0.1, 0.2]).p
    assert p[0] == pytest.approx(6 / 7)


def _brute_force(change: np.ndarray, nulls: np.ndarray, density: np.ndarray) -> np.ndarray:
    """The definition, in loops."""
    table = np.vstack([change, nulls])
    n_tunes, n = table.shape
    groups = strata(density[:, None], MIN_STRATUM)
    p = np.empty(n)
    for group in set(groups.tolist()):
        members = [f for f in range(n) if groups[f] == group]
        usual = np.mean([np.var(table[:, f], ddof=1) for f in members])
        scores = np.empty((n_tunes, len(members)))
        for column, f in enumerate(members):
            spread = math.sqrt((4 * usual + (n_tunes - 1) * np.var(table[:, f], ddof=1)) / (n_tunes + 3))
            for k in range(n_tunes):
                others = [table[j, f] for j in range(n_tunes) if j != k]
                scores[k, column] = abs(table[k, f] - sum(others) / len(others)) / spread
        pool = [s for k in range(1, n_tunes) for s in scores[k]]
        for column, f in enumerate(members):
            p[f] = (1 + sum(s >= scores[0, column] - 1e-9 for s in pool)) / (1 + len(pool))
    return p


def test_agrees_with_the_definition() -> None:
    rng = np.random.default_rng(0)
    density = rng.random(450)
    change, nulls = rng.normal(size=450) * density, rng.normal(size=(4, 450)) * density
    assert len(set(strata(density[:, None], MIN_STRATUM))) == 2
    assert pooled_p(change, nulls, density).p == pytest.approx(_brute_force(change, nulls, density))


def test_a_feature_is_ranked_among_those_of_its_density() -> None:
    rng = np.random.default_rng(1)
    density = np.concatenate([np.full(300, 0.001), np.full(300, 0.5)])
    scale = np.where(density < 0.01, 0.01, 1.0)
    nulls = rng.normal(size=(10, 600)) * scale
    change = np.zeros(600)
    change[0] = 0.08  # eight of its own units, nothing among frequent features
    p, n_pooled = pooled_p(change, nulls, density)
    assert p[0] == pytest.approx(smallest_p(10, 300))
    assert n_pooled.tolist() == [300] * 600
    change[0], change[300] = 0.0, 0.08
    assert pooled_p(change, nulls, density).p[300] > 0.5


def test_one_null_never_says_more_than_a_coin() -> None:
    p = pooled_p([100.0, *np.zeros(50)], np.zeros((1, 51)), np.full(51, 0.1)).p
    assert p.min() == 0.5


def test_undefined_stays_undefined_and_still_features_have_not_changed() -> None:
    density = [0.1, 0.1, math.nan, 0.1]
    p = pooled_p([1.0, math.nan, 1.0, 0.0], np.repeat([[0.0], [0.1], [0.2]], 4, axis=1), density).p
    assert np.isnan(p).tolist() == [False, True, True, False]
    assert pooled_p(np.zeros(3), np.zeros((3, 3)), [0.0, 0.0, 0.0]).p.tolist() == [1.0, 1.0, 1.0]
    assert len(pooled_p([], np.empty((3, 0)), []).p) == 0


def test_refuses_shapes_that_do_not_fit(complains: Callable[..., Any]) -> None:
    for nulls in (np.zeros((0, 3)), np.zeros((2, 4)), np.zeros(3)):
        with complains(ShapeMismatch, "at least 1"):
            pooled_p(np.zeros(3), nulls, np.zeros(3))


def _tune(kind: str, rng: np.random.Generator, n_tunes: int, n: int) -> np.ndarray:
    """Changes [n_tunes, n] of exchangeable fine-tunes."""
    if kind == "normal":
        x = rng.normal(size=(n_tunes, n))
    elif kind == "skewed":
        x = rng.gamma(1.0, size=(n_tunes, n))
    elif kind == "heavy tails":
        x = rng.standard_t(2, size=(n_tunes, n))
    else:  # correlated: a few directions move many features of a fine-tune together
        x = rng.normal(size=(n_tunes, 3)) @ rng.normal(size=(3, n)) + rng.normal(size=(n_tunes, n))
    return np.asarray(x * np.exp(rng.normal(size=n) / 2))  # features differ in scale


def _error_rates(kind: str, n_nulls: int, n_studies: int) -> tuple[float, float]:
    """Shares of null features with p at most 5 % and at most 1 %."""
    rng = np.random.default_rng([n_nulls, len(kind)])
    found = []
    for _ in range(n_studies):
        table = _tune(kind, rng, n_nulls + 1, 250)
        found.append(pooled_p(table[0], table[1:], np.full(250, 0.1)).p)
    p = np.concatenate(found)
    return float((p <= 0.05).mean()), float((p <= 0.01).mean())


KINDS = ("normal", "skewed", "heavy tails", "correlated")


@pytest.mark.parametrize("kind", KINDS)
def test_error_rate(kind: str) -> None:
    assert _error_rates(kind, 10, 60)[0] == pytest.approx(0.05, abs=0.025)


@pytest.mark.simulation
@pytest.mark.parametrize("n_nulls", [2, 5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_error_rates(kind: str, n_nulls: int) -> None:
    five, one = _error_rates(kind, n_nulls, 600)
    # A fine-tune that moved everything is ranked among nulls that did not: a little too many small p with few nulls.
    more = 1.0 if kind != "correlated" else 2.0
    assert 0.04 <= five <= 0.05 + 0.01 * more
    assert 0.006 <= one <= 0.01 + 0.004 * more


@pytest.mark.parametrize("n_nulls", [5, 20])
def test_large_changes_are_found(n_nulls: int) -> None:
    rng = np.random.default_rng(3)
    table = _tune("normal", rng, n_nulls + 1, 400)
    spread = table[1:].std(axis=0)
    table[0, :20] = 8 * spread[:20]
    p = pooled_p(table[0], table[1:], np.full(400, 0.1)).p
    assert np.median(p[:20]) < 0.002
    assert (p[20:] < 0.01).mean() < 0.03
