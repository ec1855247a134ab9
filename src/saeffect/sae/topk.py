"""TopK SAE: the k features with the largest pre-activations, no penalty (Gao et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.sae.base import SparseAutoencoder

__all__ = ["TopKSae", "TopKStep"]


@dataclass(frozen=True)
class TopKStep:
    """One training step's results.

    Attributes:
        mse: Mean over tokens of the squared error summed over dimensions.
        auxiliary: The dead features' loss, 0 while there are none.
        fired: Bool `[d_sae]`: features that were active on at least one token of the batch.
        l0: Mean number of active features a token.
    """

    mse: float
    auxiliary: float
    fired: Tensor
    l0: float


class TopKSae(SparseAutoencoder):
    """Keeps the k largest pre-activations of each token, and of those the positive ones."""

    architecture = "topk"

    def activation(self, hidden_pre: Tensor) -> Tensor:
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        values, indices = self._top(hidden_pre)
        return torch.zeros_like(hidden_pre).scatter_(-1, indices, values)

    def _top(self, hidden_pre: Tensor) -> tuple[Tensor, Tensor]:
        assert self.cfg.k is not None
        values, indices = hidden_pre.topk(self.cfg.k, dim=-1, sorted=False)
        return values.relu_(), indices

    @torch.no_grad()
    def initialise(self, mean: Tensor, seed: int) -> None:
        """Random unit decoder rows, the encoder their transpose, the decoder's bias at the data's mean.

        Args:
            mean: Mean of the (scaled) inputs, float32 `[d_in]`.
            seed: Of the random directions.
        """
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.copy_(mean)

    @torch.no_grad()
    def accumulate_gradients(self, x: Tensor, *, dead: Tensor, k_auxiliary: int, auxiliary_weight: float) -> TopKStep:
        """Loss on a batch; its gradients are put into `.grad` of the four parameters.

        Written out by hand because only k of d_sae features take part: autograd would multiply by the zeros.

        Args:
            x: Scaled inputs, float32 `[n_tokens, d_in]`.
            dead: Indices of features that have not fired for long, int64 `[n_dead]`.
            k_auxiliary: How many dead features a token may use to explain what is left over.
            auxiliary_weight: Weight of that loss.

        Returns:
            Losses and which features fired.

        Source:
            Gao et al. (2024), section 2.4 and appendix A.2 (auxiliary loss).
        """
        n = len(x)
        centred = x - self.b_dec
        hidden_pre = torch.addmm(self.b_enc, centred, self.W_enc)
        values, indices = self._top(hidden_pre)
        sae_out = torch.nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        sae_out += self.b_dec
        error = sae_out - x
        on = values > 0

        # d loss / d sae_out, then back through the decoder to the active entries alone.
        g = error * (2.0 / n)
        g_values = torch.einsum("nd,nkd->nk", g, self.W_dec[indices]) * on
        feature_acts = hidden_pre.zero_().scatter_(1, indices, values)
        self.W_dec.grad = feature_acts.T @ g
        g_hidden = feature_acts.zero_().scatter_(1, indices, g_values)
        self.W_enc.grad = centred.T @ g_hidden
        self.b_enc.grad = g_hidden.sum(0)
        self.b_dec.grad = g.sum(0) - self.W_enc @ self.b_enc.grad

        auxiliary = 0.0
        if len(dead) and auxiliary_weight:
            auxiliary = self._auxiliary(centred, -error, dead, k_auxiliary, auxiliary_weight)
        fired = torch.zeros(self.cfg.d_sae, dtype=torch.bool)
        fired[indices[on]] = True
        return TopKStep(float(error.square().sum() / n), auxiliary, fired, float(on.sum() / n))

    def _auxiliary(self, centred: Tensor, residual: Tensor, dead: Tensor, k: int, weight: float) -> float:
        """Let the dead features explain the residual, so that they find something to do."""
        with torch.enable_grad():
            W_enc = self.W_enc[:, dead].detach().requires_grad_()
            b_enc = self.b_enc[dead].detach().requires_grad_()
            W_dec = self.W_dec[dead].detach().requires_grad_()
            hidden_pre = centred @ W_enc + b_enc
            values, indices = hidden_pre.topk(min(k, len(dead)), dim=-1, sorted=False)
            explained = torch.zeros_like(hidden_pre).scatter(1, indices, values.relu()) @ W_dec
            # Reported relative to the residual's own size; minimised in the units of the main loss.
            scale = residual.square().sum(-1).mean().clamp_min(1e-12)
            loss = (explained - residual).square().sum(-1).mean() / scale
            total = weight * loss * scale
            total.backward()
        if not math.isfinite(float(loss.detach())):
            return 0.0
        for whole, part, where in (
            (self.W_enc, W_enc, (slice(None), dead)),
            (self.b_enc, b_enc, (dead,)),
            (self.W_dec, W_dec, (dead,)),
        ):
            assert whole.grad is not None
            assert part.grad is not None
            whole.grad[where] += part.grad
        return float(loss.detach())

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take off the decoder gradient's part along each row: lengths are fixed."""
        assert self.W_dec.grad is not None
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Put every decoder row back on the unit sphere."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))
