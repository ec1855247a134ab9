"""Rotations by hand, planted ones found beyond those of training alone, and degenerate weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.diffing import stagewise as module
from saeffect.diffing.pair import ModelPair, SaeView
from saeffect.diffing.stagewise import measure, rotations, stagewise
from saeffect.errors import BadFile, ShapeMismatch
from saeffect.sae import ARCHITECTURES
from saeffect.sae.base import SaeConfig

N, D_IN = 600, 24


class SaeWeights(NamedTuple):
    """What stage-wise diffing needs of an SAE."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor | None
    W_dec: torch.Tensor


def alike(n: int = N) -> pd.DataFrame:
    """Features that are all compared with all."""
    return pd.DataFrame({"density": np.full(n, 0.1), "decoder_norm": 1.0})


def sae(seed: int = 0, n: int = N) -> SaeWeights:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(n, D_IN, generator=generator)
    return SaeWeights(W_dec.T.clone(), torch.zeros(n), W_dec)


def trained_on(start: SaeWeights, seed: int, noise: np.ndarray | float = 0.05) -> SaeWeights:
    generator = torch.Generator().manual_seed(seed)
    size = torch.as_tensor(noise, dtype=torch.float32).expand(len(start.W_dec))[:, None]
    W_dec = start.W_dec + size * torch.randn(start.W_dec.shape, generator=generator)
    return SaeWeights(W_dec.T.clone(), torch.full((len(W_dec),), 0.5), W_dec)


def test_angles_by_hand() -> None:
    start = SaeWeights(torch.eye(2), torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    end = SaeWeights(-torch.eye(2), torch.tensor([1.5, 1.0]), torch.tensor([[1.0, 1.0], [1.0, math.sqrt(3)]]))
    table = rotations(start, end)
    np.testing.assert_allclose(table["decoder_rotation"], [45, 60], atol=1e-5)
    np.testing.assert_allclose(table["encoder_rotation"], [180, 180])
    np.testing.assert_allclose(table["bias_change"], [0.5, -1.0])
    np.testing.assert_allclose(table["norm_ratio"], [math.sqrt(2), 1.0], atol=1e-7)


def test_tiny_angles_keep_their_digits() -> None:
    start = SaeWeights(torch.eye(2).double(), None, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    end = SaeWeights(torch.eye(2).double(), None, torch.tensor([[1.0, 1e-9]], dtype=torch.float64))
    start, end = (SaeWeights(one.W_enc[:, :1], None, one.W_dec) for one in (start, end))
    assert rotations(start, end)["decoder_rotation"][0] == pytest.approx(math.degrees(1e-9), rel=1e-6)
    assert rotations(start, end)["bias_change"].isna().all()


@pytest.mark.parametrize("n_nulls", [1, 3])
def test_planted_rotations_lead_the_table(n_nulls: int) -> None:
    start = sae()
    noise = np.full(N, 0.05)
    noise[:60] = 0.5
    treatment = trained_on(start, 1, noise)
    table = stagewise(start, treatment, [trained_on(start, 2 + i) for i in range(n_nulls)], alike())
    assert set(table["feature"][:60]) == set(range(60))
    assert table["decoder_rotation"].is_monotonic_decreasing
    found = set(table.loc[table["q"] <= 0.05, "feature"])
    assert found >= set(range(60))
    assert len(found) <= 68
    assert (table["percentile"][:60] == 100).all()
    assert (table["excess_rotation"][:60] > 10).all()
    assert set(table["reason"]) == {""}


@pytest.mark.simulation
def test_training_alone_raises_no_alarm() -> None:
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        start = sae(seed, 200)
        noise = rng.gamma(0.5, 0.3, 200)
        table = stagewise(
            start, trained_on(start, 1000 + seed, noise), [trained_on(start, 2000 + seed, noise)], alike(200)
        )
        alarms += bool((table["q"] <= 0.05).any())
    assert alarms <= 4  # 2 expected at most


def test_percentiles_are_among_features_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_STRATUM", 100)
    start = sae(0, 400)
    rare = np.arange(400) < 200
    noise = np.where(rare, 0.5, 0.05)
    features = pd.DataFrame({"density": np.where(rare, 1e-5, 1e-2), "decoder_norm": 1.0})
    features.loc[7, "density"] = 0.0
    features.loc[8, "decoder_norm"] = np.nan
    found = stagewise(start, trained_on(start, 1, noise), [trained_on(start, 2, noise)], features)
    table = found.set_index("feature")
    for group in (table[rare[table.index]], table[~rare[table.index]]):
        assert group["percentile"].median() == pytest.approx(50, abs=8)
    assert table.loc[7, "reason"] == "it never fires on this text"
    assert table.loc[8, "reason"] == "its density or decoder norm is unknown"
    assert table.loc[[7, 8], ["p", "q", "percentile"]].isna().all().all()


def test_without_a_null_there_are_angles_but_no_verdict() -> None:
    start = sae()
    start.W_dec[4] = 0
    table = stagewise(start, trained_on(start, 1), [], alike()).set_index("feature")
    assert table[["null_rotation", "excess_rotation", "percentile", "p", "q"]].isna().all().all()
    assert table.loc[0, "reason"].startswith("no SAE was trained on")
    assert table.loc[4, "reason"] == "a decoder row is zero"
    assert table.index[-1] == 4
    assert table["decoder_rotation"].notna().sum() == N - 1


def test_bad_input() -> None:
    start = sae()
    with pytest.raises(ShapeMismatch, match="trained on"):
        rotations(start, sae(0, 5))
    with pytest.raises(ShapeMismatch, match="b_enc"):
        rotations(start, SaeWeights(start.W_enc, None, start.W_dec))
    broken = trained_on(start, 1)
    broken.W_dec[0, 0] = torch.nan
    with pytest.raises(BadFile, match="W_dec"):
        rotations(start, broken)


@pytest.mark.parametrize("architecture", [name for name, kind in ARCHITECTURES.items() if kind.trainable])
def test_every_architecture_can_be_followed(architecture: str) -> None:
    start, end = (ARCHITECTURES[architecture](SaeConfig(architecture, 4, 6, k=2)) for _ in range(2))
    bias = "b_gate" if architecture == "gated" else "b_enc"
    with torch.no_grad():
        for one in (start, end):
            one.W_enc.copy_(torch.ones(4, 6))
            one.W_dec.copy_(torch.ones(6, 4))
        end.W_dec[2] *= torch.tensor([1.0, -1.0, 1.0, -1.0])
        getattr(end, bias)[3] = 0.25
    table = stagewise(start, end, [start], alike(6)).set_index("feature").sort_index()
    np.testing.assert_allclose(table["decoder_rotation"], [0, 0, 90, 0, 0, 0])
    np.testing.assert_allclose(table["bias_change"], [0, 0, 0, 0.25, 0, 0])


def test_method_needs_a_warm_start_and_takes_its_nulls() -> None:
    start = sae()

    def view(name: str, weights: SaeWeights, *, warm: bool = True) -> SaeView:
        return SaeView(name, weights.W_dec, alike(), sae=weights, warm_started=warm)

    control, end = view("control", start), trained_on(start, 1)
    others = [view("null", trained_on(start, 2)), view("cold", trained_on(start, 3, 9.0), warm=False)]
    found = measure(ModelPair(control=control, treatment=view("treatment", end), others=others))
    expected = stagewise(start, end, [others[0].sae], alike())
    pd.testing.assert_frame_equal(found["stagewise"], expected)
    assert measure(ModelPair(control=control, treatment=view("cold", end, warm=False), others=others)) == {}
