"""Latent scaling by hand, against least squares, on planted factors, and what it may call a feature of one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from saeffect.diffing.latent_scaling import KINDS, LatentScaling, against_nulls, null_cuts
from saeffect.errors import ConfigError, EmptySelection, IncompatibleSae, ShapeMismatch
from saeffect.sae import L1CrosscoderSae, StandardSae
from saeffect.sae.base import SaeConfig

D, N = 24, 20
FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0)


def _crosscoder(base: Tensor, tuned: Tensor, bias: float = 0.0) -> L1CrosscoderSae:
    """Decoders `[d_sae, d]`; what is read is the base model's half and the tuned one's alike."""
    sae = L1CrosscoderSae(SaeConfig("crosscoder_l1", 2 * base.shape[1], len(base)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([base, tuned], dim=1))
        sae.W_enc.copy_(sae.W_dec.T / sae.W_dec.square().sum(dim=1))
        sae.b_enc.fill_(bias)
    return sae


def _random(seed: int) -> L1CrosscoderSae:
    generator = torch.Generator().manual_seed(seed)
    sae = _crosscoder(torch.randn(N, D, generator=generator), torch.randn(N, D, generator=generator))
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(2 * D, generator=generator))
    return sae


def _text(seed: int, n_rows: int = 6, n_tokens: int = 11) -> Tensor:
    return torch.randn(n_rows, n_tokens, D, generator=torch.Generator().manual_seed(seed)) * 3


def _measured(sae: L1CrosscoderSae, base: Tensor, tuned: Tensor, mask: Tensor | None = None) -> pd.DataFrame:
    scaling = LatentScaling(sae)
    scaling.add(base, tuned, mask)
    return scaling.result()


def test_by_hand() -> None:
    """One feature along (1, 0) in base and along (2, 0) in tuned, with activation 1, 2 and 0."""
    sae = _crosscoder(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    base = torch.tensor([[[1.0, 5.0], [2.0, -5.0]], [[0.0, 1.0], [1.0, 0.0]]])
    tuned = torch.tensor([[[2.0, 5.0], [4.0, -5.0]], [[0.0, 1.0], [2.0, 0.0]]])
    row = _measured(sae, base, tuned).loc[0]
    # Its direction is (2, 0), the longer: half of it is in base, all of it in tuned.
    assert row[["error_base", "error_tuned", "error_nu"]].tolist() == pytest.approx([0.5, 1.0, 0.5])
    assert row[["presence_base", "presence_tuned"]].tolist() == pytest.approx([0.5, 1.0])
    assert row["reconstruction_base"] == pytest.approx(0.0)
    assert row["lean"] == pytest.approx(1 / 3)
    assert (row["density"], row["n_rows"], row["norm_share"]) == (0.75, 2, pytest.approx(2 / 3))
    # Of activation 1 in the mean per token, base adds half of the length 2.
    assert row[["mean_base", "mean_tuned", "difference"]].tolist() == pytest.approx([1.0, 2.0, 1.0])


def test_factors_are_those_of_least_squares() -> None:
    sae, base, tuned = _random(1), _text(2), _text(3)
    table = _measured(sae, base, tuned)
    x = torch.cat([base, tuned], dim=2).flatten(0, 1)
    with torch.no_grad():
        f, rebuilt = sae.encode(x).double().numpy(), sae(x).double().numpy()
    W_dec, b_dec = sae.W_dec.detach().double().numpy(), sae.b_dec.detach().double().numpy()
    for which, name in ((0, "base"), (1, "tuned")):
        part = slice(which * D, (which + 1) * D)
        for j in (0, 7, 19):
            own, norms = W_dec[j].reshape(2, D), np.linalg.norm(W_dec[j].reshape(2, D), axis=1)
            regressor = np.outer(f[:, j], own[norms.argmax()]).ravel()[:, None]
            without = rebuilt[:, part] - np.outer(f[:, j], own[which])
            targets = {
                "error": x.double().numpy()[:, part] - without,
                "reconstruction": without - b_dec[part],
                "presence": x.double().numpy()[:, part] - b_dec[part],
            }
            for target, y in targets.items():
                expected = np.linalg.lstsq(regressor, y.ravel(), rcond=None)[0][0]
                assert table.loc[j, f"{target}_{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_batches_and_masks_add_up() -> None:
    sae, base, tuned = _random(1), _text(2), _text(3)
    mask = torch.rand(base.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.3
    whole = _measured(sae, base, tuned, mask)
    parts = LatentScaling(sae)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.add(base[rows], tuned[rows], mask[rows])
    pd.testing.assert_frame_equal(parts.result(), whole)
    unmasked = _measured(sae, base, tuned)
    assert (unmasked["presence_nu"] - whole["presence_nu"]).abs().max() > 0.01


def _planted(seed: int, factors: Tensor, n_rows: int = 60) -> tuple[L1CrosscoderSae, Tensor, Tensor]:
    """A crosscoder that knows the directions, and text on which tuned has each of them scaled by its factor."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(D, N, generator=generator))[0].T.contiguous()
    on = torch.rand(n_rows, 20, N, generator=generator) < 0.1
    f = on * (4 + torch.rand(n_rows, 20, N, generator=generator))
    noise = [0.3 * torch.randn(n_rows, 20, D, generator=generator) for _ in range(2)]
    sae = _crosscoder(rows, rows * factors[:, None], bias=-1.5)
    return sae, f @ rows + noise[0], (f * factors) @ rows + noise[1]


