"""Fates by both measures: planted losses, nulls for every pair of seeds, counts, and what is missing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.diffing import fates
from saeffect.diffing.coactivity import FiringLog
from saeffect.diffing.correspondence import MEASURES, measure
from saeffect.diffing.pair import ModelPair, SaeView
from saeffect.errors import ConfigError
from saeffect.stats.arguments import Resampling

D_IN, D_SAE, N_TOKENS = 64, 300, 3000
LOST = np.arange(20)
SMALL = Resampling(0, 100, 100)


def view(name, base, seed, *, lost=(), log=True, base_acts=None):
    """An SAE that has the base's features, a little off; those of `lost` point and fire elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = base + 0.05 * torch.randn(D_SAE, D_IN, generator=generator)
    acts = base_acts * (1 + 0.1 * torch.rand(base_acts.shape, generator=generator))
    for feature in lost:
        W_dec[feature] = torch.randn(D_IN, generator=generator)
        acts[:, feature] = (torch.rand(N_TOKENS, generator=generator) < 0.02).float()
    features = pd.DataFrame(
        {
            "feature": range(D_SAE),
            "density": (acts > 0).double().mean(dim=0).numpy(),
            "decoder_norm": W_dec.norm(dim=1).numpy(),
        }
    )
    written = None
    if log:
        written = FiringLog(D_SAE)
        written.update(acts)
    return SaeView(name, W_dec, features, written)


@pytest.fixture(scope="module")
def world():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(D_SAE, D_IN, generator=generator)
    base = base / base.norm(dim=1, keepdim=True)
    base_acts = torch.rand(N_TOKENS, D_SAE, generator=generator) * (
        torch.rand(N_TOKENS, D_SAE, generator=generator) < 0.02
    )
    return base, base_acts


@pytest.fixture(autouse=True)
def _small_strata(monkeypatch):
    monkeypatch.setattr(fates, "MIN_STRATUM", 100)


def found(world, *, others=2, logs=True, seeds=0):
    base, acts = world

    def make(name, seed, **more):
        return view(name, base, seed, base_acts=acts, log=logs, **more)

    return measure(
        ModelPair(
            control=make("control", 1),
            treatment=make("treatment", 2, lost=LOST),
            others=[make(f"seed{i}", 10 + i) for i in range(others)],
            treatment_seeds=[make(f"t{i}", 20 + i, lost=LOST) for i in range(seeds)],
            resampling=SMALL,
        )
    )


@pytest.fixture(scope="module")
def with_three(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fates, "MIN_STRATUM", 100)
        return found(world, others=3, seeds=1)


def test_planted_losses_are_found_by_both_measures(with_three):
    control = with_three["fates_control"]
    for name in MEASURES:
        table = control[control["measure"] == name].set_index("feature")
        assert len(table) == D_SAE
        lost = table.loc[LOST, "fate"].isin(["gone", "moved", "absorbed"])
        assert lost.mean() >= 0.9, name
        rest = table.drop(index=LOST)
        assert (rest["fate"].isin(["gone", "moved", "absorbed"])).mean() <= 0.05
        assert (rest["match"] == rest.index).mean() > 0.95
        assert rest["mutual"].mean() > 0.95
        assert (rest["assigned"] == rest.index).mean() > 0.95
        # the treatment's other seed has lost the same
        assert table.loc[LOST, "other_seeds_similarity"].mean() < rest["other_seeds_similarity"].mean() - 0.3


def test_every_ordered_pair_of_the_rest_is_a_null(with_three):
    null = with_three["fates_null"]
    pairs = null[null["is_null"] & (null["measure"] == MEASURES[0]) & (null["side"] == "control")]
    assert len(pairs) == 4 * 3
    assert (pairs["reference"] != pairs["stand_in"]).all()
    assert (pairs["tested"] > 0).all()
    assert (pairs["called"] > 0).sum() <= 3
    assert pairs["low_p"].sum() / pairs["tested"].sum() < 0.08
    real = null[~null["is_null"] & (null["side"] == "control")]
    assert (real["called"] >= 15).all()


def test_one_other_seed_gives_fates_but_no_null(world):
    result = found(world, others=1)
    assert not result["fates_null"]["is_null"].any()
    assert (result["fates_null"]["tested"] > 0).all()


def test_decoders_alone_can_be_matched(world):
    result = found(world, logs=False)
    assert set(result["fates_control"]["measure"]) == {MEASURES[0]}
    assert result["absorption"].empty
    assert (result["fate_counts"]["fate"] == "absorbed").sum() == 1


def test_counts_tell_the_gone_from_the_absorbed(with_three):
    control = with_three["fates_control"]
    for name, rows in with_three["fate_counts"].groupby("measure"):
        called = rows[rows["side"] == "control"].set_index("fate")["called"]
        n = control.loc[control["measure"] == name, "fate"].value_counts()
        for fate in ("kept", "moved", "gone", "absorbed"):
            assert called[fate] == n.get(fate, 0)


def test_without_others_nothing_is_called(world):
    result = found(world, others=0)
    assert set(result["fates_control"]["fate"]) == {""}
    assert result["fate_counts"]["called"].isna().all()
    assert (result["fates_null"]["tested"] == 0).all()
    assert result["fates_null"]["reason"].str.contains("placebo").all()


def test_two_of_one_name_are_refused(world):
    base, acts = world
    control = view("control", base, 1, base_acts=acts)
    with pytest.raises(ConfigError, match="a name of its own"):
        measure(ModelPair(control=control, treatment=control))


def test_a_feature_that_never_fires_is_nobodys_counterpart(world):
    """Feature 0 of the treatment points where the control's does, but is dead: it took nothing over."""
    base, acts = world
    control, treatment = (view(name, base, seed, base_acts=acts) for name, seed in (("control", 1), ("treatment", 2)))
    others = [view(f"p{i}", base, 10 + i, base_acts=acts) for i in range(2)]
    pair = ModelPair(control=control, treatment=treatment, others=others, resampling=SMALL)
    alive = measure(pair)["fates_control"]
    treatment.features.loc[0, "density"] = 0.0
    dead = measure(pair)
    by_cosine = dead["fates_control"][dead["fates_control"]["measure"] == MEASURES[0]].set_index("feature")
    assert alive["match"].iloc[0] == 0
    assert by_cosine.loc[0, "match"] != 0
    assert by_cosine.loc[0, "assigned"] != 0
    treated = dead["fates_treatment"]
    lost = treated[(treated["measure"] == MEASURES[0]) & (treated["feature"] == 0)].iloc[0]
    assert lost["reason"] == "it never fires on this text"
    assert np.isnan(lost["q"])
