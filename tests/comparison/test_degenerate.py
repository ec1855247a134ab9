"""Inputs that have no answer, through the whole comparison: NaN with a reason, and words that say what is unknown."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison import ArmTables, Comparison
from synthetic_study import compared, synthetic_arms

Arms = dict[str, ArmTables]


def each(arms: Arms, change) -> Arms:
    return {name: change(arm) for name, arm in arms.items()}


def only(arm: ArmTables, features: list[int]) -> ArmTables:
    """The arm with the domain features that are in `features`, and their trials, alone."""
    kept = arm.selection["is_domain"] & arm.selection["feature"].isin(features)

    def rows(table):
        return table[table["feature"].isin(features)].reset_index(drop=True)

    return replace(
        arm,
        selection=arm.selection.assign(is_domain=kept),
        interventions=rows(arm.interventions),
        direct_effects=rows(arm.direct_effects),
        effects=rows(arm.effects),
    )


def one_feature(arms: Arms) -> Arms:
    return each(arms, lambda arm: only(arm, [int(arm.domain[0])]))


def one_prompt(arms: Arms) -> Arms:
    """One prompt with one text: no feature has a p."""

    def cut(arm):
        first = (arm.interventions["prompt"] == 0) & (arm.interventions["sample"] == 0)
        nothing = dict.fromkeys(("effect", "effect_low", "effect_high", "p", "q"), np.nan)
        effects = arm.effects.assign(**nothing, n_pairs=1, passed=False, reason="fewer than two pairs")
        direct = arm.direct_effects[arm.direct_effects["prompt"] == 0]
        return replace(arm, interventions=arm.interventions[first], direct_effects=direct, effects=effects)

    return each(arms, cut)


def no_variance(arms: Arms) -> Arms:
    """Every SAE is the same SAE, and all its features are alike."""
    control = arms["control"]
    alike = replace(
        control,
        features=control.features.assign(density=0.1, mean_activation=1.0, decoder_norm=1.0),
        coherence=control.coherence.assign(coherence=0.5),
        effects=control.effects.assign(effect=0.1, passed=True),
    )
    return {name: replace(alike, name=name, role=arm.role, facts=arm.facts) for name, arm in arms.items()}


def all_ties(arms: Arms) -> Arms:
    """Each feature of an arm is the same as all others of it; arms differ a little."""

    def tied(arm, at):
        return replace(
            arm,
            selection=arm.selection.assign(is_domain=True, matches=2),
            coherence=arm.coherence.assign(coherence=at),
            features=arm.features.assign(density=at, mean_activation=at),
            effects=arm.effects.assign(effect=at),
        )

    return {name: tied(arm, 0.5 + 0.01 * i) for i, (name, arm) in enumerate(arms.items())}


def no_placebo(arms: Arms) -> Arms:
    return {name: arm for name, arm in arms.items() if arm.role != "placebo"}


def nothing_known(arms: Arms) -> Arms:
    """No coherence, no activity, nothing steered."""

    def bare(arm):
        features = arm.features.assign(density=0.0, mean_activation=np.nan, max_activation=0.0, n_active=0)
        coherence = arm.coherence.assign(coherence=np.nan)
        return replace(
            arm, features=features, coherence=coherence, interventions=None, direct_effects=None, effects=None
        )

    return each(arms, bare)


def no_domain(arms: Arms) -> Arms:
    return each(
        nothing_known(arms), lambda arm: replace(arm, selection=arm.selection.assign(is_domain=False, matches=0))
    )


CASES = (one_feature, one_prompt, no_variance, all_ties, no_placebo, nothing_known, no_domain)


@pytest.fixture(scope="module")
def found() -> dict[str, Comparison]:
    """Every case compared once, by its name."""
    arms = synthetic_arms(n_features=150, max_tested=4)
    return {case.__name__: compared(case(arms)) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_claims_and_a_reason_for_every_nan(found: dict[str, Comparison], case) -> None:
    comparison = found[case.__name__]
    table = comparison.contrasts
    missing = table[["estimate", "low", "high"]].isna().any(axis=1)
    assert (table.loc[missing, "reason"] != "").all(), table.loc[missing & (table["reason"] == ""), "quantity"].tolist()
    headline = comparison.answer["headline"]
    assert not headline.startswith(("Fine-tuning changed", "The treatment's features differ")), headline
    assert any(words in headline.lower() for words in ("cannot", "nothing can be said")), headline
    words = " ".join(
        [headline, comparison.answer["paragraph"], *comparison.answer["sentences"], *comparison.answer["caveats"]]
    )
    assert "nan" not in words.replace(",", " ").replace(".", " ").replace("(", " ").split()
    for name, column in (("regression", "estimate"), ("power", "detectable")):
        rows = getattr(comparison, name)
        unknown = rows[rows[column].isna()]
        assert (unknown["reason"] != "").all(), name
    judged = comparison.calibration[comparison.calibration["tests"] == 0]
    assert (judged["reason"] != "").all()


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (one_feature, "needs two features with a value in each arm"),
        (one_prompt, "No feature was tested by steering"),
        (no_placebo, "there is no placebo arm"),
        (nothing_known, "undefined in control, undefined in treatment"),
        (no_domain, "neither control nor treatment has a domain feature"),
        (no_variance, "neither a nor b varies"),
    ],
)
def test_the_words_say_what_cannot_be_concluded(found: dict[str, Comparison], case, said: str) -> None:
    answer = found[case.__name__].answer
    words = " ".join([answer["headline"], answer["paragraph"], *answer["sentences"], *answer["caveats"]])
    assert said.lower() in words.lower()


def test_every_table_of_every_case_can_be_written(found: dict[str, Comparison], tmp_path) -> None:
    for comparison in found.values():
        for field in fields(comparison):
            value = getattr(comparison, field.name)
            if isinstance(value, pd.DataFrame):
                value.to_parquet(tmp_path / "t.parquet")
                pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), value)
