from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from saeffect.errors import ConfigError
from saeffect.lm.tokens import find_bos_id, resolve_prepend_bos, tokens_added_before

WORDS = {"a": 5, "the": 6, "1": 7}


def tokenizer(before: tuple[int, ...] = (), behind: tuple[int, ...] = (), named: int | None = None) -> Any:
    """One that puts ids before and behind a text, and calls one of them its `bos_token`."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids = [WORDS[word] for word in text.split()]
        return [*before, *ids, *behind] if add_special_tokens else ids

    return SimpleNamespace(encode=encode, bos_token_id=named, decode=lambda ids: f"<{ids}>")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (tokenizer((2,), named=2), 2),
        (tokenizer((2,), (1,), named=2), 2),  # an end of sequence behind is none of it
        (tokenizer((), (1,), named=2), None),
        (tokenizer(named=0), None),  # GPT-2 has the name and does not use it
        (tokenizer((9,)), 9),  # no such name, and a token in front all the same
        (None, None),
    ],
)
def test_what_a_tokenizer_puts_in_front_is_measured(made: Any, expected: int | None) -> None:
    assert find_bos_id(made, None) == expected
    assert tokens_added_before(made) == ([] if expected is None else [expected])
    assert find_bos_id(made, False) is None


def test_a_bos_that_the_tokenizer_does_not_use_by_itself_can_be_asked_for() -> None:
    assert find_bos_id(tokenizer(named=0), True) == 0
    assert find_bos_id(tokenizer((9,)), True) == 9


def test_a_bos_that_is_not_there_or_is_several(complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "the tokenizer has none", "bos: never"):
        find_bos_id(tokenizer(), True)
    with complains(ConfigError, "puts 2 tokens before a text", "bos: always"):
        find_bos_id(tokenizer((3, 4)), None)


def test_the_study_decides_then_the_saes_then_the_tokenizer(complains: Callable[..., Any]) -> None:
    words = {"control": True, "treatment": False, "placebo": None}
    assert resolve_prepend_bos("always", words) is True
    assert resolve_prepend_bos("never", words) is False
    assert resolve_prepend_bos("auto", {"control": False, "placebo": "true"}) is False
    assert resolve_prepend_bos("auto", {"control": None}) is None
    with complains(ConfigError, "in front: control; these on texts without: treatment", "bos: always or bos: never"):
        resolve_prepend_bos("auto", words)
