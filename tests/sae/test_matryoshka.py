"""Matryoshka: every nested loss and all gradients are SAELens', whichever widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.matryoshka import MatryoshkaSae
from saeffect.sae.training.config import SaeTrainingConfig

from .saelens_steps import (
    D_SAE,
    DEAD,
    OPTIONS,
    K,
    N,
    X,
    assert_same_gradients,
    random_sae,
    step_inputs,
    their_step,
    their_training_sae,
)

WIDTHS = (6, 13, 30, D_SAE)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "raw input", "rescaled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("dead", [DEAD[:0], DEAD], ids=["none dead", "many dead"])
def test_a_step_is_saelens(options: dict[str, Any], dtype: str, dense: bool, dead: Tensor) -> None:
    sae = random_sae(MatryoshkaSae, **options)
    theirs = their_training_sae("MatryoshkaBatchTopK", sae, matryoshka_widths=list(WIDTHS), topk_threshold_lr=0.2)
    step = step_inputs(sae, dead=dead, dense=dense, encoder_dtype=dtype, matryoshka_widths=WIDTHS, threshold_rate=0.2)
    for _ in range(2):
        expected = their_step(theirs, dead)
        result = sae.accumulate_gradients(X, step)
    assert list(result.losses)[:4] == ["mse", "inner_mse_6", "inner_mse_13", "inner_mse_30"]
    assert ("auxiliary" in result.losses) == bool(len(dead))
    names = {"auxiliary": "auxiliary_reconstruction_loss"}
    for name, loss in result.losses.items():
        theirs_too = expected.losses[names.get(name, name.replace("mse", "mse_loss"))]
        assert float(loss) == pytest.approx(theirs_too.item(), rel=1e-5)
    assert sum(map(float, result.losses.values())) == pytest.approx(expected.loss.item(), rel=1e-5)
    assert_same_gradients(sae, theirs)
    torch.testing.assert_close(result.sae_out, expected.sae_out)
    assert torch.equal(result.fired, (expected.feature_acts > 0).sum(0))
    assert float(sae.topk_threshold) == pytest.approx(float(theirs.topk_threshold), rel=1e-6)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_a_group_that_is_off_everywhere(dense: bool) -> None:
    sae = random_sae(MatryoshkaSae)
    with torch.no_grad():
        sae.b_enc[6:13] = -100.0
    theirs = their_training_sae("MatryoshkaBatchTopK", sae, matryoshka_widths=list(WIDTHS))
    their_step(theirs, DEAD[:0])
    step = step_inputs(sae, dense=dense, matryoshka_widths=WIDTHS)
    for name in ("W_enc", "W_dec", "b_enc"):
        sae.gradient(name).fill_(7.0)  # what an earlier step left
    result = sae.accumulate_gradients(X, step)
    assert int(result.fired[6:13].sum()) == 0
    assert (sae.gradient("W_dec")[6:13] == 0).all()
    assert float(result.losses["inner_mse_13"]) == pytest.approx(float(result.losses["inner_mse_6"]))
    assert_same_gradients(sae, theirs)


def test_one_width_is_batchtopk() -> None:
    from saeffect.sae.batchtopk import BatchTopKSae

    nested, plain = random_sae(MatryoshkaSae), random_sae(BatchTopKSae)
    found = nested.accumulate_gradients(X, step_inputs(nested, dead=DEAD, matryoshka_widths=(D_SAE,)))
    expected = plain.accumulate_gradients(X, step_inputs(plain, dead=DEAD))
    assert list(found.losses) == list(expected.losses)
    for name, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[name], loss)
    for name in plain.leaves():
        torch.testing.assert_close(nested.gradient(name), plain.gradient(name))


def test_features_in_front_learn_from_every_nested_loss() -> None:
    """By hand: one token, feature 0 in both SAEs, feature 1 in the wider one alone."""
    from saeffect.sae.base import SaeConfig
    from saeffect.sae.encoder import Encoder
    from saeffect.sae.trainable import StepInputs

    sae = MatryoshkaSae(SaeConfig("matryoshka", 1, 2, k=2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.5]]))
        sae.W_dec.copy_(torch.tensor([[0.5], [0.5]]))
    config = SaeTrainingConfig(architecture="matryoshka", d_sae=2, k=2, matryoshka_widths=(1, 2))
    result = sae.accumulate_gradients(torch.tensor([[4.0]]), StepInputs(config, Encoder(), 1))
    # acts 4 and 2: 2 alone, 3 together; the input is 4
    assert {name: float(loss) for name, loss in result.losses.items()} == {"mse": 1.0, "inner_mse_1": 4.0}
    assert result.sae_out.item() == 3.0
    assert sae.gradient("W_dec").flatten().tolist() == [4 * (2 * -1 + 2 * -2), 2 * (2 * -1)]
    assert sae.gradient("b_enc").tolist() == [0.5 * -6, 0.5 * -2]


def test_the_default_widths_halve() -> None:
    sae = random_sae(MatryoshkaSae)
    result = sae.accumulate_gradients(X, step_inputs(sae))
    assert list(result.losses) == ["mse", "inner_mse_6", "inner_mse_12", "inner_mse_24"]


def test_it_is_saved_as_a_jumprelu_sae() -> None:
    sae = random_sae(MatryoshkaSae, rescale_acts_by_decoder_norm=True)
    acts = sae.encode(X)
    assert int((acts > 0).sum()) == N * K
    sae.topk_threshold.copy_(acts[acts > 0].min() * (1 - 1e-6))
    inference = sae.for_inference()
    assert type(inference) is JumpReluSae
    torch.testing.assert_close(inference(X), sae(X))
