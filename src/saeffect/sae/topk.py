"""TopK SAE: the k features with the largest pre-activations, no penalty (Gao et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from saeffect.sae.dead_features import auxiliary_loss
from saeffect.sae.trainable import StepInputs, StepResult, TrainableSae, squared_error

__all__ = ["TopKSae"]


class TopKSae(TrainableSae):
    """Keeps the k largest pre-activations of each token, and of those the positive ones."""

    architecture = "topk"
    leaves_out_parallel = True

    def activation(self, hidden_pre: Tensor) -> Tensor:
        assert self.cfg.k is not None
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        values, indices = hidden_pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(hidden_pre).scatter_(-1, indices, values.relu_())

    @torch.no_grad()
    def accumulate_gradients(self, x: Tensor, step: StepInputs) -> StepResult:
        """See `TrainableSae`.

        Source:
            Gao et al. (2024), section 2.4 and appendix A.2 (auxiliary loss).
        """
        assert self.cfg.k is not None
        W_dec = self.W_dec.data
        centred = self.centred(x)
        weight = W_dec.norm(dim=1) if self.cfg.rescale_acts_by_decoder_norm else None
        # Ranked by activation times decoder norm if so configured; what is decoded is the activation itself.
        entries = step.encoder.top(centred, self.W_rows, self.b_enc.data, self.cfg.k, weight=weight)
        sae_out = entries.decode(entries.values, W_dec).add_(self.b_dec.data)
        error = sae_out - x
        losses = {"mse": squared_error(error) / step.n_tokens}
        d_out = error * (2.0 / step.n_tokens)
        d_acts = entries.inner(d_out, W_dec)
        self.backward(entries, d_acts, d_out, centred, self.pull_off_rows(entries, d_acts, step))
        if len(step.dead) and step.config.auxiliary_weight:
            losses["auxiliary"] = auxiliary_loss(self, centred, -error, step, weight=weight)
        return StepResult(losses, entries.counts(), sae_out)
