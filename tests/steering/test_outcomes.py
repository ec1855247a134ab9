"""What is measured on texts, and the registry of outcomes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.config import SteeringConfig
from saeffect.errors import UnknownName
from saeffect.steering import OUTCOMES, Outcome, check_names, effects, outcome_effects, outcome_named, score_texts
from saeffect.steering.outcomes import (
    distinct_2,
    join_tokens,
    keyword_score,
    off_list_score,
    perplexity,
    shuffled_references,
    similarity,
    text_words,
)
from steering.tiny_model import OneHotWords


def test_similarity_by_hand():
    # Counts (2, 1) and (1, 0): cosine 2 / sqrt 5.
    assert similarity("w3 w3 w4", "w3", OneHotWords()) == pytest.approx(2 / math.sqrt(5))
    assert similarity("w4", "w3", OneHotWords()) == 0


def test_a_similarity_without_vectors_or_directions_is_undefined():
    class Zeros:
        def mean_vector(self, text: str) -> np.ndarray:
            return np.zeros(3)

    assert math.isnan(similarity("?", "w3", OneHotWords()))
    assert math.isnan(similarity("w3", "?", OneHotWords()))
    assert math.isnan(similarity("a", "b", Zeros()))


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
    assert off_list_score(text, [], MEDICAL) == 0.75
    assert off_list_score(text, [" cancer"], MEDICAL) == 0.5
    assert off_list_score(text, [" cancer", " drug", " fever"], MEDICAL) == 0.0


def test_pieces_of_top_tokens_do_not_count():
    assert off_list_score("cardiac arrest", [" cardi"], MEDICAL) == 0.0
    # two letters begin too many words to count as a piece of one
    assert off_list_score("cardiac arrest", [" ca"], MEDICAL) == 0.5


@pytest.mark.parametrize("text", ["", " ", "!!", "\ufffd\ufffd"])
def test_a_text_without_words_has_no_score(text):
    assert math.isnan(keyword_score(text, [" drug"]))
    assert math.isnan(off_list_score(text, [" drug"], MEDICAL))


def test_no_words_to_look_for():
    assert math.isnan(keyword_score("a drug", [" ", "!", ""]))
    assert math.isnan(off_list_score("a drug", [" drug"], frozenset()))


FEATURES = pd.DataFrame({"feature": [3, 8], "top_tokens": [["w4", " w5"], ["w6"]]})
TRIALS = pd.DataFrame({"feature": [3, 3, 8, 8], "text": ["w4 w6 drug w9", "", "w6 w6", None]}, index=[5, 6, 7, 8])


def scored(trials=TRIALS, features=FEATURES):
    return score_texts(trials, features, vectors=OneHotWords(), vocabulary={"drug", "w6"}, seed=0)


def test_by_hand():
    table = scored()
    assert table.index.tolist() == [5, 6, 7, 8]
    assert table["keyword_score"].iloc[[0, 2]].tolist() == [0.25, 1.0]
    assert table["off_list"].iloc[[0, 2]].tolist() == [0.5, 0.0]  # w6 is of the domain, but is feature 8's own
    assert table["shuffled_feature"].tolist() == [8, 8, 3, 3]
    assert table["similarity_shuffled"].iloc[0] == similarity("w4 w6 drug w9", "w6", OneHotWords())
    empty = table.iloc[[1, 3]][["keyword_score", "off_list", "similarity_shuffled"]]
    assert empty.isna().all(axis=None)


def test_one_feature_has_no_reference():
    table = scored(TRIALS[:2], FEATURES[:1])
    assert table["similarity_shuffled"].isna().all()
    assert (table["shuffled_feature"] == -1).all()


def test_overlapping_sets_are_not_compared():
    apart = scored(features=FEATURES.assign(members=[[1, 2], [3, 4]]))
    assert apart["shuffled_feature"].tolist() == [8, 8, 3, 3]
    sharing = scored(features=FEATURES.assign(members=[[1, 2], [2, 4]]))
    assert (sharing["shuffled_feature"] == -1).all()
    assert sharing["similarity_shuffled"].isna().all()


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_references_are_a_derangement(n):
    features = list(range(5, 5 + n))
    found = shuffled_references(features[::-1], seed=2)
    assert list(found) == features
    assert sorted(found.values()) == features
    assert all(f != other for f, other in found.items())
    assert found == shuffled_references(features, seed=2)
    assert n < 7 or found != shuffled_references(features, seed=3)


def test_an_outcome_added_from_outside(monkeypatch):
    """From the study file's key through the texts to a tested effect, and its words in reports."""
    loud = Outcome(
        "loudness", "loudness", "share of capitals in the text", "share of letters", "greater",
        score=lambda text, top_tokens, vocabulary: sum(map(str.isupper, text)) / len(text),
    )  # fmt: skip
    monkeypatch.setitem(OUTCOMES, "loudness", loud)
    check_names(SteeringConfig.read({"outcomes": ["loudness"]}, at="steering"))
    cells = itertools.product(range(8), [("unsteered", 0.0, "aaaa"), ("steered", 0.4, "AAaa"), ("random", 0.4, "Aaaa")])
    trials = pd.DataFrame(
        {"feature": 3, "prompt": prompt, "sample": 0, "condition": condition, "dose": dose, "text": text}
        for prompt, (condition, dose, text) in cells
    ).assign(similarity=0.5)
    scored = score_texts(trials, FEATURES, vectors=OneHotWords(), vocabulary=(), seed=0)
    assert scored["loudness"].tolist()[:3] == [0.0, 0.5, 0.25]
    row = effects(scored, outcome="loudness").iloc[0]
    assert (row["effect"], row["outcome"], row["passed"]) == (0.25, "loudness", True)
    everything = outcome_effects(scored, declared=("loudness",), placebos=("random",)).set_index("outcome")
    assert everything.loc["loudness", ["unit", "declared", "primary"]].tolist() == ["share of letters", True, True]
    assert (loud.is_share, loud.effect_unit) == (True, "percentage points of letters")


def test_every_outcome_says_what_reports_need():
    for name, outcome in OUTCOMES.items():
        assert outcome.name == name
        assert all((outcome.label, outcome.measures, outcome.unit, outcome.column))
        assert outcome.under("ablate").alternative == {"greater": "less"}.get(outcome.alternative, "two-sided")
    with pytest.raises(UnknownName, match="off_list"):
        outcome_named("of_list")
