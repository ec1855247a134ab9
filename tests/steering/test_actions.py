"""Operators by name: what each row of a batch does, and what is impossible."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from saeffect.errors import BadFile, ConfigError, EmptySelection, ShapeMismatch, Undefined
from saeffect.sae.base import SaeConfig
from saeffect.sae.standard import StandardSae
from saeffect.steering import Site, SteeringPlan, direct_effects, features_together, obstacles, run_trials
from saeffect.steering.actions import ActionRow, actions_of
from saeffect.steering.placebos import random_direction
from steering.tiny_model import D_MODEL, HOOK, OneHotWords, site

D_SAE = 12


@pytest.fixture(scope="module")
def sae():
    made = StandardSae(SaeConfig("standard", D_MODEL, D_SAE, apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def place(lm, sae):
    return Site(lm, HOOK, sae.W_dec, 4.0, sae=sae, max_acts=torch.arange(float(D_SAE)))  # feature 0 never fired


@pytest.fixture
def x():
    return torch.randn(1, 5, D_MODEL, generator=torch.Generator().manual_seed(8)) * 2


FEATURES = pd.DataFrame(
    {
        "feature": [2, 5],
        "top_tokens": [["w4", "w5"], ["w6"]],
        "top_token_ids": [[4, 5], [6]],
        "matched": [[7, 8], [9]],
    }
)


def plan(**change):
    settings = {"prompts": ("one two", "three four"), "doses": (2.0,), "samples": 2, "max_new_tokens": 5}
    return SteeringPlan(**{**settings, "placebos": ("random", "matched"), "seed": 4, **change})


def applied(place, sae, x, plan, *row, features=FEATURES):
    return actions_of(place, features, plan).operator([ActionRow(*row)]).apply(x) - x


def test_clamping_to_a_multiple_of_the_maximum(place, sae, x):
    moved = applied(place, sae, x, plan(operator="clamp"), 5, "steered", 2.0, (0, 0))
    acts = sae.encode(x)[..., 5]
    torch.testing.assert_close(moved, (2.0 * 5 - acts)[..., None] * sae.W_dec[5], rtol=1e-4, atol=1e-4)


def test_matched_placebo_is_clamped_to_its_maximum(place, sae, x):
    for draw, placebo in (((0, 0), 7), ((0, 1), 8), ((1, 1), 7)):
        moved = applied(place, sae, x, plan(operator="clamp"), 2, "matched", 2.0, draw)
        acts = sae.encode(x)[..., placebo]
        torch.testing.assert_close(moved, (2.0 * placebo - acts)[..., None] * sae.W_dec[placebo], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("operator", "dose"), [("clamp", 2.0), ("ablate", 1.0)])
def test_random_placebo_pushes_as_far_elsewhere(place, sae, x, operator, dose):
    made = plan(operator=operator, doses=(dose,))
    own = applied(place, sae, x, made, 5, "steered", dose, (1, 0))
    other = applied(place, sae, x, made, 5, "random", dose, (1, 0))
    torch.testing.assert_close(other.norm(dim=-1), own.norm(dim=-1), rtol=1e-4, atol=1e-4)
    unit = random_direction(D_MODEL, seed=4, feature=5, draw=(1, 0))
    along = other @ unit
    torch.testing.assert_close(along.abs(), other.norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert float(own.norm()) > 0


def test_ablation_removes_the_activation(place, sae, x):
    made = actions_of(place, FEATURES, plan(operator="ablate", doses=(1.0,)))
    rows = [ActionRow(2, "unsteered", 0.0, (0, 0)), ActionRow(5, "steered", 1.0, (0, 0))]
    out = made.operator(rows).apply(torch.cat([x, x]))
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1] - x[0], -sae.encode(x)[0, :, 5, None] * sae.W_dec[5], rtol=1e-4, atol=1e-4)


def test_a_dose_may_be_the_papers_coefficient(place, sae, x):
    made = actions_of(place, FEATURES, plan(unit="coefficient"))
    vectors = made.operator([ActionRow(5, c, 2.0, (0, 0)) for c in ("steered", "random", "matched")]).vectors
    torch.testing.assert_close(vectors[0], 2 * sae.W_dec[5])
    torch.testing.assert_close(vectors.norm(dim=1), (2 * sae.W_dec[5].norm()).expand(3))
    assert made.coefficient(5, 2.0) == pytest.approx(2.0)


def test_lengths_and_coefficients_by_operator(place, sae):
    norm = float(sae.W_dec[5].norm())
    add = actions_of(place, FEATURES, plan())
    assert add.length(5, 2.0) == 8.0
    assert add.coefficient(5, 2.0) == pytest.approx(8.0 / norm)
    clamp = actions_of(place, FEATURES, plan(operator="clamp"))
    assert clamp.length(5, 2.0) == pytest.approx(2 * 5 * norm)
    assert math.isnan(clamp.coefficient(5, 2.0))
    assert math.isnan(actions_of(place, FEATURES, plan(operator="ablate", doses=(1.0,))).length(5, 1.0))


def test_clamp_length_of_a_standardising_sae(lm):
    sae = StandardSae(SaeConfig("standard", D_MODEL, D_SAE, normalize_activations="layer_norm"))
    sae.W_dec.data.copy_(torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(1, 1, D_MODEL, generator=torch.Generator().manual_seed(2))
    x = x - x.mean()
    x = 4.0 * x / x.norm()  # a token of the mean norm; the feature is off, as the encoder is zero
    place = Site(lm, HOOK, sae.W_dec, 4.0, sae=sae, max_acts=torch.arange(float(D_SAE)))
    made = plan(operator="clamp", placebos=())
    moved = applied(place, sae, x, made, 5, "steered", 2.0, (0, 0))
    length = actions_of(place, FEATURES, made).length(5, 2.0)
    assert float(moved.norm()) == pytest.approx(length, rel=0.03)  # std divides by n - 1


def test_several_features_at_once(place, sae, x):
    rows = features_together(FEATURES, [[2, 5]], {2: [7, 8], 5: [7, 9]})
    assert rows["matched"].tolist() == [[[7, 9], [8, 9]]]
    both = sae.W_dec[2] + sae.W_dec[5]
    moved = applied(place, sae, x, plan(), 0, "steered", 2.0, (0, 0), features=rows)
    torch.testing.assert_close(moved[0, 0], 8.0 * both / both.norm(), rtol=1e-4, atol=1e-4)
    placebo = sae.W_dec[7] + sae.W_dec[9]
    moved = applied(place, sae, x, plan(), 0, "matched", 2.0, (0, 0), features=rows)
    torch.testing.assert_close(moved[0, 0], 8.0 * placebo / placebo.norm(), rtol=1e-4, atol=1e-4)
    moved = applied(place, sae, x, plan(operator="clamp"), 0, "steered", 2.0, (0, 0), features=rows)
    acts = sae.encode(x)
    wanted = sum((2.0 * f - acts[..., f])[..., None] * sae.W_dec[f] for f in (2, 5))
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("operator", "dose"), [("add", 2.0), ("clamp", 2.0), ("ablate", 1.0)])
def test_random_placebo_of_a_set_keeps_its_length(place, sae, x, operator, dose):
    rows = features_together(FEATURES, [[2, 5]])
    made = plan(operator=operator, doses=(dose,), placebos=("random",))
    own = applied(place, sae, x, made, 0, "steered", dose, (1, 0), features=rows)
    other = applied(place, sae, x, made, 0, "random", dose, (1, 0), features=rows)
    assert float(own.norm(dim=-1).max()) > 0
    torch.testing.assert_close(other.norm(dim=-1), own.norm(dim=-1), rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(own, other, dim=-1)
    assert bool((cosine.abs()[own.norm(dim=-1) > 0] < 0.9).all())


@pytest.mark.parametrize(("operator", "dose"), [("clamp", 2.0), ("ablate", 1.0)])
def test_attention_sinks_are_left_as_they_are(lm, sae, x, operator, dose):
    """What an SAE reads in an activation of a length that it never saw means nothing."""
    limit = float(x[0, 1:].norm(dim=-1).max()) * 1.01
    x = x.clone()
    x[0, 0] *= 40
    assert float(sae.encode(x)[0, 0, 5]) > 0 or float(sae.encode(x)[0, 0, 2]) > 0
    place = Site(lm, HOOK, sae.W_dec, 4.0, sae=sae, max_acts=torch.arange(float(D_SAE)), norm_limit=limit)
    made = plan(operator=operator, doses=(dose,))
    for condition in ("steered", "random", "matched"):
        for feature in (2, 5):
            moved = applied(place, sae, x, made, feature, condition, dose, (0, 0))
            assert not moved[0, 0].any()
    assert applied(place, sae, x, made, 5, "steered", dose, (0, 0))[0, 1:].any()


@pytest.mark.parametrize(("operator", "dose"), [("add", 1.0), ("clamp", 3.0), ("ablate", 1.0)])
@pytest.mark.parametrize("positions", ["all", "generated", "prompt"])
def test_every_operator_and_position(place, sae, operator, dose, positions):
    made = plan(operator=operator, doses=(dose,), positions=positions)
    trials = run_trials(place, FEATURES, made, vectors=OneHotWords())
    assert len(trials) == 2 * 2 * 2 * 4
    texts = trials.pivot(index=["feature", "prompt", "sample"], columns="condition", values="text")
    assert (texts["steered"] != texts["unsteered"]).any() or operator == "ablate"
    direct = direct_effects(place, FEATURES, made)
    assert len(direct) == 2 * 2 * 3
    assert (direct["kl"] >= 0).all()
    assert direct["delta_logprob"].notna().all()


def test_sets_of_features_go_through_trials(place, sae):
    rows = features_together(FEATURES, [[2, 5], [5, 2]], {2: [7], 5: [8]})
    trials = run_trials(place, rows, plan(operator="clamp"), vectors=OneHotWords())
    assert set(trials["feature"]) == {0, 1}
    # A set does not depend on the order of its features.
    steered = trials[trials["condition"] == "steered"].pivot(
        index=["prompt", "sample"], columns="feature", values="text"
    )
    assert (steered[0] == steered[1]).all()
    with pytest.raises(ShapeMismatch, match="no feature 99"):
        features_together(FEATURES, [[2, 99]])


def test_impossible_conditions_are_left_out(place, sae):
    features = pd.concat(
        [
            FEATURES,
            pd.DataFrame(
                {"feature": [0, 3], "top_tokens": [["w7"]] * 2, "top_token_ids": [[7]] * 2, "matched": [[9], []]}
            ),
        ],
        ignore_index=True,
    )
    made = plan(operator="clamp")
    why = obstacles(place, features, made)
    assert set(why) == {(0, "steered"), (0, "random"), (0, "matched"), (3, "matched")}
    assert "never fired" in why[0, "steered"]
    assert "resembles no feature" in why[3, "matched"]
    trials = run_trials(place, features, made, vectors=OneHotWords())
    found = trials.groupby("feature")["condition"].agg(lambda c: sorted(set(c)))
    assert found[0] == ["unsteered"]
    assert found[3] == ["random", "steered", "unsteered"]
    assert len(found[2]) == 4
    direct = direct_effects(place, features, made)
    assert 0 not in set(direct["feature"])
    # A resumed run takes such features as finished too.
    again: list[pd.DataFrame] = []
    run_trials(place, features, made, vectors=OneHotWords(), done=trials, on_chunk=again.append)
    assert not again


def test_nothing_but_impossible_features(place, sae):
    features = FEATURES.assign(feature=[0, 0 + 1])[:1]
    made = plan(operator="clamp")
    trials = run_trials(place, features, made, vectors=OneHotWords())
    assert set(trials["condition"]) == {"unsteered"}
    assert direct_effects(place, features, made).empty


def test_clamping_needs_the_sae_and_the_maxima(lm, sae):
    with pytest.raises(ConfigError, match="needs the SAE"):
        actions_of(site(lm, sae.W_dec), FEATURES, plan(operator="ablate", doses=(1.0,)))
    with pytest.raises(ConfigError, match="largest activation"):
        actions_of(Site(lm, HOOK, sae.W_dec, 4.0, sae=sae), FEATURES, plan(operator="clamp"))


def test_directions_and_lengths_of_decoder_rows(lm):
    W_dec = torch.zeros(3, D_MODEL).half()
    W_dec[0, :2], W_dec[2, 0] = torch.tensor([3.0, 4.0]), math.nan
    made = actions_of(site(lm, W_dec), pd.DataFrame({"feature": [0, 1, 2]}), plan(placebos=("random",)))
    assert made.norm(0) == 5
    assert torch.allclose(made.unit(0, "steered")[:2], torch.tensor([0.6, 0.8]))
    assert torch.equal(made.unit(0, "random", (1, 2)), random_direction(D_MODEL, seed=4, feature=0, draw=(1, 2)))
    assert "decoder row of feature 1 is zero" in made.obstacle(1, "steered")
    with pytest.raises(Undefined, match="feature 1 is zero"):
        made.unit(1, "steered")
    with pytest.raises(BadFile, match="feature 2"):
        made.norm(2)


def test_matched_placebos_take_turns_over_prompts_and_samples(lm):
    features = pd.DataFrame({"feature": [0, 1], "matched": [[1, 2], []]})
    made = actions_of(site(lm, torch.eye(3, D_MODEL)), features, plan())
    assert [made.pushed_features(0, "matched", draw) for draw in ((0, 0), (0, 1), (1, 1))] == [(1,), (2,), (1,)]
    assert torch.equal(made.unit(0, "matched", (0, 1)), torch.eye(3, D_MODEL)[2])
    with pytest.raises(EmptySelection, match="feature 1 has no matched"):
        made.unit(1, "matched", (0, 0))
