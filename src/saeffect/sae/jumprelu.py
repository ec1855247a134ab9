"""JumpReLU SAE: each feature has a threshold below which it is off (Rajamanoharan et al. 2024)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from saeffect.sae.base import Start
from saeffect.sae.entries import Entries
from saeffect.sae.trainable import StepInputs, StepResult, TrainableSae, squared_error
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = ["JumpReluSae"]

_TANH_SCALE = 4.0  # steepness of the smooth count, as Anthropic's and SAELens'


class JumpReluSae(TrainableSae):
    """`feature_acts = hidden_pre` where it is above `threshold` (float32 `[d_sae]`) and 0, else 0.

    The threshold's gradient is a straight-through estimator with a rectangular kernel of width `bandwidth`: only
    pre-activations within half a bandwidth of the threshold contribute.
    """

    architecture, label = "jumprelu", "JumpReLU"
    keys = ("l0_coefficient", "l0_kind", "pre_act_coefficient", "threshold_at_start", "bandwidth")
    # In the log, "l0" is the number of active features.
    loss_parts = (("l0_penalty", "l0 penalty"), ("pre_act", "dead pre-activations"))
    penalty = "l0_coefficient"
    vectors = ("b_enc", "threshold")
    threshold: nn.Parameter

    def activation(self, hidden_pre: Tensor) -> Tensor:
        return hidden_pre.relu() * (hidden_pre > self.threshold)

    @classmethod
    def in_words(cls, config: SaeTrainingConfig) -> list[str]:
        rising = f"rising over {config.penalty_warmup_share:.0%} of the steps"
        return [f"L0 coefficient {config.l0_coefficient:g} ({config.l0_kind}; {rising})"]

    @torch.no_grad()
    def initialise(self, sample: Tensor, config: SaeTrainingConfig) -> None:
        super().initialise(sample, config)
        self.threshold.fill_(config.threshold_at_start)

    @torch.no_grad()
    def accumulate_gradients(self, x: Tensor, step: StepInputs) -> StepResult:
        """See `TrainableSae`. Source: Rajamanoharan et al. (2024), Jumping Ahead; Anthropic's January 2025 update
        for `tanh` and the penalty on dead features; as in SAELens' JumpReLUTrainingSAE, which trains the threshold
        itself.
        """
        half = step.config.bandwidth / 2
        W_dec, threshold = self.W_dec.data, self.threshold.data.clamp_(min=0.0)
        centred = self.centred(x)
        entries = step.encoder.above(centred, self.W_rows, self.b_enc.data, floor=threshold - half)
        hidden_pre, thresholds = entries.values, entries.per_feature(threshold)
        on = hidden_pre > thresholds
        near = (hidden_pre > thresholds - half) & (hidden_pre < thresholds + half)
        entries.values = hidden_pre * on
        sae_out = entries.decode(entries.values, W_dec).add_(self.b_dec.data)
        error = sae_out - x
        mse = squared_error(error) / step.n_tokens
        d_out = error.mul_(2.0 / step.n_tokens)
        d_acts = entries.inner(d_out, W_dec)
        if step.config.l0_kind == "tanh":
            l0, d_norm = self._smooth_count(entries, d_acts, step)
            d_step = 0.0
        else:
            d_step = step.coefficient / step.n_tokens
            l0, d_norm = on.sum() * d_step, None
        through_jump = threshold * entries.feature_sums(d_acts * near) + d_step * entries.feature_sums(near.float())
        self.gradient("threshold").copy_(through_jump / -step.config.bandwidth)
        pull = None if d_norm is None else self.pull_on_norms(d_norm, self.row_norms(W_dec))
        self.backward(entries, d_acts.mul_(on), d_out, centred, pull)
        losses = {"mse": mse, "l0_penalty": l0}
        if len(step.dead) and step.config.pre_act_coefficient is not None:
            losses["pre_act"] = self._pre_act_loss(centred, step, step.config.pre_act_coefficient)
        return StepResult(losses, entries.counts(), sae_out)

    def after_step(self, step: StepInputs) -> None:
        """Keep thresholds at or above zero: below it, negative activations would pass."""
        super().after_step(step)
        self.threshold.data.clamp_(min=0.0)

    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.threshold.data.div_(scale)

    def as_start(self) -> Start:
        return dataclasses.replace(super().as_start(), threshold=self.threshold)

    def set_start(self, start: Start) -> None:
        super().set_start(start)
        if start.threshold is not None:
            self.threshold.data.copy_(start.threshold)

    def _smooth_count(self, entries: Entries, d_acts: Tensor, step: StepInputs) -> tuple[Tensor, Tensor]:
        """Weighted Σ tanh(4 · feature_acts · ‖W_dec‖), and its gradient by the decoder's norms; adds its gradient by
        the activations to `d_acts`.
        """
        weight = step.coefficient / step.n_tokens
        norm = entries.per_feature(self.row_norms(self.W_dec.data))
        count = (entries.values * norm).mul_(_TANH_SCALE).tanh_()
        slope = (1.0 - count.square()).mul_(_TANH_SCALE * weight)
        d_acts.addcmul_(slope, norm.expand_as(slope))
        return count.sum() * weight, entries.feature_sums(slope.mul_(entries.values))

    def _pre_act_loss(self, centred: Tensor, step: StepInputs, coefficient: float) -> Tensor:
        """Dead features' distances below their thresholds, times their decoder norms; adds its gradients."""
        dead, weight = step.dead, coefficient / step.n_tokens
        rows, decoder, threshold = self.W_rows[dead], self.W_dec.data[dead], self.threshold.data[dead]
        norm = self.row_norms(decoder)
        shortfall = (threshold - torch.addmm(self.b_enc.data[dead], centred, rows.T)).relu_()
        total = shortfall.sum(0) * weight
        d_hidden = (shortfall > 0) * (norm * -weight)
        sums = d_hidden.sum(0)
        self.gradient("W_enc").index_add_(0, dead, d_hidden.T @ centred)
        self.gradient("b_enc").index_add_(0, dead, sums)
        self.gradient("threshold").index_add_(0, dead, -sums)
        pulled = torch.zeros_like(decoder)
        self.add_pull(pulled, decoder, self.pull_on_norms(total, norm, decoder))
        self.gradient("W_dec").index_add_(0, dead, pulled)
        if self.cfg.apply_b_dec_to_input:
            self.gradient("b_dec").sub_(rows.T @ sums)
        return total @ norm
