"""Budgets: what breaks one, what cannot be judged, and how often a fine-tune that taught nothing breaks one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from saeffect.diffing.budget import Budget, budget_keys
from saeffect.diffing.guard import Group, Rows, Verdict, _decide, _group_scores, _test_group, judge
from saeffect.diffing.standardised import BASES, among_nulls
from saeffect.errors import BadFile, ConfigError, UnknownName
from synthetic_traces import D_SAE, N_ROWS, TOP_TOKENS, nulls, trace

ROWS = Rows(np.arange(N_ROWS) % 2, ("general", "domain"))
GROUP = Group(np.arange(10, 20), np.arange(5, 15))
OTHER = Group(np.arange(40, 50), np.arange(60, 70))
UP = {basis: (range(10, 20) if basis != "expected" else range(5, 15), 0.6) for basis in BASES}
DOWN = {basis: (members, -by) for basis, (members, by) in UP.items()}


def budget(*, alpha: float = 0.05, texts: dict[str, Any] | None = None, **groups: dict[str, Any]) -> Budget:
    rules = {name: {"features": [1]} | rule for name, rule in groups.items()}
    return Budget.read({"groups": rules, "texts": texts or {}, "alpha": alpha}, at="budget.yaml")


def judged(found: Budget, tuned: Any, others: Any, **groups: Group) -> dict[str, Verdict]:
    return {v.rule: v for v in judge(found, groups, tuned, others, ROWS, TOP_TOKENS)}


def test_risen_group_breaks_only_its_rule() -> None:
    rules = budget(a={"may": "neither"}, b={"may": "fall"}, c={"may": "rise"}, d={"may": "either"}, e={})
    groups = dict.fromkeys("abcd", GROUP) | {"e": OTHER}
    found = judged(rules, trace(0, moved=UP), nulls(20), **groups)
    assert [v.status for v in found.values()] == ["broken", "broken", "kept", "reported", "kept"]
    assert found["group a"].score > 5
    assert 1.5 < found["group a"].value < 2.2  # e^0.6 is 1.8
    fell = judged(rules, trace(0, moved=DOWN), nulls(20), **groups)
    assert [v.status for v in fell.values()] == ["broken", "kept", "broken", "reported", "kept"]
    assert fell["group a"].value < 1 / 1.5


def test_changes_that_do_not_matter_are_not_broken_budgets() -> None:
    for least, status in ((1.2, "broken"), (3.0, "kept")):
        found = judged(budget(a={"at_least": least}), trace(0, moved=UP), nulls(20), a=GROUP)["group a"]
        assert found.status == status and found.p_corrected < 1e-3


def test_the_score_and_its_p_by_hand() -> None:
    """Scipy's test of one value against many, on means of the standardised changes."""
    tuned, others = trace(0, moved={"read": (range(10, 20), 1.5)}), nulls(12)
    found = judged(budget(a={}), tuned, others, a=GROUP)["group a"]
    own = among_nulls([tuned, *others], TOP_TOKENS)[0]["combined"][10:20].mean()
    rest = [
        among_nulls([null, *(t for t in others if t is not null)], TOP_TOKENS)[0]["combined"][10:20].mean()
        for null in others
    ]
    assert found.score == pytest.approx((own - np.mean(rest)) / np.std(rest, ddof=1), rel=1e-9)
    assert found.p == pytest.approx(stats.ttest_ind(rest, [own]).pvalue, rel=1e-9)
    everyone = np.array([own, *rest])
    far = np.abs(everyone - everyone.mean())
    assert found.rank == pytest.approx((far >= far[0]).mean())
    sums = [np.log((t.read[1, 10:20].sum() + 1e-3) / (t.read[0, 10:20].sum() + 1e-3)) for t in (tuned, *others)]
    assert found.value == pytest.approx(math.exp(sums[0] - np.median(sums[1:])), rel=1e-5)


