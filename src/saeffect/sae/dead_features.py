"""Features that do not fire: a loss that wakes them (TopK's kind), or a new start (the L1 SAE's)."""

from __future__ import annotations

import torch
from torch import Tensor

from saeffect.parallel import gathered
from saeffect.sae.trainable import StepInputs, TrainableSae, take_off_parallel

__all__ = ["auxiliary_loss", "resample"]

# Anthropic's choice: a new feature starts with an encoder row a fifth as long as those of living features.
_ENCODER_SHARE = 0.2


@torch.no_grad()
def auxiliary_loss(
    sae: TrainableSae, centred: Tensor, residual: Tensor, step: StepInputs, *, weight: Tensor | None = None
) -> Tensor:
    """How badly dead features explain what the living ones leave over; its gradients are added to the leaves'.

    Each token uses the `auxiliary_k` dead features with the largest pre-activations. The residual counts as
    a constant. With fewer than `auxiliary_k` dead features the loss weighs proportionally less.

    Args:
        sae: Its leaves hold the main loss's gradients already.
        centred: What the encoder was given, float32 `[n, d_in]`.
        residual: `x - sae_out`, float32 `[n, d_in]`.
        step: `dead`, `n_tokens` and the recipe.
        weight: Features are ranked by pre-activation times this, float32 `[d_sae]`.

    Returns:
        The loss, weighted, 0-dim.

    Source:
        Gao et al. (2024), appendix A.2, as SAELens has it (no ReLU on the chosen pre-activations).
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
        take_off_parallel(d_rows, decoder)
    sae.gradient("W_dec").index_add_(0, dead, d_rows)
    sae.gradient("W_enc").index_add_(0, dead, d_hidden.T @ centred)
    sae.gradient("b_enc").index_add_(0, dead, sums)
    if sae.cfg.apply_b_dec_to_input:
        sae.gradient("b_dec").sub_(rows.T @ sums)
    return factor * error.square().sum() / step.n_tokens


@torch.no_grad()
def resample(
    sae: TrainableSae, optimizer: torch.optim.Optimizer, dead: Tensor, x: Tensor, sae_out: Tensor, *, seed: int
) -> None:
    """Start dead features anew at inputs that the SAE rebuilds badly, and forget the optimizer's moments of them.

    Inputs are drawn with probability proportional to the square of their loss. The decoder row becomes the
    input's direction with the mean length of living rows, the encoder row the same direction a fifth as long
    as living rows, and every number that the architecture keeps for a feature (bias, threshold) zero.

    Args:
        sae: Changed in place.
        optimizer: Over the SAE's leaves.
        dead: Indices, int64 `[n_dead]`; nothing happens without any.
        x: Scaled inputs of this process, float32 `[n, d_in]`.
        sae_out: Their reconstructions.
        seed: Of the draw; the same on every process, as is the outcome.

    Source:
        Bricken et al. (2023), Towards Monosemanticity, appendix "Neuron resampling".
    """
    if not len(dead):
        return
    inputs, losses = gathered(x), gathered((x - sae_out).square().sum(1))
    chance = losses.double().square()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(chance.cpu() + 1e-30, len(dead), replacement=len(dead) > len(inputs), generator=generator)
    directions = inputs[drawn.to(x.device)] - sae.b_dec.data
    directions /= directions.norm(dim=1, keepdim=True).clamp_min(1e-8)
    alive = torch.ones(sae.cfg.d_sae, dtype=torch.bool, device=x.device)
    alive[dead] = False
    for name, share in (("W_dec", 1.0), ("W_enc", _ENCODER_SHARE)):
        rows = sae.leaves()[name].data
        length = rows[alive].norm(dim=1).mean() if bool(alive.any()) else rows.norm(dim=1).mean()
        rows[dead] = directions * (length * share)
    for name in sae.vectors:
        sae.leaves()[name].data[dead] = 0.0
    for name in ("W_dec", "W_enc", *sae.vectors):
        state = optimizer.state[sae.leaves()[name]]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment][dead] = 0.0
