"""Ranks among null fine-tunes: by hand, against scipy, and their error rates where nothing was taught."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from saeffect.diffing.null_ranks import (
    count_scores,
    null_range,
    null_reason,
    pooled_rank_p,
    rank_p,
    rise_scores,
    search_p,
)
from saeffect.errors import ShapeMismatch
from saeffect.stats.multiplicity import benjamini_hochberg


def test_rank_by_hand_counts_ties_against_the_finding():
    values = [[5.0, 1.0, 2.0, np.nan], [4.0, 1.0, 3.0, 0.0], [1.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(rank_p(values), [1 / 4, 2 / 4, 2 / 4, np.nan])


def test_without_nulls_there_is_no_p():
    values = np.ones((1, 3))
    for p in (
        rank_p(values),
        pooled_rank_p(rise_scores(values, np.zeros(3, dtype=int))),
        search_p(count_scores(values)),
    ):
        assert np.isnan(p).all()
    assert null_reason(0, 0.05) == "no null fine-tunes to compare with"
    assert all(np.isnan(column).all() for column in null_range(np.empty((0, 3))).values())


def test_one_null_says_what_it_takes():
    assert null_reason(1, 0.05) == "with 1 null no p is below 1/2: it takes 19 to find something at 0.05"
    assert null_reason(19, 0.05) == null_reason(99, 0.01) == ""
    assert null_reason(18, 0.05) != ""
    assert search_p([[9.0, 1.0], [0.0, 0.0]]).tolist() == [0.5, 0.5]


def test_count_scores_are_scipys_binomial_test():
    counts = np.random.default_rng(0).poisson(3, (6, 20))
    scores = count_scores(counts)
    for k in range(6):
        for i in range(20):
            if counts[:, i].sum():
                p = stats.binomtest(int(counts[k, i]), int(counts[:, i].sum()), 1 / 6, alternative="greater").pvalue
                assert scores[k, i] == pytest.approx(-np.log10(p), abs=1e-9)


def test_rise_scores_by_hand():
    values = np.array([[4.0, 9.0, np.nan], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    # Means 2 and 3; deviations (2 + 1 + 1) / 3 and (6 + 3 + 3) / 3, apart 4/3 and 4.
    apart = rise_scores(values, np.array([0, 1, 0]))
    np.testing.assert_allclose(apart[0], [3 / (4 / 3), 9 / 4, np.nan])
    together = rise_scores(values, np.zeros(3, dtype=int))
    np.testing.assert_allclose(together[0, :2], np.array([3.0, 9.0]) / ((4 / 3 + 4) / 2))
    assert np.isnan(rise_scores(values, np.full(3, -1))).all()
    with pytest.raises(ShapeMismatch, match="values must be"):
        rise_scores(values, np.zeros(2, dtype=int))


def test_pooled_p_and_search_p_by_counting():
    scores = np.random.default_rng(1).integers(0, 6, (5, 40)).astype(float)
    pooled = [(1 + (scores[1:] >= s).sum()) / (1 + 160) for s in scores[0]]
    search = [(1 + (scores[1:].max(axis=1) >= s).sum()) / 5 for s in scores[0]]
    np.testing.assert_allclose(pooled_rank_p(scores), pooled)
    np.testing.assert_allclose(search_p(scores), search)


def texts_with_words(rng: np.random.Generator, n_fine_tunes: int, n: int = 200) -> np.ndarray:
    """In how many of 96 texts each word is; three fine-tunes in ten take up a theme of their own, by chance."""
    p = np.tile(0.001 * 10 ** rng.uniform(0, 2.3, n), (n_fine_tunes, 1))
    for mine in p[rng.random(n_fine_tunes) < 0.3]:
        mine[rng.choice(n, 15, replace=False)] *= rng.uniform(2, 12)
    return rng.binomial(96, np.minimum(p * rng.gamma(20, 1 / 20, p.shape), 0.6))


def changed_words(rng: np.random.Generator, n_fine_tunes: int, n: int = 200) -> np.ndarray:
    """Log divergences of words: fine-tunes differ in all of them together, and words in how much they vary."""
    together = rng.normal(0, 0.3, (n_fine_tunes, 1)) * rng.uniform(0.5, 1.5, n)
    return together + rng.standard_t(4, (n_fine_tunes, n)) * rng.gamma(4, 0.1, n)


def alarms(draw, score, n_studies: int, seed: int) -> tuple[float, float, float]:
    """Shares of studies with any word of q, and of search p, up to 5 %; mean share of words of p up to 5 %."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_studies):
        scores = score(draw(rng, 21))
        p = pooled_rank_p(scores)
        q = benjamini_hochberg(p)
        found.append([(q <= 0.05).any(), (search_p(scores) <= 0.05).any(), (p <= 0.05).mean()])
    by_q, by_search, words = np.mean(found, axis=0)
    return by_q, by_search, words


def rises(values: np.ndarray) -> np.ndarray:
    return rise_scores(values, np.zeros(values.shape[1], dtype=int))


@pytest.mark.simulation
@pytest.mark.parametrize(
    ("draw", "score", "most_by_q"), [(texts_with_words, count_scores, 0.09), (changed_words, rises, 0.25)]
)
def test_false_alarms_among_exchangeable_fine_tunes(draw, score, most_by_q):
    """20 nulls: the search finds something in 1 of 21 studies; q in somewhat more, as words go together."""
    by_q, by_search, words = alarms(draw, score, 600, seed=3)
    assert by_search <= 1 / 21 + 2.6 * np.sqrt(0.05 * 0.95 / 600)
    assert by_search >= 0.02
    assert by_q <= most_by_q
    assert 0.035 <= words <= 0.065


def test_error_rate_and_power_in_few_studies():
    """A quick version of the simulation, and its power: words that come up ten times as often are found."""
    assert alarms(texts_with_words, count_scores, 40, seed=1)[1] <= 0.15
    rng = np.random.default_rng(2)
    counts = texts_with_words(rng, 21)
    counts[0, :8] = 20 + counts[1:, :8].max(axis=0)
    p = search_p(count_scores(counts))
    assert (p[:8] <= 0.05).all()
