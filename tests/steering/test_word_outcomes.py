from __future__ import annotations

import math

import pytest

from saeffect.steering.word_outcomes import keyword_score, off_list_score, text_words

MEDICAL = frozenset({"cancer", "cardiac", "drug", "patient", "fever"})


def test_words_keep_their_insides_and_lose_their_case():
    assert text_words("Ärzte  don’t\nsay “X-ray”—ever_again!") == ["ärzte", "don't", "say", "x-ray", "ever", "again"]
    assert text_words("... 。 \x00 ") == []


@pytest.mark.parametrize(
    ("text", "top", "expected"),
    [
        ("cancer cancer drug walk", [" cancer"], 0.5),
        ("Cancer", ["Ġcancer", "▁Drug"], 1.0),
        ("a walk", [" cancer"], 0.0),
    ],
)
def test_keyword_score_by_hand(text, top, expected):
    assert keyword_score(text, top) == expected


def test_domain_words_beyond_the_features_own():
    text = "cancer drug fever walk"
    assert off_list_score(text, MEDICAL, []) == 0.75
    assert off_list_score(text, MEDICAL, [" cancer"]) == 0.5
    assert off_list_score(text, MEDICAL, [" cancer", " drug", " fever"]) == 0.0


def test_a_piece_of_a_word_that_was_put_in_proves_nothing():
    assert off_list_score("cardiac arrest", MEDICAL, [" cardi"]) == 0.0
    # two letters begin too many words to count as a piece of one
    assert off_list_score("cardiac arrest", MEDICAL, [" ca"]) == 0.5


@pytest.mark.parametrize("text", ["", " ", "!!", "\ufffd\ufffd"])
def test_a_text_without_words_has_no_score(text):
    assert math.isnan(keyword_score(text, [" drug"]))
    assert math.isnan(off_list_score(text, MEDICAL, [" drug"]))


def test_without_words_to_look_for_there_is_no_score():
    assert math.isnan(keyword_score("a drug", [" ", "!", ""]))
    assert math.isnan(off_list_score("a drug", frozenset(), [" drug"]))
