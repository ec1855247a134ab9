"""One list of quantities, and a new one from outside the package."""

from __future__ import annotations

import pytest

from saeffect.comparison import compare
from saeffect.comparison.quantities import QUANTITIES, Quantity, add_quantity, declarable, sae_value, wording
from saeffect.errors import ConfigError, UnknownName
from synthetic_study import synthetic_arms

SILENT = Quantity(
    name="silent_share",
    label="Share of features that never fire",
    unit="share",
    kind="share",
    read=lambda arm, _: (int((arm.features["density"] == 0).sum()), arm.n_features),
)


@pytest.fixture
def silent():
    add_quantity(SILENT)
    yield SILENT
    del QUANTITIES["silent_share"]


def test_a_quantity_from_outside_is_compared_judged_and_declared(silent):
    arms = synthetic_arms(n_features=60, max_tested=4)
    options = {"min_matches": 2, "alpha": 0.05, "seed": 0, "n_boot": 40, "n_permutations": 20}
    found = compare(arms, tests=("silent_share",), **options)
    rows = found.contrasts[found.contrasts["quantity"].str.startswith("silent_share")]
    assert set(rows["quantity"]) == {"silent_share", "silent_share_ratio", "silent_share_seeds"}
    assert found.judgements.set_index("quantity").loc["silent_share", "declared"]
    assert found.power.set_index("test").loc["silent_share", "method"].startswith("two-sided test of proportions")
    assert "silent_share" in set(found.calibration["test"])
    assert wording("silent_share").larger == "the silent share is larger"


def test_a_name_is_taken_once(silent):
    with pytest.raises(ConfigError, match="there is a quantity 'silent_share' already"):
        add_quantity(SILENT)


def test_without_it_the_study_is_refused():
    with pytest.raises(UnknownName, match="silent_share"):
        compare({}, min_matches=2, alpha=0.05, seed=0, tests=("silent_share",))


def test_what_can_be_declared():
    assert declarable()[:3] == ("domain_share", "share_dot", "share_cosine")
    assert {"weight_mean_change", "coherence_delta", "fates", "cross_activity"} < set(declarable())
    assert not any(name.endswith("_ratio") for name in declarable())


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("domain_share", 3 / 5),
        ("share_dot", 1 / 5),
        ("share_cosine", 4 / 5),
        ("pass_rate", 1 / 2),
        ("paper_pass_rate", 1.0),
        ("coherence_mean", 0.3),
        ("coherence_median", 0.3),
        ("weight_mean", 3.0),
        ("weight_variance", 2.0),
        ("matches_mean", 8 / 5),
        ("effect", 0.2),
        ("direct_effect", 1.5),
        ("density", 0.04 / 3),
        ("mean_activation", 3.0),
    ],
)
def test_the_value_of_one_sae_by_hand(tiny_arm, quantity, value):
    assert sae_value(quantity, tiny_arm(), 2) == pytest.approx(value)


@pytest.mark.parametrize("quantity", ["coherence_delta", "coherence_normalised", "weight_mean_change", "no such"])
def test_what_one_sae_does_not_have_is_nan(tiny_arm, quantity):
    assert sae_value(quantity, tiny_arm(), 2) != sae_value(quantity, tiny_arm(), 2)