def test_planted_factors_are_recovered() -> None:
    factors = torch.tensor(FACTORS).repeat(N // len(FACTORS))
    table = _measured(*_planted(0, factors))
    expected = factors.double().numpy()
    np.testing.assert_allclose(table["presence_tuned"] / table["presence_base"], expected, atol=0.05)
    np.testing.assert_allclose(table["error_tuned"] / table["error_base"], expected, atol=0.05)
    lean = (expected - 1) / (expected + 1)
    np.testing.assert_allclose(table["lean"], lean, atol=0.05)
    inside = (table["low"] <= lean) & (lean <= table["high"])
    assert inside.mean() >= 0.8
    nulls = [_measured(*_planted(seed, torch.ones(N))) for seed in range(1, 16)]
    kind = against_nulls(table, nulls)["kind"].to_numpy()
    for factor, name in ((0.0, "base only"), (0.25, "more in base"), (0.5, "more in base"), (2.0, "more in tuned")):
        assert set(kind[expected == factor]) == {name}
    assert (kind[expected == 1.0] == "shared").mean() >= 0.75


def test_identical_models_have_no_feature_of_their_own() -> None:
    sae, base = _random(1), _text(2)
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec[:, :D].repeat(1, 2))
        sae.b_dec.copy_(sae.b_dec[:D].repeat(2))
        sae.b_enc.fill_(-0.2)
    table = _measured(sae, base, base)
    known = table["reason"] == ""
    assert known.sum() > 10
    np.testing.assert_allclose(table.loc[known, ["lean", "low", "high", "difference"]], 0.0, atol=1e-6)
    np.testing.assert_allclose(table.loc[known, "presence_nu"], 1.0, atol=1e-6)
    judged = against_nulls(table, [_measured(_random(2), _text(4), _text(5))])
    assert set(judged.loc[known, "kind"]) == {"shared"}
    assert judged.loc[known, "p"].min() > 0.3


def test_concept_split_over_two_features_is_shared() -> None:
    """Its decoders say base only and tuned only; the activations say that both models have it."""
    row = torch.zeros(1, D)
    row[0, 0] = 1.0
    sae = _crosscoder(torch.cat([row, 0 * row]), torch.cat([0 * row, row]))
    f = 1 + torch.rand(30, 8, 1, generator=torch.Generator().manual_seed(0))
    table = _measured(sae, f @ row, f @ row)
    assert table["norm_share"].tolist() == [0.0, 1.0]
    np.testing.assert_allclose(table["lean"], 0.0, atol=1e-6)
    np.testing.assert_allclose(table["error_base"], [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(table["reconstruction_base"], [0.0, 1.0], atol=1e-6)


def test_what_cannot_be_said_has_a_reason() -> None:
    sae = _random(1)
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    table = _measured(sae, _text(2)[:1], _text(3)[:1])
    assert table.loc[3, "reason"] == "it does not fire on this text"
    assert np.isnan(table.loc[3, "lean"])
    assert (table.loc[table["n_rows"] == 1, "reason"].str.len() > 0).all()
    assert table.loc[table["n_rows"] == 1, ["low", "high"]].isna().all(axis=None)
    judged = against_nulls(table, [])
    assert judged[["p", "q"]].isna().all(axis=None)
    assert "there are no null fine-tunes to judge by" in set(
        against_nulls(_measured(sae, _text(2), _text(3)), [])["reason"]
    )
    assert set(judged["kind"]) == {""}


def test_mistakes(complains: Callable[..., Any]) -> None:
    with complains(IncompatibleSae, "needs a crosscoder"):
        LatentScaling(StandardSae(SaeConfig("standard", 4, 3)))
    scaling = LatentScaling(_random(1))
    with complains(ShapeMismatch, "expected the same"):
        scaling.add(_text(1), _text(1)[:3])
    with complains(EmptySelection, "no token counts"):
        scaling.result()
    with complains(EmptySelection, "no nulls"):
        null_cuts([])
    with complains(ConfigError, "between 0 and 1"):
        null_cuts([pd.DataFrame({"lean": [0.0], "chance": [0.0]})], rate=1.0)


def _null(seed: int, n: int) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    return pd.DataFrame({"lean": generator.standard_t(3, n) / 50, "chance": np.abs(generator.normal(0, 0.02, n))})


def _alarms(n_studies: int, n: int) -> float:
    found = []
    for seed in range(n_studies):
        cuts = null_cuts([_null(10 * seed + i, n) for i in range(4)], rate=0.05)
        new = _null(10 * seed + 9, n)["lean"]
        found.append(((new < cuts.base) | (new > cuts.tuned)).mean())
    return float(np.mean(found))


def test_cuts_by_hand() -> None:
    cuts = null_cuts([pd.DataFrame({"lean": [-3.0, 1.0, np.nan, 2.0, 0.0], "chance": 0.1})], rate=0.5)
    assert (cuts.base, cuts.tuned, cuts.absent) == (-3.0, 2.0, 0.1)
    assert null_cuts([pd.DataFrame({"lean": [0.1], "chance": [0.1]})]).tuned == 1.0, "one feature shows no 5 %"
    assert np.isnan(cuts.realised).all()
    assert len(KINDS) == 5


def test_false_alarms_in_brief() -> None:
    assert 0.03 < _alarms(20, 100) < 0.06


@pytest.mark.simulation
def test_false_alarms() -> None:
    assert 0.045 < _alarms(400, 100) < 0.055
