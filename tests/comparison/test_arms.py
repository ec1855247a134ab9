from __future__ import annotations

from dataclasses import replace

import pytest

from saeffect.comparison import roles_of
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
