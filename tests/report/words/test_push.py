"""The sentence on what the mean activation difference makes the base model write."""

from __future__ import annotations

import pandas as pd
import pytest

from saeffect.report.words.causes import what_a_push_writes
from saeffect.report.words.learned import learned
from synthetic_changes import synthetic_changes
from synthetic_where import push_tables

START = "Pushed along the mean activation difference by 0.5 mean residual norms, the base model writes"


def said(words: pd.DataFrame) -> str:
    return what_a_push_writes(words, 0.05).replace("\u202f", " ")


def test_words_that_no_null_s_push_brings() -> None:
    words = push_tables()["difference_words"]
    assert said(words) == (
        f"{START} more often than along any null's: “fever” (in 50 % of texts; without a push 2 %, along nulls' at most"
        " 4 %) (p = 0.050, which counts the search)."
    )
    twice = pd.concat([words, words.assign(dose=1.0)], ignore_index=True)
    assert "by 0.5 and 1 mean residual norms" in said(twice)
    assert said(twice).count("fever") == 1


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        (
            {"p_search": 0.35},
            "no word clearly more often than along nulls'; the clearest is “fever” (in 50 % of texts; without a push 2 %,"
            " along nulls' at most 4 %) (p = 0.350).",
        ),
        (
            {"p_search": 0.35, "reason": "with 2 nulls no p is below 1/3"},
            "(p = 0.350; with 2 nulls no p is below 1/3).",
        ),
        ({"change": -1.0}, "no word more often than along those of nulls."),
    ],
)
def test_words_that_nulls_bring_too(changes: dict[str, object], end: str) -> None:
    text = said(push_tables()["difference_words"].assign(**changes))
    assert text.startswith(START) and text.endswith(end)


def test_a_null_that_brings_a_word_as_often_is_not_left_out() -> None:
    """With many nulls p allows for some that reach as much, of whose words the bracket tells."""
    words = push_tables()["difference_words"].assign(p_search=[0.05, 0.05])
    assert said(words.assign(null_high=[0.6, 0.1])).startswith(
        f"{START} clearly more often than along nulls': “fever” (in 50 % of texts; without a push 2 %, along nulls' at"
        " most 60 %), “of” (p"
    )
    assert "along any null" not in said(words.assign(null_high=[0.1, 0.4])), "as often, in a word behind the first"
    assert "along any null" in said(words.assign(null_high=[0.1, 0.3]))


def test_without_nulls_the_reason_stands_for_p() -> None:
    assert said(push_tables(nulls=False)["difference_words"]) == (
        f"{START} most of all “fever” (in 50 % of texts; without a push 2 %), “of”; whether pushes along nulls do so is"
        " not known (no null fine-tunes to compare with)."
    )
    assert said(pd.DataFrame()).endswith("the base model writes no word often enough to be compared.")


def test_it_stands_under_what_it_causes() -> None:
    parts = dict(learned(synthetic_changes() | push_tables(), "medical", alpha=0.05).parts)
    assert "“fever”" in parts["What it causes"] and parts["What it causes"].endswith("in [[table:pushed]].")
