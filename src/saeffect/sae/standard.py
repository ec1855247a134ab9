"""The L1 SAE: ReLU features with an L1 penalty on their activations."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from saeffect.sae.trainable import StepInputs, StepResult, TrainableSae, squared_error
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = ["StandardSae"]


class StandardSae(TrainableSae):
    """`feature_acts = relu(hidden_pre)`; the penalty is `coefficient · Σ_f feature_acts_f · ‖W_dec_f‖`."""

    architecture, label = "standard", "L1"
    keys = ("l1_coefficient",)
    loss_parts: ClassVar[tuple[tuple[str, str], ...]] = (("l1", "l1"),)
    penalty = "l1_coefficient"

    @classmethod
    def in_words(cls, config: SaeTrainingConfig) -> list[str]:
        rising = f"rising over {config.penalty_warmup_share:.0%} of the steps"
        return [f"L1 coefficient {config.l1_coefficient:g} ({rising})"]

    def activation(self, hidden_pre: Tensor) -> Tensor:
        return hidden_pre.relu()

    @torch.no_grad()
    def accumulate_gradients(self, x: Tensor, step: StepInputs) -> StepResult:
        """See `TrainableSae`. Source: Gupta & Sica (2024), appendix; SAELens' StandardTrainingSAE (l1, norms)."""
        W_dec = self.W_dec.data
        norm = self.row_norms(W_dec)
        centred = self.centred(x)
        entries = step.encoder.above(centred, self.W_rows, self.b_enc.data)
        sae_out = entries.decode(entries.values, W_dec).add_(self.b_dec.data)
        error = sae_out - x
        mse = squared_error(error) / step.n_tokens
        d_out = error.mul_(2.0 / step.n_tokens)
        d_acts = entries.inner(d_out, W_dec)
        d_acts += entries.per_feature(norm * (step.coefficient / step.n_tokens))
        # The penalty has a gradient for the decoder too: along each row, in proportion to the feature's activation.
        total = entries.feature_sums(entries.values) / step.n_tokens
        pull = self.pull_on_norms(step.coefficient * total, norm)
        self.backward(entries, d_acts.mul_(entries.values > 0), d_out, centred, pull)
        losses = {"mse": mse, "l1": step.coefficient * (total @ norm)}
        return StepResult(losses, entries.counts(), sae_out)
