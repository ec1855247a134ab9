"""BatchTopK SAE: the k · n_tokens largest pre-activations of a whole batch; a token may have more or fewer than k."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from saeffect.parallel import gathered, rank_and_world
from saeffect.sae.base import Start
from saeffect.sae.entries import DenseEntries, Entries, SparseEntries
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.topk import TopKSae, auxiliary_loss
from saeffect.sae.trainable import StepInputs, StepResult, squared_error
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = ["BatchTopKSae"]


class BatchTopKSae(TopKSae):
    """Keeps the `k · n_tokens` largest pre-activations of a batch, and of those the positive ones.

    At inference there is no batch, so it is saved as a JumpReLU SAE with the threshold estimated in training:
    `topk_threshold`, float64, 0-dim, the running mean of the smallest activation kept in a batch (times the decoder
    norm with `rescale_acts_by_decoder_norm`); 0 at the start.
    """

    architecture, label = "batchtopk", "BatchTopK"
    keys: ClassVar[tuple[str, ...]] = (*TopKSae.keys, "threshold_rate")
    saved_as = "jumprelu"
    running = ("topk_threshold",)
    topk_threshold: Tensor

    @classmethod
    def in_words(cls, config: SaeTrainingConfig) -> list[str]:
        return [f"k = {config.k} on average"]

    def activation(self, hidden_pre: Tensor) -> Tensor:
        assert self.cfg.k is not None
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.row_norms(self.W_dec)
        flat = hidden_pre.flatten()
        values, indices = flat.topk(self.cfg.k * (flat.numel() // self.cfg.d_sae), sorted=False)
        return torch.zeros_like(flat).scatter(0, indices, values.relu()).view(hidden_pre.shape)

    @torch.no_grad()
    def accumulate_gradients(self, x: Tensor, step: StepInputs) -> StepResult:
        """See `TrainableSae`. The batch is that of all processes. Source: Bussmann et al. (2024), BatchTopK Sparse
        Autoencoders; SAELens' BatchTopKTrainingSAE.
        """
        centred = self.centred(x)
        weight = self.row_norms(self.W_dec.data) if self.cfg.rescale_acts_by_decoder_norm else None
        entries = self._select(centred, step, weight)
        losses, sae_out = self.reconstruct(entries, x, centred, step)
        if len(step.dead) and step.config.auxiliary_weight:
            losses["auxiliary"] = auxiliary_loss(self, centred, x - sae_out, step, weight=weight)
        return StepResult(losses, entries.counts(), sae_out)

    def reconstruct(
        self, entries: Entries, x: Tensor, centred: Tensor, step: StepInputs
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The reconstruction's losses and the reconstruction; the losses' gradients replace those of the leaves."""
        W_dec = self.W_dec.data
        sae_out = entries.decode(entries.values, W_dec).add_(self.b_dec.data)
        error = sae_out - x
        mse = squared_error(error) / step.n_tokens
        d_out = error.mul_(2.0 / step.n_tokens)
        d_acts = entries.inner(d_out, W_dec).mul_(entries.values > 0)
        self.backward(entries, d_acts, d_out, centred, self.row_parallel_part(entries, d_acts, step))
        return {"mse": mse}, sae_out

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.topk_threshold.div_(scale)

    @torch.no_grad()
    def for_inference(self) -> JumpReluSae:
        """A JumpReLU SAE, a copy, with the running threshold for every feature. If features were ranked by decoder
        norm, the norms are folded into the encoder: decoder rows then have length 1.
        """
        sae = JumpReluSae(
            dataclasses.replace(
                self.cfg,
                architecture="jumprelu",
                k=None,
                rescale_acts_by_decoder_norm=False,
                metadata={**self.cfg.metadata, "training_architecture": self.architecture},
            )
        )
        norm = torch.ones_like(self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            norm = self.W_dec.norm(dim=1).clamp_min(1e-8)
        sae.W_enc.copy_(self.W_enc * norm)
        sae.b_enc.copy_(self.b_enc * norm)
        sae.W_dec.copy_(self.W_dec / norm[:, None])
        sae.b_dec.copy_(self.b_dec)
        sae.threshold.fill_(float(self.topk_threshold))
        return sae.to(self.W_dec.device)

    def set_start(self, start: Start) -> None:
        super().set_start(start)
        # The threshold is in units of what ranks features: activations, or activations times decoder norms.
        rank_by = self.row_norms(self.W_dec) if self.cfg.rescale_acts_by_decoder_norm else torch.ones_like(self.b_enc)
        threshold = torch.zeros(1) if start.threshold is None else start.threshold * rank_by
        self.topk_threshold.copy_(threshold.median())

    def _select(self, centred: Tensor, step: StepInputs, weight: Tensor | None) -> Entries:
        """This process's share of the largest entries of the whole batch; the threshold moves towards the smallest."""
        assert self.cfg.k is not None
        n_kept = self.cfg.k * step.n_tokens
        # A process holds at most n_kept of them, so its own n_kept largest are enough to choose from.
        entries = step.encoder.batch_top(centred, self.W_rows, self.b_enc.data, n_kept, weight=weight)
        ranked = entries.values if weight is None else entries.values * entries.per_feature(weight)
        all_ranked = gathered(ranked)
        if len(all_ranked) > n_kept:
            selected = torch.zeros_like(all_ranked, dtype=torch.bool)
            selected[all_ranked.topk(n_kept, sorted=False).indices] = True
            lengths = gathered(torch.tensor([len(ranked)], device=ranked.device))
            first = int(lengths[: rank_and_world()[0]].sum())
            entries, all_ranked = entries.where(selected[first : first + len(ranked)]), all_ranked[selected]
        if len(all_ranked):
            self.topk_threshold.lerp_(all_ranked.min().double(), step.config.threshold_rate)
        return _as_dense_if_many(entries, step)


def _as_dense_if_many(entries: SparseEntries, step: StepInputs) -> Entries:
    """The entries as dense matrices if so many are active that sparse products would be slower."""
    n_tokens, d_sae = entries.shape
    if len(entries.values) <= step.encoder.dense_above * n_tokens * d_sae:
        return entries
    return DenseEntries(entries.to_dense())
