from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saeffect.errors import ShapeMismatch
from saeffect.steering import distinct_2, join_tokens, perplexity, similarity
from steering.tiny_model import OneHotWords


def test_similarity_by_hand():
    # Counts (2, 1) and (1, 0): cosine 2 / sqrt 5.
    assert similarity("w3 w3 w4", "w3", OneHotWords()).value == pytest.approx(2 / math.sqrt(5))
    assert similarity("w4", "w3", OneHotWords()).value == 0


def test_undefined_similarity_says_which_side():
    of_text, of_reference = similarity("?", "w3", OneHotWords()), similarity("w3", "?", OneHotWords())
    assert math.isnan(of_text.value)
    assert "generated text" in of_text.reason
    assert math.isnan(of_reference.value)
    assert "top tokens" in of_reference.reason
    assert similarity("w3", "w3", OneHotWords()).reason == ""


def test_a_zero_vector_has_no_direction():
    class Zeros:
        def mean_vector(self, text: str) -> np.ndarray:
            return np.zeros(3)

    assert "no direction" in similarity("a", "b", Zeros()).reason


def test_join_tokens_accepts_both_notations():
    assert join_tokens(["Ġtreatment", " drug", "▁dose", "\n", "ing"]) == "treatment drug dose  ing"


def test_distinct_2():
    assert distinct_2([1, 2, 3, 4]) == 1
    assert distinct_2([1, 1, 1, 1, 1]) == 0.25
    assert math.isnan(distinct_2([1]))
    assert math.isnan(distinct_2([]))


def test_perplexity_of_ragged_rows_equals_one_by_one(lm):
    prompt, texts = [5, 9], [[7, 8, 9], [], [11], [12, 13, 14, 15]]
    got = perplexity(lm, prompt, texts, batch_size=2)
    for ids, value in zip(texts, got, strict=True):
        if not ids:
            assert math.isnan(value)
            continue
        with torch.no_grad():
            log_p = lm.model(input_ids=torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        surprise = [-log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)]
        assert value == pytest.approx(math.exp(sum(surprise) / len(ids)), rel=1e-5)
    with pytest.raises(ShapeMismatch):
        perplexity(lm, [], texts)
