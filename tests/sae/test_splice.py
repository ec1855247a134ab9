from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from saeffect.errors import ShapeMismatch
from saeffect.lm.activations import NormLimit, kept_positions, measure_norm_limit
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig
from saeffect.sae.splice import spliced_losses
from saeffect.sae.standard import StandardSae

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
