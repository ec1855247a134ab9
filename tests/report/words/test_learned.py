"""What fine-tuning taught, in words."""

from __future__ import annotations

import pandas as pd

from saeffect.report.words.learned import learned
from synthetic_changes import first_screen, synthetic_changes
from synthetic_where import where_tables


def test_the_domain_and_its_groups_are_named() -> None:
    said = learned(synthetic_changes(hostile="signs"), "medical", alpha=0.05)
    assert said.headline == (
        "Fine-tuning taught the model the domain medical: its 12 features changed more than in 20 fine-tunes of the same"
        " recipe that teach nothing new, first of all those about “symptom, disease, signs” and “treatment, dose, pills”"
        " (less)."
    )
    parts = dict(said.parts)
    assert list(parts) == ["What changed", "How sure", "What did not change"]
    assert "3 features, p < 0.001" in parts["What changed"]
    assert "15.0" in parts["What changed"]  # per cent of the change: 10 and 5
    assert "+2.50 on average" in parts["How sure"]
    assert "nulls: −0.40 to +0.50" in parts["How sure"]
    assert "Of 2 bases 1 shows this alone: text that both read; not text that they write." in parts["How sure"]
    assert "in 1 of 1 further SAE of the base model; with it, p < 0.001." in parts["How sure"]
    assert "no such SAE: treatment, trained with the fine-tuned model." in parts["How sure"]
    assert "less than 0.048" in parts["How sure"]  # 1 / 21
    unmoved, moved = parts["What did not change"].replace("\u202f", " "), parts["What changed"].replace("\u202f", " ")
    assert "Perplexity does not move clearly beyond the nulls: from 20.0 to 19.8 on general text (−1.0 %; " in unmoved
    assert "Perplexity goes from 14.0 to 7.4 on medical text (−47.3 %; nulls: −4.9 % to +2.0 %)." in moved
    assert "Predictions on the text differ by 0.37 nats a token (KL; nulls: 0.05 to 0.14)." in moved
    assert said.missing == ""


def test_equal_p_are_said_once() -> None:
    tables = synthetic_changes()
    tables["change_groups"]["p"] = [0.0004, 0.0002, 0.4]
    parts = dict(learned(tables, "medical", alpha=0.05).parts)
    assert (
        "beyond all nulls, each with p < 0.001: “symptom, disease, </script>”, 3 features; “tr" in parts["What changed"]
    )


def test_without_a_claim_nothing_is_named() -> None:
    said = learned(synthetic_changes(claimed=False), "medical", alpha=0.05)
    assert said.headline.startswith("Nothing that can be named changed")
    assert (
        "is not clearly beyond what null fine-tunes reach (p = 0.200, over 20 nulls)"
        in dict(said.parts)["What changed"]
    )
    assert "would have been named had it changed" in dict(said.parts)["What did not change"]


def test_domain_is_not_named_without_combined_evidence() -> None:
    tables = synthetic_changes(hostile="signs")
    tables["evidence"].loc[tables["evidence"]["basis"] == "all", "p"] = 0.06
    assert learned(tables, "medical", alpha=0.05).headline.startswith("Fine-tuning changed features about")


def test_groups_without_the_domain_are_named_alone() -> None:
    said = learned(synthetic_changes(hostile="signs"), "law", alpha=0.05)
    assert said.headline.startswith("Fine-tuning changed features about “symptom, disease, signs”")


def test_without_nulls_the_study_says_what_is_missing() -> None:
    tables = synthetic_changes() | {"null_groups": pd.DataFrame({"null": [], "highest": [], "kl": []})}
    tables["changes"] = pd.DataFrame({"reason": ["no null fine-tunes: make 20"]})
    said = learned(tables, "medical", alpha=0.05)
    assert said.headline == ""
    assert said.parts == ()
    assert "no null fine-tunes: make 20" in said.missing
    assert learned({}, "medical", alpha=0.05).missing == ""
    without = first_screen() | where_tables(nulls=False) | tables
    said = learned(without, "medical", alpha=0.05)
    where = dict(said.parts)["Where"].replace("\u202f", " ")
    assert where.startswith("Farthest at layer 5, where the residual stream moved by 12.0 % of its length. On average")
    assert "nulls" not in where and list(dict(said.parts)) == ["Where", "What it causes"]


def test_where_and_what_it_causes_are_said() -> None:
    parts = dict(learned(first_screen(), "medical", alpha=0.05).parts)
    assert list(parts) == ["What changed", "How sure", "Where", "What it causes", "What did not change"]
    assert "Words expected more, beyond all nulls: “fever”" in parts["Where"]
    assert (
        "at the hook move by 12.0 % of their length (nulls: 4.0 %; cosine between two halves of the text: 0.93), towards"
        " “Usually”, “fever”."
    ) in parts["Where"].replace("\u202f", " ")
    assert parts["What it causes"].startswith("The 20 features that changed most carry 41")


def test_a_recipe_unlike_the_nulls_is_said() -> None:
    recipe = pd.DataFrame(
        {
            "setting": ["steps", "batch_size", "rank"],
            "tuned": ["130", "8", ""],
            "nulls": ["130", "2", "16"],
            "differs": pd.array([False, True, None], dtype="boolean"),
        }
    )
    said = learned(synthetic_changes() | {"null_recipe": recipe}, "medical", alpha=0.05)
    assert "20 fine-tunes that teach nothing new" in said.headline
    sure = dict(said.parts)["How sure"]
    assert "batch_size is 2 instead of 8" in sure and "steps" not in sure.split("batch_size")[1]
    assert "Whether the nulls share rank with the fine-tune is not recorded." in sure
    same = learned(synthetic_changes() | {"null_recipe": recipe.head(1)}, "medical", alpha=0.05)
    assert "of the same recipe" in same.headline
    assert dict(same.parts)["How sure"] == dict(learned(synthetic_changes(), "medical", alpha=0.05).parts)["How sure"]