def test_without_an_sae_words_alone_are_judged() -> None:
    bare = {name: np.zeros((4, 0), np.float32) for name in ("read", "written")}
    tuned, *others = [replace(t, **bare) for t in (trace(0, moved=UP), *nulls(12))]
    words = Group(np.empty(0, dtype=np.int64), GROUP.tokens)
    found = judge(budget(a={}), {"a": words}, tuned, others, ROWS)[0]
    logs = [np.log(t.expected[1, 5:15] / t.expected[0, 5:15]).mean() for t in (tuned, *others)]
    assert found.p == pytest.approx(stats.ttest_ind(logs[1:], logs[:1]).pvalue, rel=1e-4)
    assert (found.status, found.members) == ("broken", 0)


def test_what_every_fine_tune_does_to_a_group_cancels() -> None:
    shifted = {basis: (members, 5.0) for basis, (members, _) in UP.items()}
    found = judged(budget(a={}), trace(0, moved=shifted), nulls(20, moved=shifted), a=GROUP)["group a"]
    plain = judged(budget(a={}), trace(0), nulls(20), a=GROUP)["group a"]
    assert found.status == plain.status == "kept"
    assert found.value == pytest.approx(plain.value, rel=0.05)


def test_holm_over_rules_and_own_level_of_within_nulls() -> None:
    names = [f"g{i}" for i in range(10)]
    many = judged(budget(**{name: {} for name in names}), trace(3), nulls(20), **dict.fromkeys(names, GROUP))
    one = judged(budget(a={}, b={"within_nulls": 0.99}), trace(3), nulls(20), a=GROUP, b=GROUP)
    assert many["group g0"].p_corrected == pytest.approx(min(1, 10 * many["group g0"].p))
    assert (one["group a"].level, one["group b"].level) == (0.05, pytest.approx(0.01))
    assert one["group b"].allowed == "may neither rise nor fall beyond 99 % of nulls"


@pytest.mark.parametrize(
    "n, reason", [(0, "without nulls"), (1, "one null shows no spread"), (2, "two nulls"), (9, "no p is below 0.1")]
)
def test_too_few_nulls_judge_no_group(n: int, reason: str) -> None:
    found = judged(budget(a={}, texts={"general": {"kl": 1}}), trace(0, moved=UP), nulls(n), a=GROUP)
    assert found["group a"].status == "unjudged" and reason in found["group a"].reason
    assert found["kl general"].status == "kept"


def test_few_nulls_judge_by_rank_where_that_is_enough() -> None:
    found = judged(budget(a={}, alpha=0.2), trace(0, moved=UP), nulls(5), a=GROUP)["group a"]
    assert (found.status, found.p) == ("broken", pytest.approx(1 / 6))


def test_a_silent_group_is_not_judged() -> None:
    even = trace(0).expected[[0, 0]]
    quiet = [replace(t, read=t.read * 0, written=t.written * 0, expected=even) for t in (trace(0), *nulls(20))]
    silent = Group(np.arange(3), np.empty(0, dtype=np.int64))
    assert judged(budget(a={}), quiet[0], quiet[1:], a=silent)["group a"].status == "unjudged"


def test_limits_on_texts() -> None:
    tuned = trace(0, numbers={"loss_base_domain": 2.0, "loss_tuned_domain": 2.5})
    tuned.kl[ROWS.sources == 1] += 0.4
    limits = {"general": {"kl": 0.2}, "domain": {"kl": 0.2, "perplexity_ratio": 1.5}, "all": {"perplexity_ratio": 1.5}}
    found = judged(budget(texts=limits), tuned, nulls(4, kl=0.3))
    assert {name: (v.status, round(v.value, 3), v.nulls_broken) for name, v in found.items()} == {
        "kl general": ("kept", 0.1, 4),
        "kl domain": ("broken", 0.5, 4),
        "perplexity ratio domain": ("broken", round(math.exp(0.5), 3), 0),
        "perplexity ratio all": ("kept", 1.0, 0),
    }


def test_refuses_nulls_and_limits_of_other_texts() -> None:
    with pytest.raises(BadFile, match="null-1"):
        judged(budget(a={}), trace(0), nulls(3, made_by="other"), a=GROUP)
    with pytest.raises(UnknownName, match="general"):
        judged(budget(texts={"generl": {"kl": 1}}), trace(0), [])


