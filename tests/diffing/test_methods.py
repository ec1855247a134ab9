"""The registry of diffing methods: its contract, and a method added from outside the package."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.diffing import fates
from saeffect.diffing.coactivity import FiringLog
from saeffect.diffing.methods import METHODS, Method, measure_all, table_names
from saeffect.diffing.pair import ActsOfBoth, ModelPair, ResidualBatch, SaeView
from saeffect.errors import BadFile
from saeffect.sae import ARCHITECTURES
from saeffect.sae.base import SaeConfig
from saeffect.stats.arguments import Resampling

D_IN, D_SAE, ROWS, LENGTH = 8, 40, 12, 10
SHARED = ["feature", "change", "low", "high", "p", "q", "reason"]


def residuals_of(arm: str):
    """Two models that differ along the first dimension."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(ROWS // 4):
        x = torch.randn(4, LENGTH, D_IN, generator=generator)
        x[..., 0] += 3.0 * (arm == "treatment")
        yield ResidualBatch(torch.zeros(4, LENGTH, dtype=torch.int64), x, torch.ones(4, LENGTH, dtype=torch.bool))


def view(name: str, seed: int, model: str = "control") -> SaeView:
    torch.manual_seed(seed)
    sae = ARCHITECTURES["standard"](SaeConfig("standard", D_IN, D_SAE))
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec)
    sae = sae.requires_grad_(False)
    log, fires = FiringLog(D_SAE), torch.zeros(D_SAE)
    for batch in residuals_of(model):
        acts = sae.encode(batch.x).flatten(0, 1)
        log.update(acts)
        fires += (acts > 0).sum(0)
    table = pd.DataFrame({"feature": range(D_SAE), "density": fires.numpy() / (ROWS * LENGTH), "decoder_norm": 1.0})
    return SaeView(name, sae.W_dec.detach(), table, log, sae, warm_started=name != "control")


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    control = view("control", 1)

    def acts_of_both():
        for mine, theirs in zip(residuals_of("control"), residuals_of("treatment"), strict=True):
            yield ActsOfBoth(control.sae.encode(mine.x), control.sae.encode(theirs.x), mine.mask)

    return ModelPair(
        control=control,
        treatment=view("treatment", 2, "treatment"),
        others=[view(f"seed {i}", 3 + i) for i in range(2)],
        acts_of_both=acts_of_both,
        residuals=residuals_of,
        resampling=Resampling(0, 100, 200),
    )


@pytest.fixture(autouse=True)
def _small_strata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fates, "MIN_STRATUM", 10)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_gives_what_it_promises(name: str, pair: ModelPair) -> None:
    method = METHODS[name]
    tables = method.measure(pair)
    assert set(tables) == set(method.tables)
    changes = method.changes(tables[method.tables[0]])
    assert list(changes.columns) == SHARED
    assert set(changes["feature"]) == set(range(D_SAE))
    assert changes["p"].dropna().between(0, 1).all()
    assert (changes["reason"][changes["p"].isna() | changes["change"].isna()] != "").all()
    known = changes.dropna(subset=["low", "high"])
    assert ((known["low"] <= known["change"]) & (known["change"] <= known["high"])).all()


def test_all_methods_are_run_and_name_their_tables(pair: ModelPair) -> None:
    assert list(measure_all(pair)) == table_names()
    assert len(set(table_names())) == len(table_names())
    cold = ModelPair(control=pair.control, treatment=SaeView("cold", pair.treatment.W_dec, pair.treatment.features))
    assert "stagewise" not in measure_all(cold)


def activation_difference(pair: ModelPair) -> dict[str, pd.DataFrame]:
    """How far the mean activation moved along each feature's decoder row; rows of text are the units."""
    means = [
        torch.cat([(batch.x * batch.mask[..., None]).mean(dim=1) for batch in pair.residuals(view.name)])
        for view in (pair.control, pair.treatment)
    ]
    moved = ((means[1] - means[0]) @ torch.nn.functional.normalize(pair.control.W_dec, dim=1).T).double().numpy()
    error = moved.std(axis=0, ddof=1) / np.sqrt(len(moved))
    nan = np.full(len(error), np.nan)
    table = pd.DataFrame({"feature": np.arange(len(error)), "change": moved.mean(axis=0), "p": nan, "q": nan})
    table = table.assign(low=table["change"] - 2 * error, high=table["change"] + 2 * error, reason="no null yet")
    return {"activation_difference": table}


def test_method_from_outside_is_run_with_the_others(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "activation_difference", Method(activation_difference, ("activation_difference",)))
    found = METHODS["activation_difference"].changes(measure_all(pair)["activation_difference"])
    expected = 3.0 * torch.nn.functional.normalize(pair.control.W_dec, dim=1)[:, 0].numpy()
    np.testing.assert_allclose(found["change"], expected, atol=1e-5)


def test_method_that_breaks_the_contract_is_refused(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = pd.DataFrame({"feature": [0]})
    monkeypatch.setitem(METHODS, "bare", Method(lambda _: {"bare": bare}, ("bare",)))
    with pytest.raises(BadFile, match="no column 'change', 'low', 'high', 'p'"):
        measure_all(pair)
    monkeypatch.setitem(METHODS, "bare", Method(lambda _: {"other": bare}, ("bare",)))
    with pytest.raises(BadFile, match="that it does not name: other"):
        measure_all(pair)
