"""TopK SAE: the k features with the largest pre-activations, no penalty (Gao et al. 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from saeffect.sae.trainable import StepInputs, StepResult, TrainableSae, project_out_rows, squared_error
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = ["TopKSae", "auxiliary_loss"]


class TopKSae(TrainableSae):
    """Keeps the k largest pre-activations of each token, and of those the positive ones."""

    architecture, label = "topk", "TopK"
    keys: ClassVar[tuple[str, ...]] = ("k", "auxiliary_k", "auxiliary_weight", "rescale_acts_by_decoder_norm")
    loss_parts: ClassVar[tuple[tuple[str, str], ...]] = (("auxiliary", "auxiliary"),)
    unit_rows = leaves_out_parallel = True

    @classmethod
    def in_words(cls, config: SaeTrainingConfig) -> list[str]:
        return [f"k = {config.k}"]

    def activation(self, hidden_pre: Tensor) -> Tensor:
        assert self.cfg.k is not None
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.row_norms(self.W_dec)
        values, indices = hidden_pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(hidden_pre).scatter_(-1, indices, values.relu_())

    @torch.no_grad()
    def accumulate_gradients(self, x: Tensor, step: StepInputs) -> StepResult:
        """See `TrainableSae`. Source: Gao et al. (2024), section 2.4 and appendix A.2 (auxiliary loss)."""
        assert self.cfg.k is not None
        W_dec = self.W_dec.data
        centred = self.centred(x)
        weight = self.row_norms(W_dec) if self.cfg.rescale_acts_by_decoder_norm else None
        # Features may be ranked by activation times decoder norm; decoded is the activation itself.
        entries = step.encoder.top(centred, self.W_rows, self.b_enc.data, self.cfg.k, weight=weight)
        sae_out = entries.decode(entries.values, W_dec).add_(self.b_dec.data)
        error = sae_out - x
        losses = {"mse": squared_error(error) / step.n_tokens}
        d_out = error * (2.0 / step.n_tokens)
        d_acts = entries.inner(d_out, W_dec)
        self.backward(entries, d_acts, d_out, centred, self.row_parallel_part(entries, d_acts, step))
        if len(step.dead) and step.config.auxiliary_weight:
            losses["auxiliary"] = auxiliary_loss(self, centred, -error, step, weight=weight)
        return StepResult(losses, entries.counts(), sae_out)


@torch.no_grad()
def auxiliary_loss(
    sae: TrainableSae, centred: Tensor, residual: Tensor, step: StepInputs, *, weight: Tensor | None = None
) -> Tensor:
    """Weighted squared error of dead features reconstructing the residual; adds its gradients to those of the leaves.

    Each token uses the `auxiliary_k` dead features with the largest pre-activations (times `weight`, float32
    `[d_sae]`); with fewer, the loss has proportionally less weight. `centred` is the encoder's input; `residual`, `x -
    sae_out`, is treated as constant. Both are float32 `[n, d_in]`. Source: Gao et al. (2024), appendix A.2, as in
    SAELens (no ReLU on the chosen pre-activations).
    """
    dead, config = step.dead, step.config
    rows, decoder = sae.W_rows[dead], sae.W_dec.data[dead]
    acts = torch.addmm(sae.b_enc.data[dead], centred, rows.T)
    k = min(config.auxiliary_k, len(dead))
    chosen: Tensor | None = None
    if k < len(dead):
        ranked = acts if weight is None else acts * weight[dead]
        chosen = torch.zeros_like(acts).scatter_(1, ranked.topk(k, dim=1, sorted=False).indices, 1.0)
        acts *= chosen
    factor = config.auxiliary_weight * min(1.0, len(dead) / config.auxiliary_k)
    error = acts @ decoder - residual
    d_out = error * (2.0 * factor / step.n_tokens)
    d_hidden = d_out @ decoder.T
    if chosen is not None:
        d_hidden *= chosen
    sums = d_hidden.sum(0)
    d_rows = acts.T @ d_out
    if step.tangent:
        project_out_rows(d_rows, decoder)
    sae.gradient("W_dec").index_add_(0, dead, d_rows)
    sae.gradient("W_enc").index_add_(0, dead, d_hidden.T @ centred)
    sae.gradient("b_enc").index_add_(0, dead, sums)
    if sae.cfg.apply_b_dec_to_input:
        sae.gradient("b_dec").sub_(rows.T @ sums)
    return factor * error.square().sum() / step.n_tokens
