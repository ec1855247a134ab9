from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from saeffect.errors import ConfigError, EmptySelection, ShapeMismatch
from saeffect.steering.matched import matched_features, matched_lists


def table(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "feature": np.arange(n),
            "decoder_norm": rng.uniform(0.5, 2, n),
            "density": 10 ** rng.uniform(-4, -1, n),
            "mean_activation": rng.lognormal(1, 1, n),
        }
    )


def test_by_hand_a_factor_counts_alike_wherever_it_is():
    features = pd.DataFrame(
        {
            "feature": [0, 1, 2, 3],
            "decoder_norm": [1.0] * 4,
            "density": [0.001, 0.002, 0.1, 0.0004],
            "mean_activation": [1.0] * 4,
        }
    )
    found = matched_features(features, [0], domain=[0], n=3)
    assert found["placebo"].tolist() == [1, 3, 2]  # twice, 2.5 times less, a hundred times
    spread = np.log(features["density"]).std(ddof=0)
    np.testing.assert_allclose(found["distance"], np.log([2, 2.5, 100]) / spread)
    assert found["rank"].tolist() == [0, 1, 2]


def test_it_agrees_with_scipys_distances():
    from scipy.spatial.distance import cdist

    features = table()
    domain = set(range(0, 200, 3))
    found = matched_features(features, sorted(domain)[:10], domain, n=5)
    logs = np.log(features[["decoder_norm", "density", "mean_activation"]].to_numpy())
    logs /= logs.std(axis=0)
    outside = [f for f in range(200) if f not in domain]
    for feature, rows in found.groupby("feature"):
        distances = cdist(logs[[feature]], logs[outside])[0]
        assert rows["placebo"].tolist() == [outside[i] for i in np.argsort(distances)[:5]]


def test_no_placebo_is_of_the_domain_or_the_feature_itself():
    found = matched_features(table(), [1, 2, 3], domain=range(50), n=4)
    assert found["placebo"].min() >= 50
    assert len(found) == 12
    outside = matched_features(table(), [60, 70], domain=range(50), n=4)  # a feature need not be of the domain
    assert (outside["placebo"] != outside["feature"]).all()
    assert (outside["distance"] > 0).all()


def test_silent_features_are_matched_with_silent_ones():
    features = table()
    features.loc[features["feature"] % 10 == 0, "density"] = 0.0
    features.loc[features["feature"] % 10 == 0, "mean_activation"] = np.nan
    found = matched_features(features, [20, 21], domain=[20, 21], n=3)
    silent = found[found["feature"] == 20]["placebo"] % 10 == 0
    assert silent.all()
    assert not (found[found["feature"] == 21]["placebo"] % 10 == 0).any()
    assert np.isfinite(found["distance"]).all()


def test_rounding_of_unit_rows_is_no_difference():
    features = table()
    features["decoder_norm"] = 1.0 + np.random.default_rng(1).normal(0, 1e-7, 200)
    ones = features.assign(decoder_norm=1.0)
    pd.testing.assert_frame_equal(matched_features(features, [5], [5]), matched_features(ones, [5], [5]))


def test_bad_requests():
    with pytest.raises(ConfigError, match="at least one placebo"):
        matched_features(table(), [0], [0], n=0)
    with pytest.raises(ShapeMismatch, match="lacks the column"):
        matched_features(table().drop(columns="density"), [0], [0])
    with pytest.raises(ShapeMismatch, match="feature 999"):
        matched_features(table(), [999], [999])
    with pytest.raises(EmptySelection, match="only 2 feature"):
        matched_features(table(), [0], range(198), n=3)


def test_lists_are_shorter_where_fewer_resemble_it():
    features = table()
    features.loc[:1, "density"] = 0.0
    lists = matched_lists(features, [0, 5], domain=[0, *range(5, 200)], n=4)
    assert lists[0] == [1]
    assert set(lists[1]) == {2, 3, 4}
    whole = matched_features(table(), [5], [5], n=3)
    assert matched_lists(table(), [5], [5], n=3) == [whole["placebo"].tolist()]
    assert matched_lists(table(), [5], range(200)) == [[]]
    some = matched_features(features, [0, 5], [0, *range(5, 200)], n=4, fewer=True)
    assert some.groupby("feature")["placebo"].apply(list).to_dict() == {0: lists[0], 5: lists[1]}
    assert matched_features(table(), [5], range(200), fewer=True).empty
