"""What each architecture minimises, written plainly on whole matrices, for autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from saeffect.sae.training.config import SaeTrainingConfig


@dataclass(frozen=True)
class Dense:
    """What the losses are made of.

    Attributes:
        p: Parameters by name; "W_enc" `[d_in, d_sae]`.
        x: `[n, d_in]`.
        config: The recipe.
        coefficient: The sparsity penalty's.
        dead: Indices.
    """

    p: Mapping[str, Tensor]
    x: Tensor
    config: SaeTrainingConfig
    coefficient: float
    dead: Tensor

    @property
    def norm(self) -> Tensor:
        if self.config.architecture.startswith("crosscoder"):  # the sum of the lengths in both models
            base, tuned = self.p["W_dec"].chunk(2, dim=1)
            return base.square().sum(1).sqrt() + tuned.square().sum(1).sqrt()
        return self.p["W_dec"].square().sum(1).sqrt()

    @property
    def product(self) -> Tensor:
        x = self.x - self.p["b_dec"] if self.config.apply_b_dec_to_input else self.x
        return x @ self.p["W_enc"]

    def decoded(self, acts: Tensor) -> Tensor:
        return acts @ self.p["W_dec"] + self.p["b_dec"]

    def mse(self, sae_out: Tensor) -> Tensor:
        return (sae_out - self.x).square().sum() / len(self.x)


@dataclass(frozen=True)
class Answer:
    """Losses by name, feature activations and reconstruction."""

    losses: dict[str, Tensor]
    acts: Tensor
    sae_out: Tensor


def standard(d: Dense) -> Answer:
    acts = (d.product + d.p["b_enc"]).relu()
    sae_out = d.decoded(acts)
    return Answer({"mse": d.mse(sae_out), "l1": d.coefficient * (acts @ d.norm).mean()}, acts, sae_out)


def _largest(d: Dense, batches: int) -> Answer:
    """The k largest a token (`batches` = n) or k a token on average over the whole batch (`batches` = 1)."""
    hidden_pre = d.product + d.p["b_enc"]
    by_norm = d.config.rescale_acts_by_decoder_norm or d.config.architecture == "crosscoder"
    ranked = (hidden_pre * d.norm if by_norm else hidden_pre).detach()
    rows = ranked.reshape(batches, -1)
    lowest = rows.sort(dim=1, descending=True).values[:, d.config.k * len(d.x) // batches - 1]
    acts = hidden_pre * ((rows >= lowest[:, None]).view_as(ranked) & (ranked > 0))
    sae_out = d.decoded(acts)
    losses = {"mse": d.mse(sae_out)}
    if len(d.dead):
        k = min(d.config.auxiliary_k, len(d.dead))
        among = ranked[:, d.dead]
        chosen = hidden_pre[:, d.dead] * (among >= among.sort(dim=1, descending=True).values[:, k - 1 : k])
        missing = chosen @ d.p["W_dec"][d.dead] - (d.x - sae_out).detach()
        share = min(1.0, len(d.dead) / d.config.auxiliary_k)
        losses["auxiliary"] = d.config.auxiliary_weight * share * missing.square().sum(1).mean()
    return Answer(losses, acts, sae_out)


def topk(d: Dense) -> Answer:
    return _largest(d, len(d.x))


def batchtopk(d: Dense) -> Answer:
    return _largest(d, 1)


def matryoshka(d: Dense) -> Answer:
    whole = _largest(d, 1)
    inner = {
        f"inner_mse_{width}": d.mse(whole.acts[:, :width] @ d.p["W_dec"][:width] + d.p["b_dec"])
        for width in d.config.widths[:-1]
    }
    return Answer(whole.losses | inner, whole.acts, whole.sae_out)


def jumprelu(d: Dense) -> Answer:
    hidden_pre, threshold, width = d.product + d.p["b_enc"], d.p["threshold"], d.config.bandwidth
    on = (hidden_pre > threshold).double()
    near = ((hidden_pre - threshold).abs() < width / 2).double()
    # Zero, with slope 1: what is multiplied by it has a gradient by the threshold and no value.
    moved = threshold - threshold.detach()
    acts = hidden_pre * on - (near * threshold / width).detach() * moved
    sae_out = d.decoded(acts)
    if d.config.l0_kind == "tanh":
        count = (4 * acts * d.norm).tanh()
    else:
        count = on - (near / width).detach() * moved
    losses = {"mse": d.mse(sae_out), "l0_penalty": d.coefficient * count.sum(1).mean()}
    if len(d.dead) and d.config.pre_act_coefficient is not None:
        short = (threshold - hidden_pre)[:, d.dead].relu()
        losses["pre_act"] = d.config.pre_act_coefficient * (short @ d.norm[d.dead]).mean()
    return Answer(losses, acts, sae_out)


def gated(d: Dense) -> Answer:
    gate = d.product + d.p["b_gate"]
    magnitude = d.product * d.p["r_mag"].exp() + d.p["b_mag"]
    acts = (gate > 0).double() * magnitude.relu()
    sae_out = d.decoded(acts)
    losses = {
        "mse": d.mse(sae_out),
        "l1": d.coefficient * (gate.relu() @ d.norm).mean(),
        "mse_by_gate": d.mse(d.decoded(gate.relu())),
    }
    return Answer(losses, acts, sae_out)


LOSSES: dict[str, Callable[[Dense], Answer]] = {
    "standard": standard,
    "topk": topk,
    "batchtopk": batchtopk,
    "jumprelu": jumprelu,
    "gated": gated,
    "matryoshka": matryoshka,
    "crosscoder_jumprelu": jumprelu,
    "crosscoder": batchtopk,
    "crosscoder_l1": standard,
}
