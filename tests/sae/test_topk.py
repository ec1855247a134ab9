"""The gradients written out by hand are those of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saeffect.sae.base import SaeConfig
from saeffect.sae.topk import TopKSae

D_IN, D_SAE, K, N = 6, 24, 4, 10
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
X = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(9))
NONE = torch.zeros(0, dtype=torch.int64)


def _sae() -> TopKSae:
    sae = TopKSae(SaeConfig("topk", D_IN, D_SAE, k=K))
    sae.initialise(X.mean(0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in NAMES:
            p = getattr(sae, name)
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return sae


def _main_loss(sae: TopKSae) -> Tensor:
    return (sae(X) - X).square().sum(1).mean()


def _auxiliary_loss(sae: TopKSae, dead: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(mean squared error of the dead features on what is left over, the size of what is left over)."""
    left = (X - sae(X)).detach()
    hidden_pre = (X - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead]
    values, indices = hidden_pre.topk(min(k, len(dead)), dim=1)
    acts = torch.zeros_like(hidden_pre).scatter(1, indices, values.relu())
    return (acts @ sae.W_dec[dead] - left).square().sum(1).mean(), left.square().sum(1).mean()


def _gradients(sae: TopKSae) -> dict[str, Tensor]:
    return {name: getattr(sae, name).grad.clone() for name in NAMES}


def _autograd(sae: TopKSae, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [getattr(sae, name) for name in NAMES])
    return dict(zip(NAMES, found, strict=True))


def test_main_loss() -> None:
    sae = _sae()
    loss = _main_loss(sae)
    step = sae.accumulate_gradients(X, dead=NONE, k_auxiliary=3, auxiliary_weight=0.5)
    torch.testing.assert_close(_gradients(sae), _autograd(sae, loss), rtol=1e-4, atol=1e-5)
    acts = sae.encode(X)
    assert step.mse == pytest.approx(loss.item(), rel=1e-5)
    assert step.auxiliary == 0.0
    assert torch.equal(step.fired, (acts > 0).any(0))
    assert step.l0 == pytest.approx(float((acts > 0).sum()) / N)


@pytest.mark.parametrize(("dead", "k"), [([0, 3, 5, 7, 11], 2), ([2, 9], 8), (list(range(D_SAE)), 5)])
def test_with_dead_features(dead: list[int], k: int) -> None:
    sae, index = _sae(), torch.tensor(dead)
    auxiliary, size = _auxiliary_loss(sae, index, k)
    loss = _main_loss(sae) + 0.5 * auxiliary
    step = sae.accumulate_gradients(X, dead=index, k_auxiliary=k, auxiliary_weight=0.5)
    torch.testing.assert_close(_gradients(sae), _autograd(sae, loss), rtol=1e-4, atol=1e-5)
    assert step.auxiliary == pytest.approx((auxiliary / size).item(), rel=1e-5)


def test_pre_activations_below_zero_take_no_part() -> None:
    sae = _sae()
    with torch.no_grad():
        sae.b_enc -= 2.5  # leaves fewer than k positive ones for some tokens
    assert 0 < (sae.encode(X) > 0).sum() < N * K
    loss = _main_loss(sae)
    step = sae.accumulate_gradients(X, dead=NONE, k_auxiliary=1, auxiliary_weight=0.0)
    torch.testing.assert_close(_gradients(sae), _autograd(sae, loss), rtol=1e-4, atol=1e-5)
    assert step.l0 < K


def test_gradients_replace_those_of_the_step_before() -> None:
    sae = _sae()
    arguments: dict[str, Any] = {"dead": torch.tensor([1, 2]), "k_auxiliary": 1, "auxiliary_weight": 0.5}
    sae.accumulate_gradients(X, **arguments)
    first = _gradients(sae)
    sae.accumulate_gradients(X, **arguments)
    torch.testing.assert_close(_gradients(sae), first, rtol=0, atol=0)


def test_decoder_rows_keep_their_length() -> None:
    sae = _sae()
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    sae.accumulate_gradients(X, dead=NONE, k_auxiliary=1, auxiliary_weight=0.0)
    sae.remove_parallel_gradient()
    assert sae.W_dec.grad is not None
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-5
    assert sae.W_dec.grad.abs().max() > 1e-3


def test_initialisation() -> None:
    a, b, c = (TopKSae(SaeConfig("topk", D_IN, D_SAE, k=K)) for _ in range(3))
    torch.manual_seed(7)
    a.initialise(torch.full((D_IN,), 2.0), seed=3)
    torch.manual_seed(8)
    b.initialise(torch.full((D_IN,), 2.0), seed=3)
    c.initialise(torch.full((D_IN,), 2.0), seed=4)
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, c.W_dec)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(a.W_enc, a.W_dec.T)
    assert (a.b_dec == 2).all()
    assert (a.b_enc == 0).all()
