"""The first findings, on a trace made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from saeffect.diffing.trace import NEW_TOKENS, OPENINGS, SAMPLES, Trace
from saeffect.report.models_page import first_findings, is_same, more_expected, word_tokens

TOKENS = ["!", " the", " fever", " train", " x"]
PLAIN = np.ones(5, dtype=bool)


@pytest.fixture
def trace() -> Trace:
    texts = np.full((len(OPENINGS) * SAMPLES, NEW_TOKENS), 1, dtype=np.int32)
    tuned = np.full_like(texts, 2)
    openings = np.zeros(len(OPENINGS), dtype=np.float32)
    openings[5] = 1.0
    return Trace(
        "treatment",
        "here",
        # Feature 0 doubles, 1 halves, 2 stays; 3 fires too seldom to be told.
        read=np.array([[1, 1, 1, 1e-6], [2, 0.5, 1, 1], [0.1] * 3 + [0.001], [0.1] * 3 + [0.001]], dtype=np.float32),
        written=np.zeros((4, 4), dtype=np.float32),
        expected=np.array([[0.2, 0.5, 0.01, 0.2, 0.09], [0.1, 0.5, 0.2, 0.1, 0.1]], dtype=np.float32),
        positions=np.zeros((8, 2), dtype=np.float32),
        halves=np.zeros((2, 2), dtype=np.float32),
        kl=np.full((2, 8), 0.25, dtype=np.float32),
        layers=np.array([0.1, 0.4, 0.3], dtype=np.float32),
        texts=tuned,
        base_texts=texts,
        early=np.zeros((2, 7, 2), dtype=np.float32),
        openings=openings,
        numbers={"kl": 0.25, "n_tokens": 1_000, "loss_base_general": 1.0, "loss_tuned_general": 2.0, "norm": 1.0},
    )


def test_lines(trace: Trace) -> None:
    top = [[" fever", " cough", "s"], [" train"], [" the"], [" x"]]
    lines = first_findings(trace, TOKENS, PLAIN, top_tokens=top)
    assert lines[0] == "perplexity: 2.718 → 7.389 on general"
    assert lines[1] == (
        "predictions: KL 0.25 nats a token; the residual stream moves by 30 % of its length after the last block,"
        " most after block 1 (40 %)"
    )
    # 0.2 log 20 is the largest share; " x" has one letter, and "!" none.
    assert lines[2] == "words expected more often: fever (× 20)"
    assert lines[3] == "words expected less often: train (× 0.5)"
    assert lines[4] == "features that fire more: 0 (fever cough s: × 2)"
    assert lines[5] == "features that fire less: 1 (train: × 0.5)"
    assert lines[6].startswith("after 'The' the base model writes 'the the the")
    assert lines[7].strip().startswith("and the fine-tuned one 'fever fever")


def test_named_groups_come_in_place_of_raw_changes(trace: Trace) -> None:
    groups = pd.DataFrame(
        {
            "name": ["fever, cough", "train"],
            "direction": ["more", "less"],
            "n_features": [4, 2],
            "p": [0.01, 0.4],
            "claimed": [True, False],
        }
    )
    lines = first_findings(trace, TOKENS, PLAIN, top_tokens=[[" a"]] * 4, groups=groups)
    assert [line for line in lines if "feature" in line] == [
        "clearly more than in null fine-tunes: fever, cough (4 features; p = 0.010)"
    ]


def test_words_go_by_their_share_of_the_divergence(trace: Trace) -> None:
    words = word_tokens(TOKENS, PLAIN)
    assert words.tolist() == [False, True, True, True, False]
    assert more_expected(trace, PLAIN).tolist() == [2, 4]
    assert more_expected(trace, PLAIN, less=True).tolist() == [0, 3]
    assert more_expected(trace, words).tolist() == [2]


def test_the_same_model(trace: Trace) -> None:
    assert not is_same(trace)
    nothing = replace(trace, layers=np.zeros(3, dtype=np.float32), numbers=trace.numbers | {"kl": 0.0})
    assert is_same(nothing)
