from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison import PRIMARY, ArmFacts, ArmTables, Resampling, compare
from saeffect.comparison.arms import roles_of
from saeffect.comparison.contrasts import contrasts
from saeffect.comparison.judgement import judge
from saeffect.errors import ConfigError
from synthetic_seeds import synthetic_seeds
from synthetic_study import compared, synthetic_arms

SMALL = {"min_matches": 2, "alpha": 0.05, "n_boot": 100, "n_permutations": 100}


def test_same_seed_same_tables_whatever_the_order_of_arms():
    arms = synthetic_arms(n_features=120, max_tested=6)
    first = compared(arms, seed=3)
    second = compared(dict(reversed(arms.items())), seed=3)
    other = compared(arms, seed=4)
    for field in fields(first):
        value = getattr(first, field.name)
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(value, getattr(second, field.name), check_exact=True)
    assert first.answer == second.answer
    assert not first.contrasts["low"].equals(other.contrasts["low"])
    json.dumps(first.answer)


def test_tables_survive_parquet(tmp_path):
    comparison = compare(synthetic_arms(n_features=120), seed=0, **SMALL)
    for field in fields(comparison):
        value = getattr(comparison, field.name)
        if isinstance(value, pd.DataFrame):
            value.to_parquet(tmp_path / "t.parquet")
            pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "alpha must lie between 0 and 1"),
        ({"n_boot": 10}, "n_boot must be at least 40"),
        ({"min_matches": 0}, "min_matches must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        compare(synthetic_arms(n_features=40), seed=0, **{**SMALL, **change})


def test_an_arm_under_another_name_is_refused():
    arms = synthetic_arms(n_features=40)
    with pytest.raises(ConfigError, match="calls itself 'control'"):
        compare({"base": arms["control"], "treatment": arms["treatment"]}, seed=0, **SMALL)


def null_arm(role, rng):
    """An arm drawn alike in every role: 200 features, about 30 of the domain, 25 of those tested."""
    ids = range(200)
    is_domain = rng.random(200) < 0.15
    chosen = is_domain.nonzero()[0][:25]
    matches = is_domain * 3
    return ArmTables(
        name=role,
        role=role,
        features=pd.DataFrame(
            {
                "feature": ids,
                "top_tokens": [[" x", " y"]] * 200,
                "top_weights": list(rng.gamma(4.0, size=(200, 2))),
                "density": rng.random(200),
                "mean_activation": rng.random(200),
                "max_activation": 1.0,
            }
        ),
        coherence=pd.DataFrame({"feature": ids, "coherence": rng.beta(2, 2, 200), "n_known": 2, "reason": ""}),
        selection=pd.DataFrame(
            {
                "feature": ids,
                "matches": matches,
                "matches_dot": matches,
                "matches_cosine": matches,
                "in_vocabulary": is_domain,
                "is_domain": is_domain,
            }
        ),
        interventions=None,
        direct_effects=None,
        effects=pd.DataFrame(
            {
                "feature": chosen,
                "n_pairs": 6,
                "effect": rng.normal(0.1, 0.1, len(chosen)),
                "p": 0.01,
                "passed": rng.random(len(chosen)) < 0.6,
                "paper_pass": True,
                "placebo": "random",
            }
        ),
        facts=ArmFacts(role=role),
    )


@pytest.mark.simulation
def test_a_study_without_effect_seldom_raises_an_alarm():
    rng, n_studies = np.random.default_rng(11), 40
    excluded = dict.fromkeys(PRIMARY, 0)
    alarms = 0
    for _ in range(n_studies):
        arms = {role: null_arm(role, rng) for role in ("control", "treatment", "placebo")}
        roles = roles_of({name: name for name in arms})
        table = contrasts(arms, roles, min_matches=2, resampling=Resampling(seed=1, n_boot=100, n_permutations=20))
        judged = [judge(table, quantity) for quantity in PRIMARY]
        for judgement in judged:
            excluded[judgement.quantity] += judgement.change.sign != 0
        alarms += any(judgement.status == "beyond" for judgement in judged)
    # 2 of 40 expected for each interval, a little more for bootstrap ones: 9 or more has a chance below 0.1 %
    assert all(count < 9 for count in excluded.values()), excluded
    assert sum(excluded.values()) > 0
    assert alarms < 6


def test_a_planted_difference_is_found():
    comparison = compared(synthetic_seeds(synthetic_arms(seed=2, max_tested=8)))
    assert judge(comparison.contrasts, "domain_share").status == "beyond"
    assert judge(comparison.contrasts, "weight_mean").status == "beyond"
    assert "3 SAEs against 4" in comparison.answer["headline"]
    assert ", 3 SAEs against 4" in comparison.answer["paragraph"]


def test_one_placebo_alone_credits_only_what_dwarfs_it():
    """The same arms without their further SAEs: ten points of domain features, and nobody can say it is not a seed."""
    comparison = compared(synthetic_arms(seed=2))
    found = judge(comparison.contrasts, "domain_share")
    assert found.status == "noise"
    assert found.p > 0.05
    assert "noise alone would give as much with p = " in " ".join(comparison.answer["sentences"])


def test_a_planted_coherence_difference_is_found_and_no_other():
    arms = synthetic_arms(seed=5)
    control = arms["control"]
    lifted = control.coherence.assign(coherence=control.coherence["coherence"] + 0.3)
    arms["treatment"] = replace(
        control, name="treatment", role="treatment", coherence=lifted, facts=arms["treatment"].facts
    )
    # two more placebos that differ from the control as one SAE from another of a few hundredths
    for name, shift in (("again", 0.02), ("once-more", -0.01)):
        moved = control.coherence.assign(coherence=control.coherence["coherence"] + shift)
        facts = replace(arms["placebo"].facts, seed=name)
        arms[name] = replace(control, name=name, role="placebo", coherence=moved, facts=facts)
    comparison = compared(arms)
    assert judge(comparison.contrasts, "coherence_mean").change.value == pytest.approx(0.3)
    assert [judge(comparison.contrasts, quantity).status for quantity in PRIMARY] == [
        "unclear",
        "unclear",
        "beyond",
    ]
    assert "the domain features are more coherent (+0.300" in comparison.answer["headline"]


def test_the_order_of_a_tables_rows_changes_no_number():
    arms = synthetic_seeds(synthetic_arms(n_features=60, max_tested=4))
    tables = ("features", "coherence", "selection", "interventions", "direct_effects", "effects")
    shuffled = {
        name: replace(arm, **{table: getattr(arm, table).sample(frac=1, random_state=1) for table in tables})
        for name, arm in arms.items()
    }
    first, second = (compare(rows, seed=0, **SMALL) for rows in (arms, shuffled))
    for name in ("table1", "table2", "contrasts", "calibration", "power", "regression"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), rtol=1e-9, obj=name)
