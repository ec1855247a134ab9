from __future__ import annotations

from dataclasses import replace

import pytest

from saeffect.comparison import compare
from synthetic_matches import synthetic_matches
from synthetic_study import synthetic_arms


@pytest.fixture(scope="module")
def arms():
    return synthetic_arms(n_features=120, max_tested=10)


def paragraph(arms, **more):
    comparison = compare(arms, min_matches=2, alpha=0.05, seed=0, n_boot=100, n_permutations=100, **more)
    text = comparison.answer["paragraph"]
    assert "nan" not in text
    assert "significant" not in text
    assert text.endswith(".")
    return text


def test_which_how_much_how_sure_and_beside_what(arms):
    text = paragraph(arms, matches=synthetic_matches())
    before, after = (100 * len(arms[name].domain) / 120 for name in ("control", "treatment"))
    assert f"is {before:.1f} % before fine-tuning (control) and {after:.1f} % after it (treatment)" in text
    assert "95 % interval" in text
    assert "another seed gives" in text
    assert "(placebo)" in text
    assert "5 of the 10 domain features of control's SAE fire more strongly" in text
    assert "50.0 % against 2.8 % of all others" in text
    assert "feature 0 (" in text
    assert "2.0×" in text
    # by both decoder cosine alone: 1 moved, 2 gone, 1 absorbed, 3 new
    assert "7 single features are gone, moved or new" in text
    assert "50.0 % of control's features have no counterpart" in text
    assert "38.3 % have none in another SAE of the same model either" in text


def test_nothing_called_is_said(arms):
    text = paragraph(arms, matches=synthetic_matches(called=False))
    assert "No single feature can be called gone, moved or new" in text


def test_without_placebo_nothing_is_credited(arms):
    text = paragraph(
        {name: arm for name, arm in arms.items() if name != "placebo"}, matches=synthetic_matches(placebo=False)
    )
    assert "There is no placebo arm" in text
    assert "more than SAE seeds alone show" not in text
    assert "counterpart" not in text
    assert "serious threat" in text


def test_a_flaw_takes_the_cause_away(arms):
    treatment = arms["treatment"]
    flawed = {**arms, "treatment": replace(treatment, facts=replace(treatment.facts, d_sae=999))}
    assert "The arms also differ in d_sae, so fine-tuning need not be the cause." in paragraph(flawed)


def test_without_domain_features_the_paragraph_says_why(arms):
    none = {
        name: replace(
            arm,
            selection=arm.selection.assign(is_domain=False),
            interventions=None,
            effects=None,
            direct_effects=None,
        )
        for name, arm in arms.items()
    }
    text = paragraph(none)
    assert "pass rate" not in text
    assert "0.0 % before fine-tuning" in text
