from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeffect.lm.tokens import normalise_token, printable_token


@pytest.mark.parametrize(
    "token", ["cancer", "ĠCancer", "▁cancer", " CANCER", "\n\tcancer \r\n", "ĠĠ▁ cancer", "\u00a0cancer"]
)
def test_notations_of_one_word_agree(token: str) -> None:
    assert normalise_token(token) == "cancer"


@pytest.mark.parametrize(
    ("token", "word"), [("", ""), ("Ġ", ""), ("   ", ""), ("aĠb", "aĠb".lower()), ("Ġ<SCRIPT>", "<script>")]
)
def test_only_the_ends_are_stripped(token: str, word: str) -> None:
    assert normalise_token(token) == word


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("Ġtumor", " tumor"),
        ("▁tumor", " tumor"),
        (" tumor", " tumor"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x00", "U+0000"),
        ("\x1b[31m", "U+001B[31m"),
        ("\u202eevil\u2066", "U+202EevilU+2066"),
        ("\u200b\u200d\ufeff\u00ad", "U+200BU+200DU+FEFFU+00AD"),
        ("\u00a0\u2003\u3000", "U+00A0U+2003U+3000"),
        ("\u2028", "U+2028"),
        ("\ud800", "U+D800"),
        ("\U000e0041", "U+E0041"),
        ("\ufe0f\u3164\u2800", "U+FE0FU+3164U+2800"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("=SUM(A1)", "=SUM(A1)"),
        ("\ufffd", "\ufffd"),
        ("café 癌", "café 癌"),
    ],
)
def test_what_cannot_be_seen_is_named(token: str, shown: str) -> None:
    assert printable_token(token) == shown


@given(st.text(max_size=20))
def test_shown_text_never_hides_or_acts(token: str) -> None:
    shown = printable_token(token)
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert not [c for c in shown if unicodedata.category(c) in hidden]
    assert printable_token(shown.lstrip(" Ġ▁")) == shown.lstrip(" Ġ▁")
