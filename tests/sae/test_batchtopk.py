"""BatchTopK: losses, gradients and threshold are SAELens'; the selection is over the batch of all processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saeffect.sae.batchtopk import BatchTopKSae
from saeffect.sae.jumprelu import JumpReluSae

from .saelens_steps import (
    DEAD,
    OPTIONS,
    WEIGHTS,
    K,
    N,
    X,
    assert_same_gradients,
    random_sae,
    step_inputs,
    their_step,
    their_training_sae,
)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "raw input", "rescaled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("dead", [DEAD[:0], DEAD[:2], DEAD], ids=["none dead", "two dead", "many dead"])
def test_a_step_is_saelens(options: dict[str, Any], dtype: str, dense: bool, dead: Tensor) -> None:
    sae = random_sae(BatchTopKSae, **options)
    theirs = their_training_sae("BatchTopK", sae, topk_threshold_lr=0.2)
    step = step_inputs(sae, dead=dead, dense=dense, encoder_dtype=dtype, threshold_rate=0.2)
    for _ in range(2):  # twice: gradients are made anew, the threshold goes on
        expected = their_step(theirs, dead)
        result = sae.accumulate_gradients(X, step)
    assert float(result.losses["mse"]) == pytest.approx(expected.losses["mse_loss"].item(), rel=1e-5)
    auxiliary = expected.losses["auxiliary_reconstruction_loss"].item()
    assert float(result.losses.get("auxiliary", 0.0)) == pytest.approx(auxiliary, rel=1e-5)
    assert (auxiliary > 0) == bool(len(dead))
    assert sum(map(float, result.losses.values())) == pytest.approx(expected.loss.item(), rel=1e-5)
    assert_same_gradients(sae, theirs)
    torch.testing.assert_close(result.sae_out, expected.sae_out)
    assert torch.equal(result.fired, (expected.feature_acts > 0).sum(0))
    assert int(result.fired.sum()) == N * K
    assert len(set((expected.feature_acts > 0).sum(1).tolist())) > 1, "tokens differ in how many features they use"
    assert float(sae.topk_threshold) == pytest.approx(float(theirs.topk_threshold), rel=1e-6)
    assert float(sae.topk_threshold) > 0.01


def test_pre_activations_below_zero_take_no_part() -> None:
    sae = random_sae(BatchTopKSae)
    with torch.no_grad():
        sae.b_enc -= 3.0
    theirs = their_training_sae("BatchTopK", sae)
    expected = their_step(theirs, DEAD[:0])
    result = sae.accumulate_gradients(X, step_inputs(sae))
    assert 0 < int(result.fired.sum()) < N * K
    assert torch.equal(result.fired, (expected.feature_acts > 0).sum(0))
    assert float(sae.topk_threshold) == pytest.approx(float(theirs.topk_threshold), rel=1e-6)


def test_the_threshold_stays_where_nothing_fires() -> None:
    sae = random_sae(BatchTopKSae)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
        sae.topk_threshold.fill_(0.7)
    result = sae.accumulate_gradients(X, step_inputs(sae))
    assert int(result.fired.sum()) == 0
    assert float(sae.topk_threshold) == 0.7
    torch.testing.assert_close(result.sae_out, sae.b_dec.detach().expand_as(X))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "raw input", "rescaled"])
def test_the_inference_form_is_saelens(options: dict[str, Any]) -> None:
    sae = random_sae(BatchTopKSae, **options)
    theirs = their_training_sae("BatchTopK", sae)
    sae.topk_threshold.fill_(0.37)
    theirs.topk_threshold.fill_(0.37)
    state = theirs.state_dict()
    theirs.process_state_dict_for_saving_inference(state)
    ours = sae.for_inference()
    assert isinstance(ours, JumpReluSae)
    assert ours.cfg.architecture == "jumprelu"
    assert (ours.cfg.k, ours.cfg.rescale_acts_by_decoder_norm) == (None, False)
    assert ours.cfg.apply_b_dec_to_input == options.get("apply_b_dec_to_input", True)
    assert set(state) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.detach(), state[name])
    with torch.no_grad():
        ours.W_dec.zero_()
    assert sae.W_dec.abs().min() > 0, "the inference form is a copy"


def test_batch_threshold_selects_the_same_entries() -> None:
    sae = random_sae(BatchTopKSae, rescale_acts_by_decoder_norm=True)
    acts = sae.encode(X)
    assert int((acts > 0).sum()) == N * K
    sae.topk_threshold.copy_(acts[acts > 0].min() * (1 - 1e-6))
    torch.testing.assert_close(sae.for_inference().encode(X), acts)
    torch.testing.assert_close(sae.for_inference()(X), sae(X))


def test_folding_the_scale_folds_the_threshold() -> None:
    sae = random_sae(BatchTopKSae, rescale_acts_by_decoder_norm=True)
    sae.topk_threshold.fill_(0.5)
    before = sae.for_inference()
    sae.fold_scale(4.0)
    after = sae.for_inference()
    torch.testing.assert_close(after.encode(X / 4) * 4, before.encode(X))
    torch.testing.assert_close(after(X / 4) * 4, before(X))
    assert float(sae.topk_threshold) == 0.125


def test_the_threshold_is_running_state_but_no_leaf() -> None:
    sae = random_sae(BatchTopKSae)
    state = sae.running_state()
    assert set(sae.leaves()) == set(WEIGHTS)
    sae.accumulate_gradients(X, step_inputs(sae, threshold_rate=1.0))
    acts = sae.encode(X)
    assert float(state["topk_threshold"]) == pytest.approx(acts[acts > 0].min().item(), rel=1e-6)
    state["topk_threshold"].fill_(2.0)
    assert (sae.for_inference().threshold == 2.0).all()
