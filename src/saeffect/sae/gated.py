"""Gated SAE: the encoder decides separately which features are on and how strongly (Rajamanoharan et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saeffect.sae.base import SparseAutoencoder, Start
from saeffect.sae.standard import StandardSae
from saeffect.sae.trainable import StepInputs, StepResult, squared_error

__all__ = ["GatedSae"]


class GatedSae(StandardSae):
    """An L1 SAE with `gate = (x - b_dec) @ W_enc + b_gate`, `magnitude = exp(r_mag) · (gate - b_gate) + b_mag`, and
    `feature_acts = relu(magnitude)` where the gate is positive, else 0. `hidden_pre` is the gate.
    """

    architecture, label = "gated", "Gated"
    loss_parts = (("l1", "l1"), ("mse_by_gate", "mse by gate"))
    vectors = ("b_gate", "r_mag", "b_mag")
    b_gate: nn.Parameter
    r_mag: nn.Parameter
    b_mag: nn.Parameter

    def activation(self, hidden_pre: Tensor) -> Tensor:
        magnitude = (hidden_pre - self.b_gate) * self.r_mag.exp() + self.b_mag
        return magnitude.relu() * (hidden_pre > 0)

    @torch.no_grad()
    def accumulate_gradients(self, x: Tensor, step: StepInputs) -> StepResult:
        """See `TrainableSae`. The gate's step function has no gradient.

        Gates learn from the L1 penalty on their positive part and from a second reconstruction, which uses the gates
        in place of the magnitudes; the decoder learns from both. Source: Rajamanoharan et al. (2024), Improving
        Dictionary Learning with Gated Sparse Autoencoders, with penalty by decoder norms and no detached decoder, as
        in SAELens' GatedTrainingSAE.
        """
        W_dec, b_dec = self.W_dec.data, self.b_dec.data
        norm, growth = W_dec.norm(dim=1), self.r_mag.data.exp()
        centred = self.centred(x)
        entries = step.encoder.above(centred, self.W_rows, self.b_gate.data)
        gate, b_mag = entries.values, entries.per_feature(self.b_mag.data)
        scaled = (gate - entries.per_feature(self.b_gate.data)).mul_(entries.per_feature(growth))
        entries.values = acts = (scaled + b_mag).relu_().mul_(gate > 0)

        sae_out = entries.decode(acts, W_dec).add_(b_dec)
        error = sae_out - x
        d_out = error * (2.0 / step.n_tokens)
        d_magnitude = entries.inner(d_out, W_dec) * (acts > 0)
        error_by_gate = entries.decode(gate, W_dec).add_(b_dec).sub_(x)
        d_by_gate = error_by_gate * (2.0 / step.n_tokens)
        d_gate = entries.inner(d_by_gate, W_dec)
        d_gate += entries.per_feature(norm * (step.coefficient / step.n_tokens))
        d_gate *= gate > 0

        entries.outer(acts, d_out, self.gradient("W_dec"))
        entries.outer(gate, d_by_gate, self.gradient("W_dec"), add=True)
        total = entries.feature_sums(gate) / step.n_tokens
        self.gradient("W_dec").addcmul_(W_dec, self.pull_on_norms(step.coefficient * total, norm)[:, None])
        self.gradient("b_mag").copy_(entries.feature_sums(d_magnitude))
        self.gradient("b_gate").copy_(entries.feature_sums(d_gate))
        self.gradient("r_mag").copy_(entries.feature_sums(scaled.mul_(d_magnitude)))
        entries.outer(d_gate.add_(d_magnitude.mul_(entries.per_feature(growth))), centred, self.gradient("W_enc"))
        self.gradient("b_dec").copy_(d_out.sum(0) + d_by_gate.sum(0))
        self.backward_to_b_dec(entries.feature_sums(d_gate))
        losses = {
            "mse": squared_error(error) / step.n_tokens,
            "l1": step.coefficient * (total @ norm),
            "mse_by_gate": squared_error(error_by_gate) / step.n_tokens,
        }
        return StepResult(losses, entries.counts(), sae_out)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        for bias in (self.b_gate, self.b_mag, self.b_dec):
            bias.div_(scale)

    def as_start(self) -> Start:
        # The gate is open where exp(r_mag) · (gate - b_gate) + b_mag, the magnitude, exceeds this.
        growth = self.r_mag.exp()
        opens_at = (self.b_mag - growth * self.b_gate).clamp_min(0.0)
        return Start(self.W_enc * growth, self.b_mag, self.W_dec, self.b_dec, opens_at)

    def set_start(self, start: Start) -> None:
        self.r_mag.data.zero_()
        self.b_mag.data.copy_(start.b_enc)
        self.b_gate.data.copy_(start.b_enc if start.threshold is None else start.b_enc - start.threshold)

    @torch.no_grad()
    def start_from(self, source: SparseAutoencoder, *, unit_decoder: bool) -> None:
        """See `TrainableSae`; another gated SAE's gates and magnitudes are copied unchanged."""
        if not isinstance(source, GatedSae):
            super().start_from(source, unit_decoder=unit_decoder)
            return
        length = source.W_dec.norm(dim=1).clamp_min(1e-8) if unit_decoder else torch.ones_like(source.b_gate)
        W_enc, b_gate, b_mag = source.W_enc * length, source.b_gate * length, source.b_mag * length
        sign = int(self.cfg.apply_b_dec_to_input) - int(source.cfg.apply_b_dec_to_input)
        shift = sign * (source.b_dec @ W_enc)
        self.W_enc.copy_(W_enc)
        self.W_dec.copy_(source.W_dec / length[:, None])
        self.b_dec.copy_(source.b_dec)
        self.r_mag.copy_(source.r_mag)
        self.b_gate.copy_(b_gate + shift)
        self.b_mag.copy_(b_mag + shift * source.r_mag.exp())
