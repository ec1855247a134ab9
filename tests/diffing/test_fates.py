"""Fates: planted ones are found, none are invented, and what cannot be judged says so."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.diffing import fates as module
from saeffect.diffing.coactivity import FiringLog, match_activity
from saeffect.diffing.fates import fates
from saeffect.diffing.matching import Matching, Neighbours, match_decoders
from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import Resampling

N, D_IN = 1200, 48
FEW = Resampling(0, 400, 100)


RARE = np.arange(N) % 2 == 0


@pytest.fixture(autouse=True)
def _small_strata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_STRATUM", 100)


def traits(seed: int, n: int = N) -> pd.DataFrame:
    rng = np.random.default_rng([seed, 1])
    density = np.exp(rng.normal(np.where(RARE[:n], -9, -5), 0.3))
    return pd.DataFrame({"density": density, "decoder_norm": rng.lognormal(0, 0.1, n)})


def seeds(n_saes: int, seed: int = 0, missed_share: float = 0.5) -> list[torch.Tensor]:
    """Decoders of SAEs of one model: frequent features are found again with noise, rare ones often not."""
    rng = np.random.default_rng([seed, 2])
    true = rng.normal(size=(N, D_IN))
    saes = []
    for _ in range(n_saes):
        rows = true + rng.normal(size=true.shape) * rng.uniform(0.1, 0.4, (N, 1))
        missed = RARE & (rng.random(N) < missed_share)
        rows[missed] = rng.normal(size=(int(missed.sum()), D_IN))
        saes.append(torch.tensor(rows, dtype=torch.float32))
    return saes


def judge(
    control: torch.Tensor, treatment: torch.Tensor, placebos: list[torch.Tensor], features: pd.DataFrame | None = None
):
    table = traits(0) if features is None else features
    return fates(
        match_decoders(control, treatment, n=3),
        [match_decoders(control, one, n=3) for one in placebos],
        control_features=table,
        treatment_features=table,
        placebo_features=[table] * len(placebos),
        resampling=FEW,
    )


@pytest.mark.parametrize("n_placebos", [1, 3])
def test_finds_planted_losses_among_rare_features(n_placebos: int) -> None:
    control, treatment, *placebos = seeds(2 + n_placebos)
    rng = np.random.default_rng(5)
    gone = rng.permutation(np.flatnonzero(~RARE))[:100]
    treatment[gone] = torch.tensor(rng.normal(size=(100, D_IN)), dtype=torch.float32)
    found = judge(control, treatment, placebos)
    fate = found.control["fate"]
    assert (fate[gone] == "gone").mean() > 0.7
    called = np.flatnonzero(fate.isin(["gone", "moved"]))
    # A single draw: over many the share of false ones is 2 to 3 %.
    assert len(np.setdiff1d(called, gone)) <= 0.15 * len(called)
    assert (fate[np.setdiff1d(np.flatnonzero(~RARE), gone)] == "kept").mean() > 0.9
    counts = found.counts.set_index(["side", "fate"])
    for row in (counts.loc[("control", "gone")], counts.loc[("treatment", "new")]):
        assert 0 < row["low"] < 100 < row["high"] + 25
    assert counts.loc[("control", "kept"), "high"] < 0
    assert counts.loc[("control", "gone"), "called"] == (fate == "gone").sum()


def test_turned_feature_has_moved() -> None:
    control, treatment, placebo = seeds(3, missed_share=0)
    unit = torch.nn.functional.normalize
    fresh = torch.randn(80, D_IN, generator=torch.Generator().manual_seed(1))
    treatment[:80] = unit(control[:80], dim=1) + 1.1 * unit(fresh, dim=1)
    fate = judge(control, treatment, [placebo]).control["fate"]
    assert (fate[:80] == "moved").mean() > 0.7
    assert fate[80:].isin(["gone", "moved"]).sum() <= 8
    assert (fate[80:] == "kept").mean() > 0.9


def test_new_features_are_called_where_seeds_match_well() -> None:
    rng = np.random.default_rng(6)
    true = rng.normal(size=(N, D_IN))
    control, treatment, placebo = (
        torch.tensor(true + 0.2 * rng.normal(size=true.shape), dtype=torch.float32) for _ in range(3)
    )
    treatment[:150] = torch.tensor(rng.normal(size=(150, D_IN)), dtype=torch.float32)
    found = judge(control, treatment, [placebo])
    assert (found.treatment["fate"][:150] == "new").mean() > 0.9
    assert (found.treatment["fate"][150:] == "new").sum() <= 10


def made_up(rng: np.random.Generator, found_again: np.ndarray) -> Matching:
    """A matching of an SAE that finds each feature again with its own odds: similarities alone, drawn directly."""

    def side() -> Neighbours:
        n = len(found_again)
        absent = rng.normal(0.3, 0.05, (n, 2))
        best = np.where(rng.random(n) < found_again, 1 - rng.gamma(1, 0.04, n), absent[:, 0])
        similarity = np.stack([best, np.minimum(best, absent[:, 1])], axis=1)
        return Neighbours(np.zeros((n, 2), dtype=np.int64), similarity, ("",) * n)

    return Matching("decoder cosine", side(), side())


@pytest.mark.simulation
@pytest.mark.parametrize("n_placebos", [1, 3])
def test_another_seed_has_no_calls(n_placebos: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MARGIN", 0)
    lost = new = excess = 0
    n_studies = 60
    for seed in range(n_studies):
        rng = np.random.default_rng([seed, n_placebos])
        table = traits(seed, 600)
        matchings = [made_up(rng, np.where(RARE[:600], 0.6, 0.99)) for _ in range(1 + n_placebos)]
        found = fates(
            matchings[0],
            matchings[1:],
            control_features=table,
            treatment_features=table,
            placebo_features=[table] * n_placebos,
            resampling=Resampling(seed, 200, 100),
        )
        lost += bool(found.control["fate"].isin(["gone", "moved"]).any())
        new += bool(found.treatment["fate"].isin(["new", "moved"]).any())
        gone = found.counts.set_index(["side", "fate"]).loc[("control", "gone")]
        excess += not gone["low"] <= 0 <= gone["high"]
    most = n_studies * (0.05 + 2 * np.sqrt(0.05 * 0.95 / n_studies))
    assert max(lost, new, excess) <= most


def test_rare_features_that_match_badly_anyway_are_not_gone() -> None:
    control, treatment, placebo = seeds(3, 8)
    found = judge(control, treatment, [placebo])
    rare = found.control[RARE]
    assert (rare["similarity"] < rare["chance_at"]).mean() > 0.3
    assert set(rare["fate"]) <= {"kept", "unclear"}
    assert abs(found.drift) < 0.02


def test_without_a_placebo_nothing_is_said() -> None:
    control, treatment = seeds(2)
    found = judge(control, treatment, [])
    assert set(found.control["fate"]) == {""}
    assert found.control[["p", "q", "kept_at", "chance_at"]].isna().all().all()
    assert found.control["similarity"].notna().all()
    assert found.counts["reason"].str.contains("no placebo arm").all()
    assert found.counts[["called", "n_treatment", "n_placebo", "excess", "low", "high"]].isna().all().all()
    assert np.isnan(found.drift)
    full = judge(*seeds(3)[:2], seeds(3)[2:])
    assert list(found.control.columns) == list(full.control.columns)
    assert list(found.treatment.columns) == list(full.treatment.columns)
    assert list(found.counts.columns) == list(full.counts.columns)


def test_features_without_an_answer_say_why() -> None:
    control, treatment, placebo = seeds(3)
    control[3] = 0
    table = traits(0)
    table.loc[1, "density"] = 0.0
    table.loc[2, "decoder_norm"] = np.nan
    found = judge(control, treatment, [placebo], table)
    assert found.control["reason"][1] == "it never fires on this text"
    assert found.control["reason"][2] == "a trait is unknown"
    assert found.control["reason"][3] == "its decoder is zero"
    assert found.control.loc[1:3, ["p", "q"]].isna().all().all()
    assert set(found.control["fate"][1:4]) == {""}
    assert found.counts["n_features"].tolist() == [N - 3] * 3 + [N - 2] * 3


def test_one_neighbour_cannot_tell_moved_from_gone() -> None:
    control, treatment, placebo = seeds(3)
    one = [match_decoders(control, other, n=1) for other in (treatment, placebo)]
    found = fates(
        one[0],
        one[1:],
        control_features=traits(0),
        treatment_features=traits(0),
        placebo_features=[traits(0)],
    )
    assert found.control["reason"].str.contains("second-best").all()
    assert set(found.control["fate"]) == {""}
    assert found.counts["excess"].isna().all()


def test_no_feature_firing_along_is_a_similarity_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_STRATUM", 60)
    generator = torch.Generator().manual_seed(0)
    n, n_tokens = 60, 4000
    base = torch.relu(torch.randn(n_tokens, n, generator=generator) - 2)
    logs = []
    for lost in (0, 24, 0):
        values = base * (1 + 0.1 * torch.rand(n_tokens, n, generator=generator))
        values[:, :lost] = 0
        log = FiringLog(n)
        log.update(values)
        logs.append(log)
    matchings = [match_activity(logs[0], one, n=2, min_coactive=30) for one in logs[1:]]
    table = pd.DataFrame({"density": (base > 0).float().mean(dim=0).double().numpy(), "decoder_norm": 1.0})
    found = fates(
        matchings[0],
        matchings[1:],
        control_features=table,
        treatment_features=table,
        placebo_features=[table],
        resampling=FEW,
    )
    assert (found.control["similarity"][:24] == 0).all()
    assert set(found.control["fate"][:24]) <= {"gone", "moved"}
    assert set(found.control["fate"][24:]) <= {"kept", "unclear"}
    assert found.treatment["reason"][0] == "it never fires on this text"


def test_bad_input() -> None:
    matching: Matching = match_decoders(*seeds(2))
    bare = traits(0)[["density"]]
    with pytest.raises(ShapeMismatch, match="no column decoder_norm"):
        fates(matching, [matching], control_features=bare, treatment_features=bare, placebo_features=[bare])
