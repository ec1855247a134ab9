from __future__ import annotations

import pandas as pd
import pytest

from saeffect.errors import ShapeMismatch
from saeffect.steering import score_texts, shuffled_references, similarity
from steering.tiny_model import OneHotWords

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
    assert table["similarity_shuffled"].iloc[0] == similarity("w4 w6 drug w9", "w6", OneHotWords()).value
    empty = table.iloc[[1, 3]][["keyword_score", "off_list", "similarity_shuffled"]]
    assert empty.isna().all(axis=None)


def test_one_feature_has_no_other_to_be_compared_with():
    table = scored(TRIALS[:2], FEATURES[:1])
    assert table["similarity_shuffled"].isna().all()
    assert (table["shuffled_feature"] == -1).all()


def test_sets_that_share_a_feature_are_not_compared():
    apart = scored(features=FEATURES.assign(members=[[1, 2], [3, 4]]))
    assert apart["shuffled_feature"].tolist() == [8, 8, 3, 3]
    sharing = scored(features=FEATURES.assign(members=[[1, 2], [2, 4]]))
    assert (sharing["shuffled_feature"] == -1).all()
    assert sharing["similarity_shuffled"].isna().all()


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_nobody_is_compared_with_itself_and_everybody_once(n):
    features = list(range(5, 5 + n))
    found = shuffled_references(features[::-1], seed=2)
    assert list(found) == features
    assert sorted(found.values()) == features
    assert all(f != other for f, other in found.items())
    assert found == shuffled_references(features, seed=2)
    assert n < 7 or found != shuffled_references(features, seed=3)


def test_a_feature_without_top_tokens():
    with pytest.raises(ShapeMismatch, match="no feature 8"):
        scored(TRIALS, FEATURES[:1])
