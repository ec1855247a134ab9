"""Faster LoRA training against PEFT's own, and the loss against PyTorch's."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from saeffect.lm.language_model import LanguageModel
from saeffect.lm.lora import fast_training, next_token_loss

IDS = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(0))


def _adapted(lm: LanguageModel, dtype: torch.dtype, **options: Any) -> tuple[LanguageModel, Any]:
    lm = dataclasses.replace(lm, model=copy.deepcopy(lm.model).to(dtype))
    names = ["q_proj", "v_proj", "down_proj"] if hasattr(lm.model, "model") else ["c_attn", "c_proj"]
    model = get_peft_model(
        lm.model, LoraConfig(r=3, lora_alpha=7, target_modules=names, task_type="CAUSAL_LM", **options)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return lm, model.eval()


def _step(model: Any) -> tuple[float, Tensor]:
    loss = next_token_loss(model(input_ids=IDS, use_cache=False).logits, IDS)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = None
    return float(loss.detach()), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_pefts(tiny_llama: LanguageModel, dtype: torch.dtype) -> None:
    lm, model = _adapted(tiny_llama, dtype)
    loss, gradient = _step(model)
    with fast_training(lm):
        fast_loss, fast_gradient = _step(model)
    rounding = 1e-5 if dtype == torch.float32 else 0.03
    assert fast_loss == pytest.approx(loss, rel=rounding)
    # In bfloat16 PEFT itself rounds its scaled update once more, which a tiny model's gradient shows.
    assert float((fast_gradient - gradient).norm() / gradient.norm()) < (rounding if dtype == torch.float32 else 0.15)
    assert float(torch.nn.functional.cosine_similarity(fast_gradient, gradient, dim=0)) > 0.99
    assert torch.equal(_step(model)[1], gradient)  # afterwards as before


def test_layers_of_other_kinds_stay_as_they_are(tiny_gpt2: LanguageModel) -> None:
    lm, model = _adapted(tiny_gpt2, torch.float32)
    loss, gradient = _step(model)
    with fast_training(lm):
        fast_loss, fast_gradient = _step(model)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert float((fast_gradient - gradient).norm() / gradient.norm()) < 1e-5


def test_variants_of_lora_stay_as_they_are(tiny_llama: LanguageModel) -> None:
    lm, model = _adapted(tiny_llama, torch.float32, use_dora=True)
    loss, gradient = _step(model)
    with fast_training(lm):
        fast_loss, fast_gradient = _step(model)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert float((fast_gradient - gradient).norm() / gradient.norm()) < 1e-4


def test_the_loss_is_pytorchs() -> None:
    logits = torch.randn(3, 12, 90, generator=torch.Generator().manual_seed(2), requires_grad=True)
    usual = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    usual.backward()
    expected = logits.grad
    assert expected is not None
    logits.grad = None
    loss = next_token_loss(logits, IDS)
    (2.0 * loss).backward()
    assert float(loss.detach()) == pytest.approx(float(usual.detach()), rel=1e-6)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, 2.0 * expected, rtol=1e-5, atol=1e-8)
