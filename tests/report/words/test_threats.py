"""Each threat is found where it should be, and as serious as it is."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from saeffect.comparison import PRIMARY, Comparison
from saeffect.comparison.arms import roles_of
from saeffect.report.words.threats import SEVERITIES, threat_table, threats
from synthetic_matches import synthetic_matches
from synthetic_seeds import synthetic_seeds
from synthetic_study import compared, synthetic_arms


@pytest.fixture(scope="module")
def arms():
    return synthetic_arms(n_features=120, max_tested=10)


@pytest.fixture(scope="module")
def comparison(arms) -> Comparison:
    return compared(arms)


def found(comparison, arms) -> pd.DataFrame:
    """The threats that are read off these arms, beside the tables of a comparison."""
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    return checked(threat_table(threats(arms, roles, comparison, PRIMARY)))


def checked(table: pd.DataFrame) -> pd.DataFrame:
    ranks = [SEVERITIES.index(severity) for severity in table["severity"]]
    assert ranks == sorted(ranks)
    assert (table[["threat", "remedy", "source"]].map(len) > 0).all(axis=None)
    return table.assign(threat=table["threat"].str.replace("\u202f", " "))


def severity_of(table, words):
    rows = table[table["threat"].str.contains(words, regex=False)]
    assert len(rows) == 1, words
    return rows["severity"].iloc[0]


def with_facts(arm, **facts):
    return replace(arm, facts=replace(arm.facts, **facts))


def test_a_fair_study_has_no_serious_threat(comparison):
    assert comparison.answer["caveats"] == comparison.threats["threat"].tolist()
    table = checked(comparison.threats)
    assert "serious" not in set(table["severity"])
    # control and placebo, and one SAE of the treatment: t with one degree of freedom times the root of 3 / 2
    assert severity_of(table, "more than 15.6 standard deviations of such SAEs") == "moderate"
    assert severity_of(table, "2 SAEs of the control's model, one SAE of the treatment's") == "moderate"
    assert severity_of(table, "of such intervals, about one in twenty") == "minor"
    for words in ("Features are matched", "of the variance", "undefined in", "know few", "The text has only"):
        assert not table["threat"].str.contains(words).any(), words


def test_a_flaw_and_a_missing_placebo_are_serious(arms):
    table = checked(compared({"control": arms["control"], "treatment": with_facts(arms["treatment"], d_sae=9)}).threats)
    assert severity_of(table, "Design flaw (d_sae)") == "serious"
    assert severity_of(table, "There is no placebo arm") == "serious"
    assert severity_of(table, "Nobody knows how often these tests find something") == "moderate"
    assert "role: placebo" in " ".join(table["remedy"])


def test_one_sae_for_both_models_needs_no_placebo(arms):
    table = checked(
        compared({"control": arms["control"], "treatment": with_facts(arms["treatment"], same_sae=True)}).threats
    )
    assert severity_of(table, "One SAE reads both models") == "moderate"
    assert not table["threat"].str.contains("There is no placebo arm").any()


@pytest.mark.parametrize(
    ("facts", "words", "severity"),
    [
        ({"explained_variance": 0.65}, "control's SAE reproduces 65.0 % of the variance", "moderate"),
        ({"explained_variance": 0.4}, "control's SAE reproduces 40.0 % of the variance", "serious"),
        ({"explained_variance": float("nan")}, "reproduces an undefined share of the variance", "serious"),
        ({"ce_loss_score": 0.85}, "control's SAE keeps 85.0 % of its model's predictive power", "moderate"),
        ({"dead_share": 0.3}, "never fired on the study's text (30.0 % in control)", "moderate"),
    ],
)
def test_severity_of_a_poor_sae(comparison, arms, facts, words, severity):
    assert severity_of(found(comparison, {**arms, "control": with_facts(arms["control"], **facts)}), words) == severity


def test_matching_brings_threats_of_its_own(comparison, arms):
    table = found(replace(comparison, matches=synthetic_matches()), arms)
    assert severity_of(table, "Features are matched on the study's text") == "minor"
    assert severity_of(table, "has no placebo here") == "moderate"
    judged = replace(synthetic_matches(), cross_activity=synthetic_matches().cross_activity.assign(q_nulls=0.01))
    table = found(replace(comparison, matches=judged), arms)
    assert not table["threat"].str.contains("has no placebo here").any()


def test_several_saes_leave_only_steering_without_seeds(arms):
    several = synthetic_seeds(arms, n_features=120)
    table = checked(compared({name: arm for name, arm in several.items() if name != "placebo"}).threats)
    assert not table["threat"].str.contains("There is no placebo arm").any()  # further SAEs stand in for one
    rows = checked(compared(several).threats)["threat"]
    rows = rows[rows.str.contains("Few SAEs show")]
    assert len(rows) == 1
    assert "a change of the pass rate is credited" in rows.iloc[0]


@pytest.mark.parametrize(("share", "severity"), [(0.05, "minor"), (0.15, "moderate"), (0.5, "serious")])
def test_texts_without_a_similarity_are_a_threat(comparison, arms, share, severity):
    trials = arms["control"].interventions.copy()
    trials.loc[trials.index[: round(share * len(trials))], "similarity"] = float("nan")
    broken = {**arms, "control": replace(arms["control"], interventions=trials)}
    assert severity_of(found(comparison, broken), f"{100 * share:.1f} % of texts in control") == severity


def test_an_untested_arm_says_why(arms):
    why = "no dose of the search made texts more similar"
    bare = {
        name: replace(arm, interventions=None, effects=None, direct_effects=None, unsteered=why)
        for name, arm in arms.items()
    }
    untested = compared(bare)
    said = f"No feature of control, treatment and placebo was tested by steering: {why}."
    assert severity_of(untested.threats, said) == "moderate"
    assert untested.table1["reason"].tolist() == [why] * 3
    assert f"No feature was tested by steering ({why})" in " ".join(untested.answer["sentences"])
    assert f"No feature was steered ({why})" in untested.answer["paragraph"]


@pytest.mark.parametrize(("factors", "words"), [((1, 2), "at different doses (0.4 in control, 0.8 in treatment"),
                                                ((1, 1), "")])  # fmt: skip
def test_arms_steered_at_different_doses_are_a_serious_threat(comparison, arms, factors, words):
    steered = {
        name: replace(arm, interventions=arm.interventions.assign(dose=arm.interventions["dose"] * factor))
        for (name, arm), factor in zip(list(arms.items())[:2], factors, strict=True)
    }
    table = found(comparison, {**arms, **steered})
    assert severity_of(table, words) == "serious" if words else not table["threat"].str.contains("doses").any()


def test_low_coverage_of_word_vectors_is_a_threat(comparison, arms):
    def knowing(share):
        known = {name: (10 * share * (arm.coherence["n_known"] > -1)).astype(int) for name, arm in arms.items()}
        return {name: replace(arm, coherence=arm.coherence.assign(n_known=known[name])) for name, arm in arms.items()}

    table = found(comparison, knowing(0.4))
    assert severity_of(table, "know few of the features' top tokens (40.0 % in control, ") == "serious"
    assert table["remedy"].str.contains("features.tokens: latin", regex=False).any()
    assert not found(comparison, knowing(0.6))["threat"].str.contains("know few").any()


def test_a_text_shorter_than_asked_is_a_threat(comparison, arms):
    short = {name: replace(arm, text_shortage="40 of the 100 tokens") for name, arm in arms.items()}
    assert severity_of(found(comparison, short), "The text has only 40 of the 100 tokens") == "moderate"
