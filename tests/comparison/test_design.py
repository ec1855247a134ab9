from __future__ import annotations

from dataclasses import replace

import pytest

from saeffect.comparison import ArmFacts
from saeffect.comparison.design import design_check
from saeffect.errors import ConfigError

BASE = ArmFacts(
    role="control",
    model="toy",
    hook="blocks.3.hook_resid_pre",
    architecture="topk",
    d_sae=64,
    k=8,
    training_tokens=1000,
    training_text="mix",
    training_text_sha256="ab",
    seed=0,
    normalisation="none",
    dtype="float32",
    explained_variance=0.80,
    ce_loss_score=0.95,
    l0=8.0,
    dead_share=0.02,
)
FACTS = {
    "base": BASE,
    "tuned": replace(BASE, role="treatment", model="toy-tuned"),
    "again": replace(BASE, role="placebo", seed=1),
}


def checked(**changes):
    """Status and sentence of each field after changing the treatment's facts."""
    table = design_check({**FACTS, "tuned": replace(FACTS["tuned"], **changes)}).set_index("field")
    return table["status"], table["matters"]


def test_a_clean_design_has_no_flaw():
    table = design_check(FACTS).set_index("field")
    assert set(table["status"]) == {"same", "intended"}
    assert list(table.index[table["differs"]]) == ["role", "model", "seed"]
    assert list(table.columns) == ["base", "tuned", "again", "differs", "status", "matters"]
    assert "on purpose" in table.loc["seed", "matters"]
    assert "share a seed" in table.loc["seed", "matters"]


def test_treatment_equal_to_control_is_a_flaw():
    status, matters = checked(same_as_control=True)
    assert status["model"] == "flaw"
    assert "the same model" in matters["model"]
    assert checked(same_as_control=False)[0]["model"] == "intended"
    assert "same_as_control" not in status


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("d_sae", 128, "splits features"),
        ("hook", "blocks.4.hook_resid_pre", "places in a network"),
        ("training_tokens", 2000, "longer"),
        ("training_text_sha256", "cd", "different content"),
        ("explained_variance", 0.70, "differ by 0.1"),
        ("l0", 12.0, "differ by 4"),
    ],
)
def test_difference_besides_the_model_is_a_flaw(field, value, word):
    status, matters = checked(**{field: value})
    assert status[field] == "flaw"
    assert word in matters[field]
    assert (status.drop(field) != "flaw").all()


def test_measured_values_may_differ_a_little():
    status, _ = checked(explained_variance=0.81, ce_loss_score=0.94, l0=8.4, dead_share=0.04)
    assert list(status[["explained_variance", "ce_loss_score", "l0", "dead_share"]]) == ["small"] * 4


def test_what_nobody_recorded_is_unknown_not_equal():
    status, matters = checked(dtype=None, explained_variance=float("nan"))
    assert status["dtype"] == status["explained_variance"] == "unknown"
    assert "tuned" in matters["dtype"]


def test_an_sae_without_k_is_not_asked_for_it():
    table = design_check({name: replace(facts, k=None) for name, facts in FACTS.items()}).set_index("field")
    assert table.loc["k", "status"] == "same"


def test_placebo_needs_the_control_model_and_another_seed():
    for change, field in (({"model": "other"}, "model"), ({"seed": 0}, "seed")):
        table = design_check({**FACTS, "again": replace(FACTS["again"], **change)}).set_index("field")
        assert table.loc[field, "status"] == "flaw"
        assert "again" in table.loc[field, "matters"]


def test_the_same_model_in_both_arms_is_a_flaw():
    status, matters = checked(model="toy")
    assert status["model"] == "flaw"
    assert "same model" in matters["model"]


def test_seeds_of_treatment_and_control_may_differ():
    status, matters = checked(seed=5)
    assert status["seed"] == "intended"
    assert "fine" in matters["seed"]


def test_an_arm_named_like_a_column_is_refused():
    with pytest.raises(ConfigError, match="cannot be called 'status'"):
        design_check({"status": BASE, "tuned": FACTS["tuned"]})
