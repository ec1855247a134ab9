from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm.corpora import interleave
from saeffect.lm.language_model import pack, separator_id


def _letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def _packed(*texts: str, context_size: int) -> list[list[int]]:
    return [r.tolist() for r in pack(texts, _letters, context_size=context_size, separator=0)]


def test_documents_are_joined_by_the_separator_and_the_rest_is_dropped() -> None:
    a, b, c = 97, 98, 99
    assert _packed("ab", "c", "abc", context_size=3) == [[a, b, 0], [c, 0, a], [b, c, 0]]
    assert _packed("ab", "c", "abc", context_size=4) == [[a, b, 0, c], [0, a, b, c]]


def test_one_document_can_fill_several_rows() -> None:
    assert [len(r) for r in _packed("a" * 10, context_size=3)] == [3, 3, 3]


def test_rows_are_int32() -> None:
    assert next(pack(["abc"], _letters, context_size=2, separator=0)).dtype == np.int32


def test_texts_are_read_no_further_than_needed() -> None:
    read: list[str] = []

    def texts() -> Iterator[str]:
        for text in ("abc", "def", "ghi"):
            read.append(text)
            yield text

    next(pack(texts(), _letters, context_size=4, separator=0))
    assert read == ["abc"]


@pytest.mark.parametrize(("texts", "tokens"), [(["ab"], 3), ([], 0)])
def test_too_little_text(texts: list[str], tokens: int) -> None:
    with pytest.raises(EmptySelection, match=f"has {tokens} tokens, fewer than one context of 8"):
        list(pack(texts, _letters, context_size=8, separator=0))


def test_interleave_takes_turns_until_one_stream_ends() -> None:
    one, two = ([np.array([10 * s + i]) for i in range(n)] for s, n in ((0, 5), (1, 2)))
    assert [(i, int(r[0])) for i, r in interleave(iter(one), iter(two))] == [
        (0, 0),
        (1, 10),
        (0, 1),
        (1, 11),
        (0, 2),
    ]


@pytest.mark.parametrize(("vocabulary", "end", "expected"), [({"<|endoftext|>": 7}, 2, 7), ({"</s>": 2}, 2, 2)])
def test_separator(vocabulary: dict[str, int], end: int, expected: int) -> None:
    assert separator_id(SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=end)) == expected


def test_models_with_a_vocabulary_of_bert_are_separated_by_sep() -> None:
    assert separator_id(SimpleNamespace(get_vocab=dict, eos_token_id=None, sep_token_id=102)) == 102


def test_a_tokenizer_without_an_end() -> None:
    with pytest.raises(ConfigError, match="no end-of-text token"):
        separator_id(SimpleNamespace(get_vocab=dict, eos_token_id=None))


def test_every_row_begins_with_bos_and_no_token_of_text_is_lost() -> None:
    rows = [r.tolist() for r in pack(["abcd", "ef"], _letters, context_size=3, separator=0, bos=1)]
    assert rows == [[1, 97, 98], [1, 99, 100], [1, 0, 101], [1, 102, 0]]


def test_a_text_that_brings_its_own_bos_gets_no_second_one() -> None:
    rows = [r.tolist() for r in pack(["\x01abcd"], _letters, context_size=3, separator=0, bos=1)]
    assert rows == [[1, 97, 98], [1, 99, 100]]
