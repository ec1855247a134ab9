"""What fine-tuning taught, in words."""

from __future__ import annotations

import math

import pandas as pd

from saeffect.report.words.learned import learned
from synthetic_changes import first_screen, synthetic_changes
from synthetic_where import where_tables


def test_the_domain_and_its_groups_are_named() -> None:
    said = learned(synthetic_changes(hostile="signs"), "medical", alpha=0.05)
    assert said.headline == (
        "Fine-tuning taught the model the domain medical: its 12 features changed more than in 20 fine-tunes of the same"
        " recipe that teach nothing new. The groups of features that changed most: “symptom, disease, signs” and"
        " “treatment, dose, pills” (less)."
    )
    parts = dict(said.parts)
    assert list(parts) == ["What changed", "How sure", "What did not change"]
    assert parts["What changed"].startswith("2 groups of features changed clearly more than groups do in nulls (p at")
    assert "15.0" in parts["What changed"]  # per cent of the change: 10 and 5
    assert "+2.50 on average; in 20 nulls it is −0.40 to +0.50 (p < 0.001;" in parts["How sure"]
    shown = "Of 2 kinds of evidence 1 shows this alone: text that both read; not text that they write."
    assert shown in parts["How sure"] and "about one in 20 would be said" in parts["How sure"]
    notes = " ".join(said.notes)
    assert "in 1 of 1 further SAE of the base model; with it, p < 0.001." in notes
    assert "no such SAE: treatment, trained with the fine-tuned model." in notes
    assert "less than 0.048" in notes  # 1 / 21
    assert "No other group of features" in parts["What did not change"]
    unmoved, moved = parts["What did not change"].replace("\u202f", " "), parts["What changed"].replace("\u202f", " ")
    assert "does not move clearly beyond nulls: from 20.0 to 19.8 on general text (−1.0 %; nulls: " in unmoved
    assert "wavers between, goes from 14.0 to 7.4 on medical text (−47.3 %; nulls: −4.9 % to +2.0 %)." in moved
    assert "Predictions on the text differ by 0.37 nats a token (KL; nulls: 0.05 to 0.14)." in moved
    assert said.missing == ""


def test_without_a_claim_nothing_is_named() -> None:
    said = learned(synthetic_changes(claimed=False), "medical", alpha=0.05)
    assert said.headline.startswith("Nothing that can be named changed")
    assert (
        "is not clearly beyond what null fine-tunes reach (p = 0.200, over 20 nulls)"
        in dict(said.parts)["What changed"]
    )
    assert dict(said.parts)["What did not change"].startswith("No group of features changed clearly more than in nulls")


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
    assert where.startswith("Of 6 layers, layer 5 changed most: what it hands on moved by 12.0 % of its length.")
    assert (
        "nulls" not in where + said.notes[0]
        and said.notes[0].startswith("On average over the text")
        and list(dict(said.parts)) == ["Where", "What it causes"]
    )


def test_where_and_what_it_causes_are_said() -> None:
    said = learned(first_screen(), "medical", alpha=0.05)
    parts = dict(said.parts)
    assert list(parts) == ["What changed", "How sure", "Where", "What it causes", "What did not change"]
    assert "Words it expects clearly more than nulls do: “fever”" in parts["Where"]
    assert (
        "at the hook move by 12.0 % of their length (nulls: 4.0 %; cosine between two halves of the text: 0.93), towards"
        " “Usually”, “fever”."
    ) in said.notes[0].replace("\u202f", " ")
    assert parts["What it causes"].startswith("The 20 features that changed most carry 41")
    assert "setting them back to the base model's values" in parts["What it causes"]


def test_a_layer_is_beyond_the_nulls_only_above_their_highest() -> None:
    """The layers of the tables move by 2 to 12 %, the nulls' by 1 to 3 %."""
    tables = first_screen()
    layers = tables["change_by_layer"]

    def where(**nulls: object) -> str:
        tables["change_by_layer"] = layers.assign(**nulls)
        return dict(learned(tables, "medical", alpha=0.05).parts)["Where"].replace("\u202f", " ").partition(". W")[0]

    far = "layer 5 is farthest beyond the nulls: what it hands on moved by 12.0 % of its length (nulls: 1.0 % to"
    assert where() == f"Of 6 layers, {far} 3.0 %)"
    assert where(null_high=0.12) == (
        "Of 6 layers, layer 5 changed most, compared with the nulls: what it hands on moved by 12.0 % of its length"
        " (nulls: 1.0 % to 12.0 %), and no layer moved farther than in nulls"
    )
    ratio = layers["ratio"].where(layers["layer"] != 0, 99.0)
    assert where(ratio=ratio).startswith(f"Of 6 layers, {far}"), "layer 0 is within the nulls, by any ratio"


