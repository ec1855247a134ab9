"""The planted-truth benchmark: its texts, its scoring, its simulations and what it writes, on numbers known by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "planted"
sys.path.insert(0, str(FOLDER))

from concepts import CONCEPTS, EVERYDAY, FRAMES, concept_text  # noqa: E402
from fine_tunes import NULLS  # noqa: E402
from null_studies import NULL_STUDIES, judged, null_arms, null_rates  # noqa: E402
from plan import NEUTRAL_STEMS, NULL_STEMS, Plan  # noqa: E402
from scoring import chance, concept_tests, excess_p, most_changed, named_features, standing  # noqa: E402
from simulations import SETTINGS, TESTS, Setting, Simulated, rates_of, simulate  # noqa: E402
from verdicts import judge  # noqa: E402
from write_up import headline, write_results  # noqa: E402

from saeffect.diffing.cross_activity import change_scores  # noqa: E402

CASES = sorted(CONCEPTS)


@pytest.mark.parametrize("name", CASES)
def test_a_concepts_text_is_about_it_and_the_same_each_time(name: str) -> None:
    concept = CONCEPTS[name]
    documents = concept_text(concept, 300, seed=3)
    assert documents == concept_text(concept, 300, seed=3)
    assert documents != concept_text(concept, 300, seed=4)
    assert len(set(documents)) > 290
    named = sum(bool(set(_words(text)) & concept.words) for text in documents)
    assert named > 285


@pytest.mark.parametrize("name", CASES)
def test_word_lists_are_single_lower_case_words_and_long_enough(name: str) -> None:
    words = CONCEPTS[name].words
    assert 30 <= len(words) <= 90
    assert all(word.isalpha() and word == word.lower() for word in words)


def test_nothing_neutral_names_a_concept() -> None:
    neutral = [*NEUTRAL_STEMS, *NULL_STEMS, *(frame.replace("{", " ").replace("}", " ") for frame in FRAMES)]
    every = set().union(*(concept.words for concept in CONCEPTS.values()))
    assert not every & {word for text in neutral for word in _words(text)}
    everyday = concept_text(EVERYDAY, 200, seed=0)
    for name, concept in CONCEPTS.items():
        share = np.mean([bool(set(_words(text)) & concept.words) for text in everyday])
        assert share < 0.2, name


def test_frames_leave_nothing_unfilled() -> None:
    for text in concept_text(EVERYDAY, 500, seed=1):
        assert "{" not in text and "}" not in text and ".." not in text


def test_named_features_by_hand() -> None:
    tokens = [[" ship", "Ship", " cat"], [" ship", " cat", " dog"], [" planet", " moon", " ship"]]
    named = named_features(tokens, CONCEPTS, min_matches=2)
    assert named["ships"].tolist() == [True, False, False]
    assert named["astronomy"].tolist() == [False, False, True]


def test_score_by_hand_and_ranking_both_ways() -> None:
    changes = _changes([1.0, 0.0, 4.0, 0.0], [3.0, 0.0, 0.0, 0.5])
    expected = [2 / np.sqrt(2), np.nan, -4 / np.sqrt(2), 0.5 / np.sqrt(0.25)]
    np.testing.assert_allclose(change_scores(changes), expected)
    assert most_changed(change_scores(changes), 3) == [2, 0, 3]


def test_chance_and_concept_tests_against_the_hypergeometric() -> None:
    assert chance(0, 100, 10) == (0.0, 0.0)
    expected, at_least_one = chance(3, 100, 10)
    draws = np.random.default_rng(0).permuted(np.tile(np.arange(100) < 3, (20_000, 1)), axis=1)[:, :10].sum(axis=1)
    assert abs(expected - draws.mean()) < 0.02 and abs(at_least_one - (draws > 0).mean()) < 0.01
    scores = -np.arange(1.0, 101.0)[::-1]  # feature 0 changed most
    scores[50] = np.nan
    named = {"a": np.arange(100) < 3, "b": np.arange(100) == 98, "none": np.arange(100) == 50}
    flat = np.full(100, 0.1)  # one stratum: standing and size rank alike
    tests = concept_tests(scores, flat, named, top=10).set_index("concept")
    assert tests["hits"].tolist() == [3, 0, 0]
    assert tests.loc["a", "best_rank"] == 1 and tests.loc["a", "p"] == pytest.approx(3 / 99)
    assert tests.loc["b", "best_rank"] == 98 and tests.loc["b", "p"] == pytest.approx(98 / 99)
    assert np.isnan(tests.loc["none", "best_rank"]) and tests.loc["none", "p"] == 1.0


@pytest.mark.simulation
def test_concept_tests_hold_their_level_when_nothing_was_taught() -> None:
    rng = np.random.default_rng(0)
    named = {name: np.isin(np.arange(1000), rng.choice(1000, 12, replace=False)) for name in "abcd"}
    density = rng.random(1000)
    alarms = [
        bool((concept_tests(rng.standard_normal(1000), density, named, 10)["q"] <= 0.05).any()) for _ in range(300)
    ]
    assert abs(np.mean(alarms) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 300)


@pytest.mark.simulation
def test_concepts_of_features_that_fire_often_raise_no_alarm_for_that() -> None:
    """Features that fire often change more in every fine-tune; against all others their concept always stands out."""
    rng = np.random.default_rng(1)
    density = np.sort(rng.random(1000))
    named = {"often": np.isin(np.arange(1000), rng.choice(np.arange(700, 1000), 12, replace=False))}
    p, plain = [], []
    for _ in range(300):
        scores = (0.1 + 3 * density) * rng.standard_normal(1000)
        p.append(concept_tests(scores, density, named, 10)["p"].iloc[0])
        plain.append(concept_tests(scores, np.ones(1000), named, 10)["p"].iloc[0])
    error = np.sqrt(0.05 * 0.95 / 300)
    assert abs(np.mean(np.array(p) <= 0.05) - 0.05) < 3.5 * error
    assert np.mean(np.array(plain) <= 0.05) > 0.1
    assert abs(np.mean(p) - 0.5) < 0.06


def test_standing_by_hand() -> None:
    density = np.repeat([0.1, 0.9], 101)
    scores = np.concatenate([np.arange(101.0), 10 * np.arange(101.0)])
    scores[3] = np.nan
    found = standing(scores, density)
    assert np.isnan(found[3]) and np.nanmin(found) == 0
    # 100 of 0..100 deviates from its median by as many mean deviations as 1000 of 0..1000
    assert found[100] == pytest.approx(found[201], rel=0.05)
    assert np.isnan(standing(np.full(4, np.nan), density[:4])).all()


def test_a_study_of_nothing_is_judged_as_compare_judges() -> None:
    from saeffect.comparison import compare
    from saeffect.comparison.judgement import judge

    arms = null_arms(NULL_STUDIES[3], np.random.default_rng(0))
    assert [len(arm.saes) for arm in arms.values()] == [2, 3, 1]
    table = compare(arms, min_matches=2, alpha=0.05, seed=4, n_boot=200, n_permutations=40).contrasts
    assert judged(arms, 4) == {name: judge(table, name) for name in judged(arms, 4)}


@pytest.mark.simulation
def test_studies_of_nothing_credit_fine_tuning_seldom() -> None:
    """Where the noise of seeds is large; the benchmark counts it with more studies and other designs."""
    found = null_rates(NULL_STUDIES[4], 60, 0)
    # 3 of 60 expected at most: 9 or more has a chance below 0.5 %
    assert found["any"] <= 8 / 60


def test_excess_p_is_uniform_when_all_are_alike_and_small_when_not() -> None:
    rng = np.random.default_rng(0)
    own, *others = rng.standard_normal((3, 4000))
    density = rng.random(4000)
    p = excess_p(own, others, density)
    assert abs((p <= 0.05).mean() - 0.05) < 0.015
    own[:5] = 20.0
    assert excess_p(own, others, density)[:5].max() < 0.002


def test_judge_finds_what_is_planted_and_stays_calm_on_nulls() -> None:
    rng = np.random.default_rng(0)
    tokens = [["x"] * 10 for _ in range(500)]
    tokens[7] = [" ship", " boat", *["x"] * 8]
    named = named_features(tokens, {"ships": CONCEPTS["ships"], "war": CONCEPTS["war"]}, 2)
    changes = {}
    for name in ("ships", *NULLS):
        base = rng.exponential(1.0, 500)
        tuned = base + 0.1 * rng.standard_normal(500) * np.sqrt(base)
        tuned = np.maximum(tuned, 0)
        if name == "ships":
            base[7], tuned[7] = 1.0, 9.0
        changes[name] = _changes(base, tuned)
    found = judge(changes, named, tokens, Plan())
    assert found["models"]["ships"]["found"] and found["models"]["ships"]["best_rank"]["ships"] == 1
    assert found["models"]["ships"]["said"] == ["ships"]
    assert found["concepts"]["war"]["in_sae"] == 0 and found["concepts"]["war"]["chance_of_a_hit"] == 0
    assert found["models"]["ships"]["hits_beyond_nulls"] == {"ships": 1, "war": 0}
    assert all(found["nulls"][name]["concept"] == [] for name in NULLS)


def test_rates_count_what_they_say() -> None:
    nan = float("nan")
    setting = Setting("road", "data", 1.0, lambda effect, rng: None)  # not drawn from
    truth = np.array([[0.0, 0.0], [0.0, 0.0]])
    null = Simulated(
        np.array([[0.01, 0.9], [0.2, nan]]), np.array([[0.1, -1], [-1, nan]]), np.array([[1, 1], [1, nan]])
    )
    mixed_truth = np.array([[1.0, 0.0], [1.0, 0.0]])
    mixed = Simulated(np.array([[0.01, 0.04], [0.2, 0.3]]), np.array([[0, 0.5], [0, -1]]), np.array([[2, 1], [2, 1]]))
    rates = rates_of(setting, (truth, null), (mixed_truth, mixed))
    assert rates.alarms == 0.5  # one of two studies
    assert rates.false_discovery == 0.25  # half of the first, none of the second
    assert rates.power == 0.5
    assert rates.n_intervals == 7 and rates.coverage == pytest.approx(5 / 7)


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[setting.name for setting in SETTINGS])
def test_every_setting_runs_and_is_the_same_each_time(number: int) -> None:
    first = simulate(SETTINGS[number], 4, seed=number)
    assert first == pytest.approx(simulate(SETTINGS[number], 4, seed=number), nan_ok=True)
    assert 0 <= first["alarms"] <= 1 and 0.3 <= first["coverage"] <= 1 and first["n_studies"] == 4


def test_noise_has_mean_zero_and_spread_one() -> None:
    from simulations import _lognormal, _normal, _tied

    for noise in (_normal, _lognormal(0.5), _tied):
        values = noise(np.random.default_rng(0), (200_000,))
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.03


def test_the_write_up(tmp_path: Path) -> None:
    simulated = [
        {
            **{"setting": "s", "strict": strict, "remark": "", "alarms": alarms, "false_discovery": 0.02},
            **{"coverage": coverage, "power": 0.8, "n_studies": 100, "n_intervals": 100 * TESTS},
        }
        for strict, alarms, coverage in ((True, 0.04, 0.95), (True, 0.06, 0.93), (False, 0.5, 0.2))
    ]
    feature = {"feature": 3, "score": 1.0, "tokens": [" ship", "$x_1$ <b>"], "concepts": ["ships"], "q": 0.01}
    one = {
        "top": [feature],
        "hits": {"ships": 1},
        "hits_beyond_nulls": {"ships": 1},
        "best_rank": {"ships": 1},
        "p": {"ships": 0.01},
        "said": ["ships"],
    }
    null = {"concept": [], "concept_p": {"ships": 1.0}, "hits": 0, "feature": 0, "any_change": 5}
    models = {
        "models": {"ships": {**one, "found": True}, "null-everyday": {**one, "found": False}},
        "concepts": {"ships": {"in_sae": 4, "expected_hits": 0.01, "chance_of_a_hit": 0.01}},
        "chance_of_any_hit": 0.1,
        "nulls": {"null-everyday": null},
        "candidates": {"ships": 4, "war": 1},
        "perplexity": {n: {"training": {"before": 50.0, "after": 5.0}} for n in ("ships", "null-everyday")},
    }
    rates = {"any": 0.04, "domain_share": 0.01, "pass_rate": 0.02, "coherence_mean": 0.01, "n": 100}
    nothing = [{"design": "one placebo", "seed_noise": 3.0, **rates}]
    head = headline(simulated, nothing, models)
    assert head["headline_alarm_rate"] == head["headline_alarm_rate_worst"] == 0.04
    assert head["planted_found"] == head["planted_total"] == 1 and head["null_alarm_rate"] == 0
    assert head["false_positive_rate"] == pytest.approx(0.05) and head["interval_coverage"] == pytest.approx(0.94)
    assert head["false_positive_rate_worst"] == 0.06 and head["interval_coverage_worst"] == 0.93
    write_results(simulated, nothing, models, Plan(), tmp_path)
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"planted_found", "planted_total", "null_alarm_rate", "false_positive_rate", "interval_coverage"} <= set(
        written
    )
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".svg", ".png"}
    assert "war (1)" in (tmp_path / "results.md").read_text(encoding="utf-8")


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()


def _changes(control: object, treatment: object) -> pd.DataFrame:
    a, b = np.asarray(control, dtype=float), np.asarray(treatment, dtype=float)
    return pd.DataFrame(
        {
            "mean_control": a,
            "mean_treatment": b,
            "difference": b - a,
            "density_control": (a > 0) * 0.1,
            "q": np.where(b != a, 0.01, 1.0),
        }
    )
