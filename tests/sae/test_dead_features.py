"""Features that do not fire: the loss that wakes them, and the new start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saeffect.sae.base import SaeConfig
from saeffect.sae.encoder import Encoder
from saeffect.sae.gated import GatedSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae, auxiliary_loss
from saeffect.sae.trainable import StepInputs, TrainableSae
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.step import resample

D_IN, D_SAE, N = 6, 20, 40
X = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(9)) + 0.5
DEAD = torch.tensor([1, 4, 5, 19])
KINDS = [StandardSae, TopKSae, JumpReluSae, GatedSae]


def _sae(kind: type[TrainableSae] = StandardSae) -> TrainableSae:
    sae = kind(SaeConfig(kind.architecture, D_IN, D_SAE, k=3 if kind is TopKSae else None))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return sae


def _used(sae: TrainableSae) -> torch.optim.Optimizer:
    """An optimizer with moments in every entry."""
    optimizer = torch.optim.Adam(sae.leaves().values(), lr=1e-3, fused=True)
    for leaf in sae.leaves().values():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    return optimizer


def _copies(sae: TrainableSae) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in sae.leaves().items()}


ALIVE = torch.tensor([i for i in range(D_SAE) if i not in DEAD.tolist()])
OUT = X + torch.randn(N, D_IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_only_dead_features_change(kind: type[TrainableSae]) -> None:
    sae = _sae(kind)
    optimizer = _used(sae)
    before = _copies(sae)
    moments = {name: dict(optimizer.state[leaf]) for name, leaf in sae.leaves().items()}
    steps = {name: m["step"].clone() for name, m in moments.items()}
    resample(sae, optimizer, DEAD, X, OUT, seed=0)
    for name, leaf in sae.leaves().items():
        state = optimizer.state[leaf]
        assert torch.equal(state["step"], steps[name])
        if name == "b_dec":
            assert torch.equal(leaf, before[name])
            assert (state["exp_avg"] != 0).all()
            continue
        assert torch.equal(leaf[ALIVE], before[name][ALIVE]), name
        assert (leaf[DEAD] != before[name][DEAD]).all(), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (state[moment][DEAD] == 0).all(), name
            assert (state[moment][ALIVE] != 0).all(), name
    for name in sae.vectors:
        assert (getattr(sae, name)[DEAD] == 0).all()


def test_where_they_start() -> None:
    sae = _sae()
    optimizer = _used(sae)
    length = {name: sae.leaves()[name].data[ALIVE].norm(dim=1).mean() for name in ("W_enc", "W_dec")}
    resample(sae, optimizer, DEAD, X, OUT, seed=0)
    directions = torch.nn.functional.normalize(X - sae.b_dec.data, dim=1)
    for name, share in (("W_dec", 1.0), ("W_enc", 0.2)):
        rows = sae.leaves()[name].data[DEAD]
        torch.testing.assert_close(rows.norm(dim=1), (share * length[name]).expand(len(DEAD)))
        cosines = torch.nn.functional.normalize(rows, dim=1) @ directions.T
        torch.testing.assert_close(cosines.max(1).values, torch.ones(len(DEAD)))
    assert len({int(i) for i in cosines.argmax(1)}) == len(DEAD), "each starts at another input"


def test_the_seed_decides() -> None:
    outcomes = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(outcomes))
        sae = _sae()
        resample(sae, _used(sae), DEAD, X, OUT, seed=seed)
        outcomes.append(sae.W_dec.detach().clone())
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_inputs_are_drawn_by_the_square_of_their_loss() -> None:
    """Losses 1, 2, 3 and 0: chances 1/14, 4/14, 9/14 and none."""
    x = torch.eye(4, D_IN)
    sae_out = x.clone()
    sae_out[:, 5] += torch.tensor([1.0, 2.0, 3.0, 0.0]).sqrt()
    drawn = torch.zeros(4)
    for seed in range(700):
        sae = StandardSae(SaeConfig("standard", D_IN, 3))
        sae.W_dec.data.fill_(1.0)
        sae.W_enc.data.fill_(1.0)
        resample(sae, torch.optim.Adam(sae.leaves().values()), torch.tensor([1]), x, sae_out, seed=seed)
        drawn[int(sae.W_dec.data[1].argmax())] += 1
    expected = 700 * torch.tensor([1.0, 4.0, 9.0]) / 14
    assert drawn[3] == 0
    chi_square = float(((drawn[:3] - expected).square() / expected).sum())
    assert chi_square < 13.8  # p = 0.001 with two degrees of freedom


def test_nothing_dead_nothing_changed() -> None:
    sae = _sae()
    optimizer = _used(sae)
    before = _copies(sae)
    resample(sae, optimizer, DEAD[:0], X, OUT, seed=0)
    assert all(torch.equal(leaf, before[name]) for name, leaf in sae.leaves().items())


def test_all_dead_and_fewer_inputs_than_features() -> None:
    sae = _sae()
    resample(sae, _used(sae), torch.arange(D_SAE), X[:3], OUT[:3], seed=0)
    assert all(leaf.isfinite().all() for leaf in sae.leaves().values())
    assert len(torch.unique(sae.W_dec.data.round(decimals=4), dim=0)) == 3


def test_a_perfect_reconstruction_and_an_optimizer_without_moments() -> None:
    sae = _sae()
    resample(sae, torch.optim.SGD(sae.leaves().values(), lr=0.1), DEAD, X, X.clone(), seed=0)
    assert all(leaf.isfinite().all() for leaf in sae.leaves().values())
    assert (sae.b_enc.data[DEAD] == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("k", "share"), [(2, 1.0), (4, 1.0), (10, 0.4)])
def test_the_auxiliary_loss(k: int, share: float, weighted: bool) -> None:
    """Added to what the gradients were: k = 2 of 4 dead features, all 4, or all 4 where 10 are wanted."""
    sae = _sae(TopKSae)
    weight = torch.linspace(0.1, 3, D_SAE).flip(0) if weighted else None
    config = SaeTrainingConfig(architecture="topk", d_sae=D_SAE, k=3, auxiliary_k=k, auxiliary_weight=0.5)
    residual = OUT - X
    for leaf in sae.leaves().values():
        leaf.grad = torch.full_like(leaf, 0.25)
    found = auxiliary_loss(sae, sae.centred(X), residual, StepInputs(config, Encoder(), N, dead=DEAD), weight=weight)
    hidden_pre = ((X - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, DEAD]
    ranked = hidden_pre if weight is None else hidden_pre * weight[DEAD]
    lowest = ranked.sort(dim=1, descending=True).values[:, min(k, 4) - 1 : min(k, 4)]
    acts = hidden_pre * (ranked >= lowest)
    loss = 0.5 * share * (acts @ sae.W_dec[DEAD] - residual).square().sum(1).mean()
    assert float(found) == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for name in sae.leaves():
        expected = getattr(sae, name).grad
        expected = 0.25 + (expected.T if name == "W_enc" else expected)
        torch.testing.assert_close(sae.gradient(name), expected, rtol=1e-4, atol=1e-5)
