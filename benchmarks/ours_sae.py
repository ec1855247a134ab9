"""saeffect's training step as a contender, and a plain autograd trainer.

Everything that knows saeffect's training step is in `Saeffect`; the rest of the benchmark sees a `Trainable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from feed import Feed, Weights
from peers_sae import FOREVER, Spec
from torch import Tensor

__all__ = ["RUNNERS", "PlainAutograd", "Saeffect", "Trainable", "build"]


class Trainable(Protocol):
    """What the benchmark asks of a training step."""

    def __call__(self, x: Tensor) -> dict[str, float]:
        """One step on float32 `[batch, d_in]`; the losses before it."""
        ...

    def weights(self) -> Weights:
        """The weights now."""
        ...

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        """Gradients of the loss on `x` by SAELens' names, neither clipped nor applied."""
        ...

    def active(self, x: Tensor) -> Tensor:
        """Which features a training step on `x` finds active, bool `[batch, d_sae]`."""
        ...


class PlainAutograd:
    """The loss in five lines, `loss.backward()`, gradient clipped to norm 1, `torch.optim.Adam`."""

    def __init__(self, start: dict[str, Tensor], *, k: int | None, lr: float, l1: float) -> None:
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        self._parameters = {name: start.pop(name).requires_grad_() for name in names}
        self._k, self._l1 = k, l1
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=lr)

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error (summed over dimensions, mean over tokens) and the weighted penalty."""
        p = self._parameters
        hidden_pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        if self._k is None:
            feature_acts = hidden_pre.relu()
            penalty = self._l1 * (feature_acts * p["W_dec"].norm(dim=1)).sum(-1).mean()
        else:
            values, indices = hidden_pre.topk(self._k, dim=-1, sorted=False)
            feature_acts = torch.zeros_like(hidden_pre).scatter(-1, indices, values.relu())
            penalty = hidden_pre.new_zeros(())
        sae_out = feature_acts @ p["W_dec"] + p["b_dec"]
        return (sae_out - x).square().sum(-1).mean(), penalty

    def __call__(self, x: Tensor) -> dict[str, float]:
        mse, penalty = self.loss(x)
        self._optimizer.zero_grad()
        (mse + penalty).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        return {"mse": mse.item(), "l1": penalty.item()}

    def weights(self) -> Weights:
        return Weights(**{name: p.detach() for name, p in self._parameters.items()})

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        mse, penalty = self.loss(x)
        gradients = torch.autograd.grad(mse + penalty, list(self._parameters.values()))
        return dict(zip(self._parameters, gradients, strict=True))

    @torch.no_grad()
    def active(self, x: Tensor) -> Tensor:
        p = self._parameters
        hidden_pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        if self._k is None:
            return hidden_pre > 0
        values, indices = hidden_pre.topk(self._k, dim=-1, sorted=False)
        return torch.zeros_like(hidden_pre, dtype=torch.bool).scatter_(-1, indices, values > 0)


class Saeffect:
    """`TrainingStep` with the settings that all contenders share.

    Args:
        spec: Its options are `encoder_dtype` ("float32" or "bfloat16") and `decoder_rows` ("free", "unit", or None for
            what saeffect does by default: unit for TopK, as sparsify and dictionary-learning; free for L1).
    """

    def __init__(self, spec: Spec) -> None:
        from saeffect.sae.training.config import SaeTrainingConfig
        from saeffect.sae.training.step import TrainingStep, new_sae

        architecture_settings = {"architecture": "standard", "l1_coefficient": spec.l1}
        if spec.k is not None:
            architecture_settings = {"architecture": spec.options.get("architecture", "topk"), "k": spec.k}
        self._config = SaeTrainingConfig(
            **architecture_settings,
            d_sae=spec.d_sae,
            batch_size=spec.batch,
            learning_rate=spec.lr,
            schedule="constant",
            warmup_share=0.0,
            penalty_warmup_share=0.0,
            dead_after=FOREVER,
            encoder_dtype=spec.options.get("encoder_dtype", "float32"),
            decoder_rows=spec.options.get("decoder_rows"),
        )
        self._l1 = spec.l1
        self._sae = new_sae(self._config, spec.d_in)
        with torch.no_grad():
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                getattr(self._sae, name).copy_(spec.start.pop(name))
        self._step = TrainingStep(self._sae, self._config, total_steps=FOREVER)
        self._done = 0

    def __call__(self, x: Tensor) -> dict[str, float]:
        report = self._step(self._done, x)
        self._done += 1
        return report.losses

    def weights(self) -> Weights:
        sae = self._sae
        return Weights(sae.W_enc.data, sae.b_enc.data, sae.W_dec.data, sae.b_dec.data)

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        from saeffect.sae.trainable import StepInputs

        self._sae.accumulate_gradients(x, StepInputs(self._config, self._step.encoder, len(x), coefficient=self._l1))
        gradients = {name: self._sae.gradient(name).clone() for name in self._step.leaves}
        gradients["W_enc"] = gradients["W_enc"].T
        return gradients

    @torch.no_grad()
    def active(self, x: Tensor) -> Tensor:
        sae, encoder = self._sae, self._step.encoder
        weights = sae.centred(x), sae.W_rows, sae.b_enc.data
        entries = (
            encoder.above(*weights)
            if self._config.architecture == "standard"
            else encoder.top(*weights, self._config.k)
        )
        return entries.to_dense() > 0


def build(spec: Spec) -> Trainable:
    """saeffect's training step on the shared start."""
    return Saeffect(spec)


def _serve(step: Trainable, feed: Feed) -> None:
    feed.ready(step.weights)
    for x in feed:
        step(x)


def saeffect(spec: Spec, feed: Feed) -> None:
    """Our step; its options are those of `Saeffect`."""
    _serve(build(spec), feed)


def plain_autograd(spec: Spec, feed: Feed) -> None:
    """`PlainAutograd`, without any trainer."""
    _serve(PlainAutograd(spec.start, k=spec.k, lr=spec.lr, l1=spec.l1), feed)


RUNNERS: dict[str, Callable[[Spec, Feed], None]] = {"saeffect": saeffect, "plain_autograd": plain_autograd}
