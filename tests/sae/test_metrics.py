from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from saeffect.errors import ShapeMismatch, Undefined
from saeffect.lm.activations import NormLimit, kept_positions, measure_norm_limit
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig
from saeffect.sae.metrics import (
    ReconstructionSums,
    ce_loss_score,
    explained_variance,
    reconstruction,
    spliced_losses,
)
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae

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


def test_reconstruction_by_hand() -> None:
    """Feature 0 of three keeps the first dimension; the second dimension is lost."""
    sae = TopKSae(SaeConfig("topk", 2, 3, k=1))
    with torch.no_grad():
        sae.W_enc[0, 0] = 1.0
        sae.W_dec[0, 0] = 1.0
    found = reconstruction(sae, torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    assert found["explained_variance"] == pytest.approx(1 - 20 / (2 * 1.5**2 + 2 * 1.0**2))
    assert found["l0"] == 0.5
    assert found["l2_ratio"] == pytest.approx((3 / 5 + 0) / 2)
    assert found["dead_share"] == pytest.approx(2 / 3)
    assert found["mean_log10_density"] == pytest.approx((-0.30103 - 10 - 10) / 3, abs=1e-4)
    assert found["n_tokens"] == 2


# With a model

HOOK = "blocks.1.hook_resid_pre"
ROWS = np.random.default_rng(0).integers(1, 320, (5, 8)).astype(np.int32)
IDS = torch.from_numpy(ROWS.astype(np.int64))


@pytest.fixture
def limit(tiny_llama: LanguageModel) -> NormLimit:
    return measure_norm_limit(capture(tiny_llama, HOOK, IDS))


def _identity() -> StandardSae:
    """Feature i is dimension i, feature 32 + i its negative: relu(x) - relu(-x) = x."""
    sae = StandardSae(SaeConfig("standard", 32, 64))
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(32), -torch.eye(32)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
    return sae


def _by_hand(lm: LanguageModel, limit: NormLimit, new: Callable[[Tensor], Tensor]) -> float:
    """The cross-entropy of running the blocks after the hook on replaced activations."""
    kept = kept_positions(capture(lm, HOOK, IDS), limit)[..., None]

    def replace(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.where(kept, new(args[0]), args[0]), *args[1:])

    handle = lm.model.model.layers[1].register_forward_pre_hook(replace)
    try:
        with torch.no_grad():
            logits = lm.model(input_ids=IDS).logits
    finally:
        handle.remove()
    picked = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
    return -float(picked.mean())


def test_an_sae_that_is_the_identity_loses_nothing(tiny_llama: LanguageModel, limit: NormLimit) -> None:
    losses = spliced_losses(tiny_llama, _identity(), HOOK, ROWS, limit)
    assert losses.sae == pytest.approx(losses.clean, rel=1e-6)
    assert losses.ce_loss_score == pytest.approx(1.0, abs=1e-4)
    assert losses.zero != losses.clean


def test_an_sae_that_gives_zeros_keeps_nothing(tiny_llama: LanguageModel, limit: NormLimit) -> None:
    losses = spliced_losses(tiny_llama, StandardSae(SaeConfig("standard", 32, 64)), HOOK, ROWS, limit)
    assert losses.sae == losses.zero
    assert losses.ce_loss_score == 0.0


def test_by_hand(tiny_llama: LanguageModel, limit: NormLimit) -> None:
    sae = _identity()
    with torch.no_grad():
        sae.W_dec[5] = 0
        sae.b_dec.fill_(0.1)
    sae.cfg = dataclasses.replace(sae.cfg, apply_b_dec_to_input=False)
    losses = spliced_losses(tiny_llama, sae, HOOK, ROWS, limit, batch_size=2)
    assert losses.n_tokens == 5 * 7
    assert losses.clean == pytest.approx(_by_hand(tiny_llama, limit, lambda x: x), rel=1e-5)
    assert losses.zero == pytest.approx(_by_hand(tiny_llama, limit, torch.zeros_like), rel=1e-5)

    def new(x: Tensor) -> Tensor:
        x = torch.cat([x[..., :5], x[..., 5:6].clamp(max=0), x[..., 6:]], dim=-1)
        return x + 0.1

    assert losses.sae == pytest.approx(_by_hand(tiny_llama, limit, new), rel=1e-5)


def test_positions_that_do_not_count_stay(tiny_llama: LanguageModel) -> None:
    losses = spliced_losses(tiny_llama, _identity(), HOOK, ROWS, NormLimit(0.0, 0.0))
    assert losses.clean == losses.sae == losses.zero


def test_an_sae_of_another_width(tiny_llama: LanguageModel, limit: NormLimit) -> None:
    with pytest.raises(ShapeMismatch):
        spliced_losses(tiny_llama, StandardSae(SaeConfig("standard", 16, 64)), HOOK, ROWS, limit)
    assert sum(len(m._forward_pre_hooks) for m in tiny_llama.model.modules()) == 0
