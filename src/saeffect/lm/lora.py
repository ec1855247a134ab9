"""Faster LoRA training: each adapted layer as one autograd function, and a loss without copies of the logits.

In half precision PEFT converts the input of every adapted layer to float32, and the usual loss makes five float32
copies of all logits. Here sums and parameters stay float32, products are in the model's dtype. On a CPU with bfloat16
a step takes half as long; gradients differ by rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saeffect.lm.language_model import LanguageModel, fused, replaced_forwards

__all__ = ["fast_training", "next_token_loss"]


@contextlib.contextmanager
def fast_training(lm: LanguageModel) -> Iterator[None]:
    """While the block runs, a model with a LoRA adapter in its layers trains faster; other layers stay as they are."""
    from peft.tuners.lora import Linear

    adapted = [module for module in lm.model.modules() if isinstance(module, Linear) and _is_plain_lora(module)]
    forwards = {module: functools.partial(_adapted_forward, module) for module in adapted}
    with replaced_forwards(forwards), fused(lm, gradients=True):
        yield


def next_token_loss(logits: Tensor, ids: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next tokens, in nats: a scalar, float32, with a gradient for the logits `[batch,
    sequence, d_vocab]` of any float dtype; `ids` are int64 `[batch, sequence]`. With `counts`, bool as `ids`, over
    the tokens that count; 0 if none does.
    """
    loss: Tensor = _NextTokenLoss.apply(logits, ids, counts)
    return loss


def _is_plain_lora(module: Any) -> bool:
    """Whether the layer computes W x + scale B A x and nothing else."""
    adapters = ["default"]
    return (
        type(module.base_layer) is nn.Linear
        and list(module.active_adapters) == adapters
        and list(module.lora_A) == adapters
        and not (module.merged or module.disable_adapters or module.lora_variant or module.lora_bias["default"])
        and (not module.training or isinstance(module.lora_dropout["default"], nn.Identity))
    )


def _adapted_forward(module: Any, x: Tensor) -> Tensor:
    base, a, b = module.base_layer, module.lora_A["default"].weight, module.lora_B["default"].weight
    out: Tensor = _LoraProduct.apply(x, base.weight, a, b, module.scaling["default"])
    return out if base.bias is None else out + base.bias


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + scale (x Aᵀ) Bᵀ, W without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        low = flat @ a.T
        out = (flat @ weight.T).addmm_(low, b.T)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, low = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        grad_low = gradient @ b
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (gradient @ weight).addmm_(grad_low, a).view(ctx.shape)
        return grad_x, None, (grad_low.T @ flat).float(), (gradient.T @ low).float() * ctx.scale, None


class _NextTokenLoss(torch.autograd.Function):
    """The gradient is computed with the loss, row by row, in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, counts: Tensor | None) -> Tensor:
        n = ids[:, 1:].numel() if counts is None else max(1, int(counts[:, 1:].sum()))
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        for row, row_logits in enumerate(logits):
            row_scores, targets = row_logits[:-1].float(), ids[row, 1:, None]
            norm = row_scores.logsumexp(dim=-1, keepdim=True)
            losses = norm - row_scores.gather(1, targets)
            total += losses.sum() if counts is None else losses[counts[row, 1:]].sum()
            row_scores.sub_(norm).exp_()
            row_scores.scatter_add_(1, targets, row_scores.new_full(targets.shape, -1.0))
            if counts is not None:
                row_scores *= counts[row, 1:, None]
            gradient[row, :-1] = row_scores.div_(n)
            gradient[row, -1] = 0.0
        ctx.save_for_backward(gradient)
        return total / n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None