def test_the_mean_difference_is_that_of_text_without_the_domain() -> None:
    tables = first_screen()
    whole = tables["activation_difference"]
    sources = [
        whole.assign(text=name, size=size, reliability=float("nan"))
        for name, size in (("general", 0.11), ("domain", 0.2))
    ]
    tables["activation_difference"] = pd.concat([whole, *sources], ignore_index=True)
    note = learned(tables, "medical", alpha=0.05).notes[0].replace("\u202f", " ")
    assert note.startswith("On average over general text, activations at the hook move by 11.0 % of their length")
    assert "cosine with that over text of the domain: 0.93)" in note


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
    assert "divided by how far" in said.notes[-1]
    same = learned(synthetic_changes() | {"null_recipe": recipe.head(1)}, "medical", alpha=0.05)
    assert "of the same recipe" in same.headline
    assert dict(same.parts)["How sure"] == dict(learned(synthetic_changes(), "medical", alpha=0.05).parts)["How sure"]


def test_a_domain_that_one_of_many_nulls_moved_as_far_is_not_claimed() -> None:
    tables = synthetic_changes()
    rows = (tables["declared_changes"]["name"] == "medical") & (tables["declared_changes"]["basis"] == "combined")
    z = float(tables["declared_changes"].loc[rows, "z"].iloc[0])
    assert learned(tables, "medical", alpha=0.05).headline.startswith("Fine-tuning taught the model the domain medical")
    tables["declared_changes"].loc[rows, "null_high"] = z + 0.5
    assert "domain medical" not in learned(tables, "medical", alpha=0.05).headline


def test_a_weaker_domain_is_told_beside_the_nulls() -> None:
    """z counts from the nulls: where they raise the domain, a fine-tune that leaves it alone has taken nothing."""
    tables = synthetic_changes()
    tables["declared_changes"]["z"] *= -1
    headline = learned(tables, "medical", alpha=0.05).headline
    assert headline.startswith("Fine-tuning left the domain medical weaker: its ")
    assert " are less active than in " in headline


def test_a_word_that_nulls_expect_more_is_not_one_that_nulls_expect_less() -> None:
    tables = first_screen() | where_tables() | synthetic_changes()
    fever = tables["change_by_word"]["token"] == " fever"
    tables["change_by_word"].loc[fever, "p_search"] = 0.01
    said = "expects clearly more than nulls do: “fever”"
    assert said in dict(learned(tables, "medical", alpha=0.05).parts)["Where"]
    tables["change_by_word"].loc[fever, ["null_low", "null_median", "null_high"]] = 1.6, 1.7, 1.8
    assert said not in dict(learned(tables, "medical", alpha=0.05).parts)["Where"]


def test_the_layer_farthest_beyond_its_own_nulls_is_named() -> None:
    tables = first_screen() | where_tables() | synthetic_changes()
    layers = tables["change_by_layer"]
    layers.loc[:, ["change", "null_low", "null_median", "null_high"]] = 0.01, 0.01, 0.02, 0.03
    layers.loc[0, ["change", "null_low", "null_median", "null_high"]] = 0.10, 0.01, 0.01, 0.09
    layers.loc[2, ["change", "null_low", "null_median", "null_high"]] = 0.30, 0.04, 0.045, 0.05
    layers["ratio"] = layers["change"] / layers["null_median"]
    assert "layer 2 is farthest" in dict(learned(tables, "medical", alpha=0.05).parts)["Where"]
    layers.loc[2, ["null_low", "null_median", "null_high", "ratio"]] = 0.0, 0.0, 0.0, math.nan
    assert "layer 2 is farthest" in dict(learned(tables, "medical", alpha=0.05).parts)["Where"]
