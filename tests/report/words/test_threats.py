from __future__ import annotations

from dataclasses import replace

import pytest

from saeffect.report.words.threat import SEVERITIES
from synthetic_matches import synthetic_matches
from synthetic_seeds import synthetic_seeds
from synthetic_study import compared, synthetic_arms


@pytest.fixture(scope="module")
def arms():
    return synthetic_arms(n_features=120, max_tested=10)


def found(arms, **more):
    comparison = compared(arms, **more)
    table = comparison.threats
    assert comparison.answer["caveats"] == table["threat"].tolist()
    ranks = [SEVERITIES.index(one) for one in table["severity"]]
    assert ranks == sorted(ranks)
    assert (table[["threat", "remedy", "source"]].map(len) > 0).all(axis=None)
    return table.assign(threat=table["threat"].str.replace("\u202f", " "))


def severity_of(table, words):
    rows = table[table["threat"].str.contains(words, regex=False)]
    assert len(rows) == 1, words
    return rows["severity"].iloc[0]


def with_facts(arm, **facts):
    return replace(arm, facts=replace(arm.facts, **facts))


def test_a_fair_study_has_no_serious_threat(arms):
    table = found(arms)
    assert "serious" not in set(table["severity"])
    # control and placebo, and one SAE of the treatment: t with one degree of freedom times the root of 3 / 2
    assert severity_of(table, "more than 15.6 standard deviations of such SAEs") == "moderate"
    assert severity_of(table, "2 SAEs of the control's model, one SAE of the treatment's") == "moderate"
    assert severity_of(table, "of such intervals, about one in twenty") == "minor"
    assert not table["threat"].str.contains("Features are matched").any()


def test_a_flaw_and_a_missing_placebo_are_serious(arms):
    flawed = {**arms, "treatment": with_facts(arms["treatment"], d_sae=999)}
    del flawed["placebo"]
    table = found(flawed)
    assert severity_of(table, "Design flaw (d_sae)") == "serious"
    assert severity_of(table, "There is no placebo arm") == "serious"
    assert severity_of(table, "Nobody knows how often these tests find something") == "moderate"
    assert "role: placebo" in " ".join(table["remedy"])


def test_a_poor_sae_is_told_by_how_poor_it_is(arms):
    def poor(value):
        return {name: with_facts(arm, explained_variance=value) for name, arm in arms.items()}

    assert severity_of(found(poor(0.65)), "reproduces 65.0 % of the variance") == "moderate"
    assert severity_of(found(poor(0.4)), "reproduces 40.0 % of the variance") == "serious"
    assert not found(poor(0.9))["threat"].str.contains("of the variance").any()
    dead = {**arms, "control": with_facts(arms["control"], dead_share=0.3)}
    assert severity_of(found(dead), "never fired on the study's text (30.0 % in control)") == "moderate"


def test_matching_brings_threats_of_its_own(arms):
    table = found(arms, matches=synthetic_matches())
    assert severity_of(table, "Features are matched on the study's text") == "minor"
    assert severity_of(table, "has no placebo here") == "moderate"


def test_with_several_saes_a_side_only_what_was_steered_lacks_seeds(arms):
    table = found(synthetic_seeds(arms, n_features=120))
    rows = table[table["threat"].str.contains("Few SAEs show")]
    assert len(rows) == 1
    assert "a change of the pass rate is credited" in rows["threat"].iloc[0]


def test_further_saes_stand_in_for_a_placebo_arm(arms):
    without = {name: arm for name, arm in synthetic_seeds(arms, n_features=120).items() if name != "placebo"}
    assert not found(without)["threat"].str.contains("There is no placebo arm").any()


@pytest.mark.parametrize(("share", "severity"), [(0.05, "minor"), (0.15, "moderate"), (0.5, "serious")])
def test_texts_without_a_similarity_are_a_threat(arms, share, severity):
    assert not found(arms)["threat"].str.contains("undefined in").any()
    trials = arms["control"].interventions.copy()
    trials.loc[trials.index[: round(share * len(trials))], "similarity"] = float("nan")
    broken = {**arms, "control": replace(arms["control"], interventions=trials)}
    assert severity_of(found(broken), f"{100 * share:.1f} % of texts in control") == severity


def test_an_untested_arm_says_why(arms):
    why = "no dose of the search made texts more similar"
    bare = {
        name: replace(arm, interventions=None, effects=None, direct_effects=None, unsteered=why)
        for name, arm in arms.items()
    }
    comparison = compared(bare)
    said = f"No feature of control, treatment and placebo was tested by steering: {why}."
    assert severity_of(comparison.threats, said) == "moderate"
    assert comparison.table1["reason"].tolist() == [why] * 3
    assert f"No feature was tested by steering ({why})" in " ".join(comparison.answer["sentences"])
    assert f"No feature was steered ({why})" in comparison.answer["paragraph"]


def test_an_undefined_fit_is_as_bad_as_the_worst(arms):
    table = found({**arms, "control": with_facts(arms["control"], explained_variance=float("nan"))})
    assert severity_of(table, "control's SAE reproduces an undefined share of the variance") == "serious"


def test_few_top_tokens_in_the_word_vectors_are_a_threat(arms):
    def knowing(share):
        known = {name: (10 * share * (arm.coherence["n_known"] > -1)).astype(int) for name, arm in arms.items()}
        return {name: replace(arm, coherence=arm.coherence.assign(n_known=known[name])) for name, arm in arms.items()}

    table = found(knowing(0.4))
    assert severity_of(table, "know few of the features' top tokens (40.0 % in control, ") == "serious"
    assert table["remedy"].str.contains("features.tokens: latin", regex=False).any()
    assert not found(knowing(0.6))["threat"].str.contains("know few").any()
