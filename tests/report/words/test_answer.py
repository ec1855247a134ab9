from __future__ import annotations

import json
from dataclasses import replace

import pytest

from synthetic_study import compared, synthetic_arms


@pytest.fixture(scope="module")
def arms():
    return synthetic_arms()


def answered(arms):
    answer = compared(arms).answer
    everything = " ".join([answer["headline"], *answer["sentences"], *answer["caveats"]])
    assert "significant" not in everything
    assert "nan" not in everything.split()
    assert 3 <= len(answer["sentences"]) <= 8
    return json.loads(json.dumps(answer).replace(r"\u202f", " "))


def unsteered(arm):
    return replace(arm, interventions=None, effects=None, direct_effects=None)


def test_a_planted_difference_is_reported_with_its_noise(arms):
    answer = answered(arms)
    assert answer["headline"].startswith("Fine-tuning changed the features by more than retraining the SAE does")
    assert "+10.0 percentage points, 95 % interval 5.0 to 15.0" in answer["headline"]
    assert "cannot be said of the pass rate or the mean coherence" in answer["headline"]
    counts, scales, share, *_ = answer["sentences"]
    assert "42 of 400 in control (10.5 %), 82 of 400 in treatment (20.5 %) and 43 of 400 in placebo" in counts
    assert "33 in control, 72 in treatment and 33 in placebo under the dot product" in scales
    assert "Retraining the SAE alone gives +0.3" in share


def test_without_placebo_nothing_is_credited_to_fine_tuning(arms):
    answer = answered({name: arm for name, arm in arms.items() if name != "placebo"})
    assert "without a placebo arm we cannot tell fine-tuning from SAE noise" in answer["headline"]
    assert answer["caveats"][0].startswith("There is no placebo arm")


def test_an_interval_with_zero_says_we_cannot_tell(arms):
    twin = replace(arms["control"], name="treatment", role="treatment", facts=arms["treatment"].facts)
    answer = answered({**arms, "treatment": twin})
    assert answer["headline"] == (
        "We cannot tell whether fine-tuning changed the share of domain features, pass rate and mean coherence: "
        "the 95 % intervals of the changes include zero."
    )


def test_noise_as_large_as_the_change_is_not_credited(arms):
    twin = replace(arms["treatment"], name="placebo", role="placebo", facts=arms["placebo"].facts)
    answer = answered({**arms, "placebo": twin})
    assert answer["headline"].startswith("We cannot credit fine-tuning with a change")


def test_no_tested_features_is_said(arms):
    answer = answered({name: unsteered(arm) for name, arm in arms.items()})
    assert any(line.startswith("No feature was tested by steering") for line in answer["sentences"])
    assert any("No feature of control, treatment and placebo was tested" in line for line in answer["caveats"])


def test_one_untested_arm_makes_the_pass_rate_incomparable(arms):
    answer = answered({**arms, "treatment": unsteered(arms["treatment"])})
    passes = answer["sentences"][3]
    assert "None was tested in treatment" in passes
    assert "cannot be compared: no feature of treatment was steered" in passes


def test_no_domain_features_at_all(arms):
    empty = {
        name: replace(unsteered(arm), selection=arm.selection.assign(is_domain=False, matches=0))
        for name, arm in arms.items()
    }
    answer = answered(empty)
    assert "neither control nor treatment has a domain feature" in answer["headline"]
    assert "undefined in control" in answer["sentences"][4]


def test_an_undefined_coherence_is_left_out_and_counted(arms):
    control = arms["control"]
    answer = answered({**arms, "control": replace(control, coherence=control.coherence.assign(coherence=float("nan")))})
    assert "undefined in control" in answer["sentences"][4]
    assert "cannot be compared: needs two features with a value in each arm: control has 0" in answer["sentences"][4]
    assert any("42 in control" in line for line in answer["caveats"] if "undefined" in line)


def test_a_flawed_design_takes_the_cause_away(arms):
    treatment = arms["treatment"]
    answer = answered({**arms, "treatment": replace(treatment, facts=replace(treatment.facts, d_sae=800))})
    assert not answer["headline"].startswith("Fine-tuning changed")
    assert "the design is flawed (d_sae), so fine-tuning need not be the cause" in answer["headline"]
    assert answer["caveats"][0].startswith("Design flaw (d_sae).")


def test_missing_verdicts_and_other_doses_are_caveats(arms):
    def unjudged(arm):
        return replace(arm, selection=arm.selection.assign(n_yes=0, n_no=0, n_unsure=0))

    bare = {name: unjudged(arm) for name, arm in arms.items()}
    steered = bare["treatment"].interventions
    bare["treatment"] = replace(bare["treatment"], interventions=steered.assign(dose=steered["dose"] * 2))
    caveats = " ".join(answered(bare)["caveats"])
    assert "No person has judged the features" in caveats
    assert "different doses (0.4 in control, 0.8 in treatment and 0.4 in placebo)" in caveats


def test_a_placebo_that_equals_the_control_shows_no_noise(arms):
    """As when none of the features passes in either: that is not the noise of no difference."""
    twin = replace(arms["control"], name="placebo", role="placebo", facts=arms["placebo"].facts)
    answer = answered({**arms, "placebo": twin})
    assert answer["headline"].startswith("Control and treatment differ in the share of domain features, but since the")
    assert "placebo shows no noise to compare with we cannot tell fine-tuning from SAE noise" in answer["headline"]
    assert "it equals the control here" in " ".join(answer["sentences"])
