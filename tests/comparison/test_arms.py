from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison.arms import (
    PassCounts,
    activity_of,
    coherence_of,
    condition_similarities,
    direct_effect_of,
    effect_of,
    pass_counts,
    roles_of,
    scale_count,
    steered_minus_placebo,
    top_token_coverage,
    weights_of,
)
from saeffect.errors import BadFile, ConfigError


def test_roles_are_ordered_control_treatment_placebos():
    roles = roles_of({"p2": "placebo", "tuned": "treatment", "p1": "placebo", "base": "control"})
    assert roles.ordered == ("base", "tuned", "p2", "p1")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"a": "control"}, "exactly one treatment arm. Found: none"),
        ({"a": "treatment", "b": "placebo"}, "exactly one control arm. Found: none"),
        ({"a": "control", "b": "control", "c": "treatment"}, "exactly one control arm. Found: a, b"),
        ({"a": "control", "b": "bystander"}, "role 'bystander'"),
    ],
)
def test_wrong_roles_are_refused(roles, message):
    with pytest.raises(ConfigError, match=message):
        roles_of(roles)


def test_domain_features_are_sorted_and_select_rows(tiny_arm):
    arm = tiny_arm()
    shuffled = replace(arm, selection=arm.selection.iloc[::-1], features=arm.features.iloc[::-1])
    assert list(shuffled.domain) == [1, 3, 4]
    assert list(shuffled.of_domain(shuffled.features)["feature"]) == [1, 3, 4]


def test_a_missing_column_is_named_with_its_file(tiny_arm):
    arm = tiny_arm()
    with pytest.raises(BadFile, match="no column is_domain") as error:
        replace(arm, selection=arm.selection.drop(columns="is_domain"))
    assert error.value.at == "arms/base/selection.parquet"


def test_pass_counts_leave_out_features_without_p(tiny_arm):
    counts = pass_counts(tiny_arm())
    assert counts == PassCounts(tested=2, passed=1, paper_tested=2, paper_passed=2)


def test_missing_verdicts_do_not_count_as_passed(tiny_arm):
    arm = tiny_arm()
    effects = arm.effects.assign(passed=pd.array([True, None, None], dtype="boolean"), paper_pass=[None, False, None])
    counts = pass_counts(replace(arm, effects=effects))
    assert counts == PassCounts(tested=2, passed=1, paper_tested=1, paper_passed=0)


def test_numbers_of_an_arm(tiny_arm):
    arm = tiny_arm()
    assert scale_count(arm, "dot", 2) == 1
    assert scale_count(arm, "cosine", 2) == 4
    assert list(coherence_of(arm)) == [0.2, 0.4]
    assert top_token_coverage(arm, domain_only=True) == 5 / 6
    assert top_token_coverage(arm) == 9 / 10
    assert list(activity_of(arm, "density")) == [0.01, 0.03, 0.0]
    assert list(activity_of(arm, "mean_activation")) == [2.0, 4.0]
    assert list(effect_of(arm)) == [0.0, 0.4]
    # steered: mean of 1 and 2, of 2 and 3; random: 0.5
    assert list(direct_effect_of(arm)) == [1.0, 2.0]


def test_weights_keep_their_feature_and_rank(tiny_arm):
    found = weights_of(tiny_arm())
    assert found["weight"].tolist() == [3, 1, 4, 2, 5, 3]
    assert found["feature"].tolist() == [1, 1, 3, 3, 4, 4]
    assert found["rank"].tolist() == [0, 1, 0, 1, 0, 1]


def test_similarities_leave_out_undefined_ones(tiny_arm):
    arm = tiny_arm()
    trials = arm.interventions.copy()
    trials.loc[
        (trials["feature"] == 1) & (trials["condition"] == "steered") & (trials["prompt"] == 0), "similarity"
    ] = np.nan
    values, features = condition_similarities(replace(arm, interventions=trials), "steered")
    assert list(values) == [0.4, 0.8, 0.6]
    assert list(features) == [1, 3, 3]


def test_an_arm_that_was_not_steered_has_no_effects(tiny_arm):
    arm = replace(tiny_arm(), interventions=None, effects=None, direct_effects=None)
    assert pass_counts(arm) == PassCounts(0, 0, 0, 0)
    assert len(effect_of(arm)) == len(direct_effect_of(arm)) == 0
    assert len(condition_similarities(arm, "steered")[0]) == 0


def test_steered_minus_placebo_pairs_texts_with_the_deciding_placebo(tiny_arm):
    rows = [
        (3, 0, 0, "steered", 0.9),
        (3, 0, 0, "matched", 0.4),
        (3, 0, 0, "random", 0.1),
        (3, 0, 1, "steered", 0.5),  # its placebo has no similarity
        (3, 0, 1, "matched", np.nan),
        (5, 1, 0, "steered", 0.2),
        (5, 1, 0, "matched", 0.3),
    ]
    trials = pd.DataFrame(rows, columns=["feature", "prompt", "sample", "condition", "similarity"])
    arm = replace(tiny_arm(), interventions=trials.assign(dose=0.4))

    def against(placebo, arm=arm):
        return steered_minus_placebo(replace(arm, effects=arm.effects.assign(placebo=placebo)))

    found = against("matched")
    assert found.index.tolist() == [(3, 0, 0), (5, 1, 0)]
    np.testing.assert_allclose(found, [0.5, -0.1])
    np.testing.assert_allclose(against("random"), [0.8])
    # The placebo of the test was not run for any feature: another one does not step in for it.
    assert against("matched", replace(arm, interventions=arm.interventions.query("condition != 'matched'"))).empty
    assert steered_minus_placebo(replace(arm, effects=None)).empty


def test_direct_effects_are_beyond_the_deciding_placebo(tiny_arm):
    arm = tiny_arm()
    assert not len(direct_effect_of(replace(arm, effects=arm.effects.assign(placebo="matched"))))
