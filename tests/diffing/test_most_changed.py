from __future__ import annotations

import numpy as np
import pytest
from saeffect.diffing.most_changed import change_scores, most_changed

from synthetic_matches import cross_activity


def test_scores_by_hand():
    scores = change_scores(cross_activity())
    assert scores[0] == pytest.approx(0.25 / np.sqrt(0.375))
    assert scores[5] == pytest.approx(-0.125 / np.sqrt(0.1875))
    assert scores[12] == pytest.approx(1 / np.sqrt(0.5))
    assert np.isnan(scores[119])


def test_most_changed_first_and_only_what_was_found():
    found = most_changed(cross_activity(), alpha=0.05)
    assert found["feature"].tolist() == [12, 0, 1, 2, 3, 4, 10, 11, 5, 6]
    assert most_changed(cross_activity(), alpha=0.05, domain_only=True)["feature"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert most_changed(cross_activity(), alpha=0.0001).empty


def test_an_empty_table_gives_none():
    assert most_changed(cross_activity().head(0), alpha=0.05).empty
