from __future__ import annotations

import math

import pandas as pd
import pytest

from saeffect.review.agreement import agreement, disagreements, rater_summary

VERDICT = {"y": "yes", "n": "no", "u": "unsure"}


def verdicts(**said: str) -> pd.DataFrame:
    """A letter a feature of the control, a dot where the rater said nothing."""
    rows = [
        ("control", feature, rater, VERDICT[letter], "feature")
        for rater, letters in said.items()
        for feature, letter in enumerate(letters)
        if letter != "."
    ]
    return pd.DataFrame(rows, columns=["arm", "feature", "rater", "verdict", "kind"])


def test_two_raters_by_hand() -> None:
    # 3 of 4 alike; by chance (1 * 2 + 3 * 2) / 16 = 1 / 2 (Cohen), (9 + 25) / 64 (Fleiss).
    table = agreement(verdicts(ann="ynnn", ben="yynn"), n_boot=200).set_index("measure")
    assert table["value"].to_dict() == pytest.approx(
        {"percentage": 0.75, "Fleiss' kappa": (0.75 - 34 / 64) / (1 - 34 / 64), "alpha": 8 / 15, "Cohen's kappa": 0.5}
    )
    assert table.loc["percentage", ["low", "high"]].tolist() == [0.25, 1.0]
    assert (table["n"] == 4).all()
    assert table.loc["Cohen's kappa", ["a", "b"]].tolist() == ["ann", "ben"]


def test_n_counts_features_that_all_compared_raters_judged() -> None:
    table = agreement(verdicts(ann="yynnyynn", ben="yynnyn..", cy="....yynn"), n_boot=200)
    n = {(row.measure, row.a, row.b): row.n for row in table.itertuples()}
    assert n["Fleiss' kappa", "", ""] == 2
    assert n["alpha", "", ""] == n["percentage", "", ""] == 8
    assert n["Cohen's kappa", "ann", "ben"] == 6
    assert n["Cohen's kappa", "ben", "cy"] == 2
    assert len(table) == 3 + 3 * 2


def test_no_rows_for_one_rater_no_interval_for_perfect_agreement() -> None:
    assert agreement(verdicts(ann="yn")).empty
    assert agreement(verdicts()).empty
    table = agreement(verdicts(ann="ynyn", ben="ynyn"), n_boot=100)
    assert (table["value"] == 1).all() and table["low"].isna().all()
    assert table["reason"].str.contains("agree on everything").all()


def test_false_positive_rates_by_hand() -> None:
    said = verdicts(ann="yyunyn", ben="nnnn..")
    said.loc[(said["rater"] == "ann") & (said["feature"] == 5), "kind"] = "shuffled"
    table = rater_summary(said, {("control", 0), ("control", 1), ("control", 2)}).set_index("rater")
    ann = table.loc["ann"]
    assert (ann["judged"], ann["n_yes"], ann["n_no"], ann["n_unsure"]) == (3, 2, 0, 1)
    assert (ann["other_judged"], ann["other_yes"], ann["other_rate"]) == (2, 1, 0.5)
    assert (ann["shuffled_judged"], ann["shuffled_rate"]) == (1, 0.0)
    assert 0 < ann["shuffled_high"] < 1  # Wilson's: one decoy says little
    assert math.isnan(table.loc["ben", "shuffled_rate"])


def test_verdicts_that_are_not_blind_are_left_out_of_agreement() -> None:
    said = verdicts(ann="ynyn", ben="ynny").assign(blind=True)
    said.loc[(said["rater"] == "ben") & (said["feature"] > 1), "blind"] = False
    assert agreement(said, n_boot=100).set_index("measure").loc["Cohen's kappa", "n"] == 2
    table = rater_summary(said, {("control", 0), ("control", 3)}).set_index("rater")
    assert table["n_not_blind"].to_dict() == {"ann": 0, "ben": 1}


def test_disagreements_list_ties_first() -> None:
    said = verdicts(ann="yyyuuy", ben="ynnuyy", cy="yyy...")
    decided = pd.DataFrame({"arm": ["control"], "feature": [2], "verdict": ["no"]})
    table = disagreements(said, decided)
    assert table[["feature", "n_yes", "n_no", "n_unsure", "decided"]].to_numpy().tolist() == [
        [3, 0, 0, 2, ""],
        [1, 2, 1, 0, ""],
        [2, 2, 1, 0, "no"],
    ]
    assert disagreements(said.iloc[:0], decided.iloc[:0]).empty
