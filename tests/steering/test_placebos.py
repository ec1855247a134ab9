"""Directions that should do nothing in particular, and features that resemble a feature."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.config import SteeringConfig
from saeffect.errors import ConfigError
from saeffect.sae.base import SaeConfig
from saeffect.sae.standard import StandardSae
from saeffect.steering import PLACEBOS, Placebo, Site, SteeringPlan, check_names, effects, matched_features, run_trials
from saeffect.steering.actions import ActionRow, actions_of
from saeffect.steering.placebos import control_label, random_direction, redraw_directions
from steering.tiny_model import D_MODEL, HOOK, OneHotWords


@pytest.fixture
def reversed_placebo(monkeypatch):
    """A kind of placebo that another package adds: the decoder row backwards."""

    def backwards(row, *, seed, feature, draw):
        return row.flip(0) / row.norm()

    monkeypatch.setitem(PLACEBOS, "reversed", Placebo("reversed", "reversed row", direction=backwards))


@pytest.mark.parametrize(("operator", "dose"), [("add", 2.0), ("ablate", 1.0)])
def test_a_placebo_added_from_outside(lm, reversed_placebo, operator, dose):
    """From the study file's key through trials to the effects and their names in reports."""
    section = SteeringConfig.read(
        {"operator": operator, "placebos": ["reversed"], "max_new_tokens": 4, "prompts": ["a b", "c"]}, at="steering"
    )
    check_names(section)
    plan = SteeringPlan.from_section(section, seed=0, doses=(dose,))
    sae = StandardSae(SaeConfig("standard", D_MODEL, 3))
    sae.W_dec.data.copy_(torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0)))
    place = Site(lm, HOOK, sae.W_dec.detach(), 4.0, sae=sae)
    features = pd.DataFrame({"feature": [2], "top_tokens": [["w5"]]})
    rows = [ActionRow(2, condition, dose, (0, 0)) for condition in ("steered", "reversed")]
    x = torch.randn(1, 3, D_MODEL, generator=torch.Generator().manual_seed(1))
    moved = actions_of(place, features, plan).operator(rows).apply(x.expand(2, -1, -1)) - x
    torch.testing.assert_close(moved[1], moved[0].flip(-1), rtol=1e-4, atol=1e-5)
    trials = run_trials(place, features, plan, vectors=OneHotWords())
    assert set(trials["condition"]) == {"unsteered", "steered", "reversed"}
    assert effects(trials, placebo="reversed", outcome="distinct2")["placebo"].tolist() == ["reversed"]
    assert control_label("reversed") == "reversed row"


def test_a_placebo_has_a_direction_or_a_column():
    with pytest.raises(ConfigError, match="either a direction or a column"):
        Placebo("nothing", "nothing")


def turn(rows, draw):
    return redraw_directions(rows, PLACEBOS["random"].direction, seed=1, feature=7, draw=draw)


def test_random_directions_depend_on_their_arguments_only():
    first = random_direction(16, seed=1, feature=7, draw=(2, 0))
    assert torch.equal(first, random_direction(16, seed=1, feature=7, draw=(2, 0)))
    assert first.norm().item() == pytest.approx(1, abs=1e-6)
    others = [
        random_direction(16, seed=2, feature=7, draw=(2, 0)),
        random_direction(16, seed=1, feature=8, draw=(2, 0)),
        random_direction(16, seed=1, feature=7, draw=(2, 1)),
        random_direction(16, seed=1, feature=7, draw=(0, 2)),
        random_direction(16, seed=1, feature=7),
        random_direction(16, seed=1, feature=7, draw=(2,)),
    ]
    assert all((first @ other).abs() < 0.95 for other in others)


def test_random_directions_point_nowhere_in_particular():
    drawn = torch.stack([random_direction(8, seed=0, feature=f) for f in range(4000)])
    assert drawn.mean(dim=0).abs().max() < 4 * (1 / 8 / 4000) ** 0.5
    assert (drawn.var(dim=0) * 8 - 1).abs().max() < 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 8, 11])
def test_several_directions_are_turned_as_one(n):
    rows = torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) * torch.arange(1.0, n + 1)[:, None]
    turned = turn(rows, (2, 0))
    torch.testing.assert_close(turned @ turned.T, rows @ rows.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(turned, turn(rows, (2, 0)))
    assert not torch.allclose(turned, turn(rows, (2, 1)), atol=0.1)
    assert not torch.allclose(turned, rows, atol=0.1)
    if n == 1:
        torch.testing.assert_close(turned[0], random_direction(8, seed=1, feature=7, draw=(2, 0)) * rows[0].norm())


def test_parallel_directions_stay_parallel():
    row = torch.arange(1.0, 9)
    turned = turn(torch.stack([row, -2 * row]), ())
    torch.testing.assert_close(turned[1], -2 * turned[0], rtol=1e-4, atol=1e-4)


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


def test_matching_by_hand():
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


def test_placebos_are_outside_the_domain():
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


def test_fewer_placebos_where_fewer_resemble_it():
    features = table()
    features.loc[:1, "density"] = 0.0
    found = matched_features(features, [0, 5], [0, *range(5, 200)])
    lists = found.groupby("feature")["placebo"].apply(list)
    assert lists[0] == [1]
    assert set(lists[5]) == {2, 3, 4}
    assert matched_features(table(), [5], range(200)).empty
