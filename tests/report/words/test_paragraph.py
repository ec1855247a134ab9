from __future__ import annotations

import re
from dataclasses import replace

import pytest

from synthetic_matches import synthetic_matches
from synthetic_study import compared, synthetic_arms


@pytest.fixture(scope="module")
def arms():
    return synthetic_arms(n_features=120, max_tested=10)


def answered(arms, **more):
    comparison = compared(arms, **more)
    answer = comparison.answer
    text = answer["paragraph"]
    assert "nan" not in text
    assert "significant" not in text
    assert text.endswith(".")
    assert len([word for word in text.split() if any(sign.isalnum() for sign in word)]) <= 110
    for trace in answer["traces"]:
        assert text[trace["start"] :].startswith(trace["text"])
    return comparison


@pytest.fixture(scope="module")
def found(arms):
    return answered(arms, matches=synthetic_matches())


@pytest.fixture(scope="module")
def uncalled(arms) -> str:
    """The paragraph where no single feature stands out."""
    return paragraph(arms, matches=synthetic_matches(called=False))


def paragraph(arms, **more):
    return answered(arms, **more).answer["paragraph"].replace("\u202f", " ")


def test_what_changed_how_much_how_sure_and_beside_what(arms, found):
    text = found.answer["paragraph"].replace("\u202f", " ")
    before, after = (100 * len(arms[name].domain) / 120 for name in ("control", "treatment"))
    assert text.startswith(
        f"Domain features make up {before:.1f} % of the SAE before fine-tuning and {after:.1f} % after"
    )
    assert "percentage points, 95 % interval [" in text
    assert re.search(r"retraining the unchanged model's SAE gives \S+ \[[^]]+\] \(placebo\)\.", text)
    assert re.search(r"Steered, \S+ % of features pass against random directions before and \S+ % after \(", text)
    assert "50.0 % of domain features fire more afterwards (others: 2.8 %), most changed: 0 (" in text
    assert "; 2.0×)" in text
    # by decoder cosine alone: 1 moved, 2 gone, 1 absorbed, 3 new
    assert "7 features are gone, moved or new beyond SAE noise." in text


def test_paragraph_without_a_change_has_about_ninety_words(uncalled):
    assert len([word for word in uncalled.split() if any(sign.isalnum() for sign in word)]) <= 100
    assert "No single feature is gone, moved or new beyond SAE noise." in uncalled


def test_every_number_names_the_row_it_was_read_off(found):
    comparison, text, traces = found, found.answer["paragraph"], found.answer["traces"]
    rest = text
    for trace in reversed(traces):
        rest = rest[: trace["start"]] + rest[trace["start"] + len(trace["text"]) :]
    assert re.findall(r"\d+", rest) == []  # no number without a row
    rows = comparison.contrasts.set_index(["quantity", "comparison"])
    row = rows.loc[("domain_share", "fine-tuning")]
    shown = [trace["text"] for trace in traces if trace["row"].get("quantity") == "domain_share"]
    assert shown[0] == f"{100 * row['value_a']:.1f}\u202f%"
    assert shown[1] == f"{100 * row['value_b']:.1f}\u202f%"
    assert {trace["table"] for trace in traces} == {"contrasts", "cross_activity", "fate_counts"}
    features = {trace["row"]["feature"] for trace in traces if "feature" in trace["row"]}
    assert features <= set(comparison.matches.cross_activity["feature"])


def test_without_placebo_nothing_is_credited(arms):
    text = paragraph(
        {name: arm for name, arm in arms.items() if name != "placebo"}, matches=synthetic_matches(placebo=False)
    )
    assert "there is no placebo arm to show what retraining the SAE alone gives" in text
    assert "beyond SAE noise" not in text
    assert "serious threat" in text


def test_steering_has_its_say_where_it_was_not_declared(arms):
    matched = {name: replace(arm, effects=arm.effects.assign(placebo="matched")) for name, arm in arms.items()}
    text = paragraph(matched, tests=("coherence_mean",))
    assert text.startswith("The mean coherence of domain features is")
    assert "of features pass against matched placebos" in text
    assert ", not declared beforehand)." in text


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
    assert " pass " not in text
    assert "0.0 % of the SAE before fine-tuning" in text
    assert "No feature was steered, so what the features cause is not known." in text


def test_a_pair_that_tests_nothing_is_not_passed_over(arms):
    nothing = {name: replace(arm, effects=arm.effects.head(1).assign(p=float("nan"))) for name, arm in arms.items()}
    assert "No steered feature could be tested, so what the features cause is not known." in paragraph(nothing)
