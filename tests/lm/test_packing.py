from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm.corpora import interleave
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.tokens import separator_id

LETTERS = SimpleNamespace(
    encode=lambda text, add_special_tokens: [ord(letter) for letter in text],
    get_vocab=dict,
    eos_token_id=0,
    bos_token_id=1,
)


def _pack(texts: Iterable[str], context_size: int, bos: bool = False) -> Iterator[NDArray[np.int32]]:
    return LanguageModel(None, LETTERS, "letters", prepend_bos=bos).pack(texts, context_size)


def _packed(*texts: str, context_size: int, bos: bool = False) -> list[list[int]]:
    return [row.tolist() for row in _pack(texts, context_size, bos)]


def test_documents_are_joined_and_the_rest_dropped() -> None:
    a, b, c = 97, 98, 99
    assert _packed("ab", "c", "abc", context_size=3) == [[a, b, 0], [c, 0, a], [b, c, 0]]
    assert _packed("ab", "c", "abc", context_size=4) == [[a, b, 0, c], [0, a, b, c]]
    assert [len(row) for row in _packed("a" * 10, context_size=3)] == [3, 3, 3]
    assert next(_pack(["abc"], 2)).dtype == np.int32


def test_every_row_begins_with_one_bos() -> None:
    assert _packed("abcd", "ef", context_size=3, bos=True) == [[1, 97, 98], [1, 99, 100], [1, 0, 101], [1, 102, 0]]
    assert _packed("\x01abcd", context_size=3, bos=True) == [[1, 97, 98], [1, 99, 100]], "the text brings its own"


def test_texts_are_read_no_further_than_needed() -> None:
    read: list[str] = []

    def texts() -> Iterator[str]:
        for text in ("abc", "def", "ghi"):
            read.append(text)
            yield text

    next(_pack(texts(), 4))
    assert read == ["abc"]


@pytest.mark.parametrize(("texts", "tokens"), [(["ab"], 3), ([], 0)])
def test_too_little_text(texts: list[str], tokens: int) -> None:
    with pytest.raises(EmptySelection, match=f"has {tokens} tokens, fewer than one context of 8"):
        list(_pack(texts, 8))


def test_interleave_ends_with_the_first_stream() -> None:
    one, two = ([np.array([10 * s + i]) for i in range(n)] for s, n in ((0, 5), (1, 2)))
    taken = [(i, int(row[0])) for i, row in interleave(iter(one), iter(two))]
    assert taken == [(0, 0), (1, 10), (0, 1), (1, 11), (0, 2)]


@pytest.mark.parametrize(
    ("vocabulary", "named", "expected"),
    [
        ({"<|endoftext|>": 7}, {"eos_token_id": 2}, 7),
        ({"</s>": 2}, {"eos_token_id": 2}, 2),
        ({}, {"eos_token_id": None, "sep_token_id": 102}, 102),
    ],
)
def test_separator(vocabulary: dict[str, int], named: dict[str, int | None], expected: int) -> None:
    assert separator_id(SimpleNamespace(get_vocab=lambda: vocabulary, **named)) == expected


def test_tokenizer_without_a_separator() -> None:
    with pytest.raises(ConfigError, match="no end-of-text token"):
        separator_id(SimpleNamespace(get_vocab=dict, eos_token_id=None))
