from __future__ import annotations

import math

import pytest
import torch

from saeffect.errors import ShapeMismatch, Undefined
from saeffect.sae.metrics import ReconstructionSums, ce_loss_score, explained_variance

X = torch.tensor([[2.0, 0.0], [0.0, 4.0]])


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (X, 1.0),
        (torch.tensor([[2.0, 1.0], [0.0, 3.0]]), 1 - 2 / 10),  # squared errors 1 + 1, about the mean 1+4+1+4
        (torch.tensor([[1.0, 2.0], [1.0, 2.0]]), 0.0),  # the mean itself
        (torch.zeros(2, 2), 1 - 20 / 10),  # zeros: all of 4 + 16
        (-X, 1 - 80 / 10),
    ],
)
def test_explained_variance_by_hand(out: torch.Tensor, expected: float) -> None:
    assert explained_variance(X, out) == pytest.approx(expected, abs=1e-12)


def test_explained_variance_is_about_the_mean_not_about_zero() -> None:
    shifted = X + 100
    assert explained_variance(shifted, shifted.mean(0).expand(2, 2)) == pytest.approx(0.0, abs=1e-9)


def test_large_sums_keep_their_digits() -> None:
    """In float32 or bfloat16 sums the variance about a far mean would drown."""
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(4096, 4, generator=generator)
    out = x + 0.5 * torch.randn(4096, 4, generator=generator)
    expected = 1 - float((x.double() - out.double()).square().sum()) / float(
        (x.double() - x.double().mean(0)).square().sum()
    )
    assert explained_variance(x, out) == pytest.approx(expected, rel=1e-6)


def test_batches_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 3, generator=generator) + torch.tensor([5.0, 0.0, -2.0])
    y = x + 0.1 * torch.randn(100, 3, generator=generator)
    acts = torch.randn(100, 7, generator=generator).relu()
    whole, parts = ReconstructionSums(3), ReconstructionSums(3)
    whole.add(x, y, acts)
    for at in ([0, 1], [1, 37], [37, 100]):
        parts.add(x[slice(*at)], y[slice(*at)], acts[slice(*at)])
    assert parts.n_tokens == whole.n_tokens == 100
    assert parts.explained_variance() == pytest.approx(whole.explained_variance(), rel=1e-12)
    assert parts.l2_ratio() == pytest.approx(whole.l2_ratio(), rel=1e-12)
    assert parts.l0() == whole.l0() == float((acts > 0).sum()) / 100


def test_l0_and_l2_ratio_by_hand() -> None:
    sums = ReconstructionSums(2)
    sums.add(
        torch.tensor([[3.0, 4.0], [0.0, 2.0]]),
        torch.tensor([[3.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]),
    )
    assert sums.l2_ratio() == pytest.approx((3 / 5 + 1 / 2) / 2)
    assert sums.l0() == 1.5


@pytest.mark.parametrize("x", [torch.ones(3, 2), torch.zeros(3, 2), torch.full((3, 2), 1e8), torch.ones(1, 2)])
def test_no_variance_no_value(x: torch.Tensor) -> None:
    with pytest.raises(Undefined):
        explained_variance(x, x)


def test_no_tokens_no_value() -> None:
    sums = ReconstructionSums(2)
    with pytest.raises(Undefined):
        sums.explained_variance()
    assert math.isnan(sums.l0())
    assert math.isnan(sums.l2_ratio())


@pytest.mark.parametrize(("a", "b"), [((3, 2), (3, 1)), ((3, 2), (2, 2)), ((2,), (2,)), ((1, 3, 2), (1, 3, 2))])
def test_shapes_must_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch):
        explained_variance(torch.ones(a), torch.ones(b))


@pytest.mark.parametrize(
    ("clean", "sae", "zero", "expected"),
    [
        (3.0, 3.0, 8.0, 1.0),
        (3.0, 8.0, 8.0, 0.0),
        (3.0, 3.5, 8.0, 0.9),
        (3.0, 9.0, 8.0, -0.2),
        (3.0, 2.5, 8.0, 1.1),
    ],
)
def test_ce_loss_score_by_hand(clean: float, sae: float, zero: float, expected: float) -> None:
    assert ce_loss_score(clean, sae, zero) == pytest.approx(expected)


def test_ce_loss_score_needs_a_hook_that_matters() -> None:
    with pytest.raises(Undefined):
        ce_loss_score(3.0, 3.0, 3.0)