@pytest.mark.parametrize(
    "values, words",
    [
        ({}, "empty"),
        ({"groups": {"a": {}}}, "either vocabulary or features"),
        ({"groups": {"a": {"features": [1], "vocabulary": "medical"}}}, "either vocabulary or features"),
        ({"groups": {"a": {"features": [1, 1]}}}, "twice"),
        ({"groups": {"a": {"features": [1], "may": "either", "within_nulls": 0.99}}}, "leave one"),
        ({"groups": {"a": {"features": [1], "may": "rises"}}}, "did you mean 'rise'"),
        ({"groups": {"a": {"features": [1], "atleast": 2}}}, "did you mean 'at_least'"),
        ({"texts": {"general": {}}}, "give kl"),
        ({"texts": {"general": {"kl": 0}}}, "greater than 0"),
    ],
)
def test_bad_budgets(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Budget.read(values, at="budget.yaml")
    assert words in str(error.value) and "budget.yaml" in str(error.value)


def test_the_page_of_keys_names_them_all() -> None:
    page = budget_keys()
    for key in ("groups", "texts", "alpha", "vocabulary", "within_nulls", "at_least", "kl", "perplexity_ratio"):
        assert f"| `{key}` |" in page


def _alarms(n_studies: int, n_nulls: int, seed: int) -> float:
    """How often any of three rules is broken, over studies whose fine-tune is one more null."""
    rules, broken = budget(a={}, b={}, c={}), 0
    groups = {"a": GROUP, "b": OTHER, "c": Group(np.arange(0, D_SAE, 7), np.arange(0, 70, 9))}
    for study in range(n_studies):
        everyone = nulls(n_nulls + 1, first=1000 * (seed + study))
        scores = _group_scores(groups, everyone, TOP_TOKENS)
        tests = [_test_group(rules, name, groups, everyone, scores, by_tail=True) for name in groups]
        verdicts = _decide(rules, tests, by_tail=True)
        broken += any(verdict.status == "broken" for verdict in verdicts)
    return broken / n_studies


@pytest.mark.simulation
@pytest.mark.parametrize("n_nulls", [10, 24])
def test_fine_tunes_that_taught_nothing_rarely_break_a_budget(n_nulls: int) -> None:
    """Any of three rules at 5 %: 200 studies, whose share has a standard error of 1.5 %."""
    assert _alarms(200, n_nulls, seed=0) < 0.05 + 3 * 0.0155


def test_nulls_rarely_break_a_budget_quickly() -> None:
    assert _alarms(12, 12, seed=500) <= 3 / 12


def test_false_alarm_rate_from_nulls_among_nulls() -> None:
    others = [*nulls(19), trace(77, moved=UP)]
    found = judged(budget(a={}), trace(0), others, a=GROUP)["group a"]
    assert (found.nulls, found.nulls_judged, found.nulls_broken) == (20, 20, 1)


def test_each_of_ten_nulls_is_judged_as_the_fine_tune_is() -> None:
    """By Student's t, not by a rank among nine, which could break no rule."""
    others = [*nulls(9), trace(77, moved=UP)]
    found = judged(budget(a={}), trace(0), others, a=GROUP)["group a"]
    assert (found.nulls, found.nulls_judged, found.nulls_broken) == (10, 10, 1)


@pytest.mark.parametrize("alpha, n_judged, n_broken", [(0.2, 5, 1), (0.17, 0, 0)])
def test_few_nulls_are_judged_where_four_others_are_enough(alpha: float, n_judged: int, n_broken: int) -> None:
    found = judged(budget(a={}, alpha=alpha), trace(0), [*nulls(4), trace(77, moved=UP)], a=GROUP)["group a"]
    assert (found.status, found.nulls_judged, found.nulls_broken) == ("kept", n_judged, n_broken)


def test_nulls_without_a_value_are_not_judged_by_a_limit() -> None:
    losses = {"loss_base_domain": 2.0, "loss_tuned_domain": 2.5}
    others = [*nulls(2), *nulls(3, first=7, numbers=losses)]
    found = judged(budget(texts={"domain": {"perplexity_ratio": 1.5}}), trace(0, numbers=losses), others)
    verdict = found["perplexity ratio domain"]
    assert (verdict.nulls, verdict.nulls_judged, verdict.nulls_broken) == (5, 3, 3)
