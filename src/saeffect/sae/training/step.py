"""One step of training, and its schedules. Read `TrainingStep.__call__` downwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.parallel import add_up, gathered
from saeffect.sae.base import ARCHITECTURES, SaeConfig
from saeffect.sae.encoder import Encoder
from saeffect.sae.trainable import StepInputs, TrainableSae
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = ["StepReport", "TrainingStep", "gradient_norm", "new_sae", "penalty_coefficient", "rate_factor", "resample"]

# Anthropic's choice: a resampled feature's encoder row starts a fifth as long as the mean of alive features'.
_ENCODER_SHARE = 0.2


def new_sae(config: SaeTrainingConfig, d_in: int) -> TrainableSae:
    """An SAE of the recipe's architecture and size, its weights not yet set."""
    kind = ARCHITECTURES[config.architecture]
    assert issubclass(kind, TrainableSae)
    return kind(
        SaeConfig(
            config.architecture,
            d_in,
            config.d_sae,
            k=config.k if config.has_k else None,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            rescale_acts_by_decoder_norm=config.rescale_acts_by_decoder_norm,
            centre_input=config.centre_inputs,
        )
    )


@dataclass(frozen=True)
class StepReport:
    """Result of a step, over all processes."""

    losses: dict[str, float]  # terms by name; "mse" is always there
    l0: float  # mean active features a token
    n_resampled: int  # features resampled after the step
    gradient_norm: float  # before clipping; NaN if gradients are not clipped
    stop: bool = False  # whether any process asked to stop

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


class TrainingStep:
    """An initialised SAE with optimizer and counters; call it with a batch of scaled inputs to do one step."""

    def __init__(self, sae: TrainableSae, config: SaeTrainingConfig, total_steps: int) -> None:
        self.sae, self.config, self.total_steps = sae, config, total_steps
        self.leaves = sae.leaves()
        self.encoder = Encoder(getattr(torch, config.encoder_dtype), chunk=config.chunk, dense_above=config.dense_above)
        self.optimizer = torch.optim.Adam(
            self.leaves.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            fused=True,
        )
        counts = torch.zeros(config.d_sae, dtype=torch.int64, device=sae.W_dec.device)
        # Tokens since a feature last fired; tokens on which it fired in this window of steps and the one before.
        self.since_fired, self.fired, self.fired_before = counts, counts.clone(), counts.clone()
        self.tokens_counted = torch.zeros(2, dtype=torch.int64)  # in this window, in the one before

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the leaves and the optimizer's moments."""
        counters = {
            "since_fired": self.since_fired,
            "fired": self.fired,
            "fired_before": self.fired_before,
            "tokens_counted": self.tokens_counted,
        }
        return counters | {f"sae.{name}": t for name, t in self.sae.running_state().items()}

    @torch.no_grad()
    def __call__(self, step: int, x: Tensor, n_tokens: int | None = None, *, stop: bool = False) -> StepReport:
        """Do step number `step`, from 0. `x` is this process's part of the batch, scaled, float32 `[n, d_in]`;
        `n_tokens` counts the whole batch. `stop`: this process was asked to stop; the report has whether any was.
        """
        x, n_tokens = self.sae.normalised(x), len(x) if n_tokens is None else n_tokens
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * rate_factor(
            step, self.total_steps, self.config
        )
        inputs = StepInputs(
            self.config,
            self.encoder,
            n_tokens,
            coefficient=penalty_coefficient(step, self.total_steps, self.config),
            dead=(self.since_fired >= self.config.dead_after).nonzero().flatten(),
            tangent=self.config.unit_decoder and self.sae.leaves_out_parallel,
        )
        result = self.sae.accumulate_gradients(x, inputs)
        sums = torch.stack([*result.losses.values(), torch.tensor(float(stop), device=x.device)])
        add_up(sums, result.fired, *(self.sae.gradient(name) for name in self.leaves))
        self._count(result.fired, n_tokens)
        norm = math.nan
        if math.isfinite(float(sums.sum())):
            self.sae.before_step(inputs)
            if self.config.clip_gradient_norm is not None:
                norm = self._clip(self.config.clip_gradient_norm)
            self.optimizer.step()
            self.sae.after_step(inputs)
        return StepReport(
            dict(zip(result.losses, sums.tolist(), strict=False)),
            float(result.fired.sum()) / n_tokens,
            self._resample(step, x, result.sae_out),
            norm,
            stop=bool(sums[-1] > 0),
        )

    def log10_density(self) -> Tensor:
        """log10 of each feature's firing rate over the last one to two windows, float32 `[d_sae]`; 1e-10 is added."""
        tokens = int(self.tokens_counted.sum())
        return ((self.fired + self.fired_before).double() / max(tokens, 1) + 1e-10).log10().float()

    def _clip(self, longest: float) -> float:
        """Let the optimizer scale the gradients down to the norm `longest`; returns their norm before."""
        norm = gradient_norm([self.sae.gradient(name) for name in self.leaves])
        # Fused Adam divides gradients by this number while it reads them (meant for mixed precision), which saves a
        # pass over all of them.
        scale = torch.tensor(norm / longest, device=self.sae.W_dec.device) if norm > longest else None
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        return norm

    def _count(self, fired: Tensor, n_tokens: int) -> None:
        self.since_fired += n_tokens
        self.since_fired[fired > 0] = 0
        self.fired += fired
        self.tokens_counted[0] += n_tokens

    def _resample(self, step: int, x: Tensor, sae_out: Tensor) -> int:
        """At the end of a window of counts, start the next, and resample dead features if due; returns how many."""
        config, n_resampled = self.config, 0
        if (step + 1) % config.dead_window:
            return 0
        due = config.resample_every is not None and (step + 1) % config.resample_every == 0
        if due and step + 1 <= config.resample_until * self.total_steps:
            rate = self.fired.double() / int(self.tokens_counted[0])
            dead = (rate < config.dead_threshold).nonzero().flatten()
            n_resampled = len(dead)
            if n_resampled:
                resample(self.sae, self.optimizer, dead, x, sae_out, seed=config.seed * 1_000_003 + step)
                self.since_fired[dead] = 0
        self.fired_before.copy_(self.fired)
        self.fired.zero_()
        self.tokens_counted.copy_(torch.tensor([0, int(self.tokens_counted[0])]))
        return n_resampled


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Norm of all gradients together, as in `torch.nn.utils.clip_grad_norm_`; by rows: faster, with less rounding.

    Example:
        >>> gradient_norm([torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([12.0])])
        13.0
    """
    lengths = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return float(torch.linalg.vector_norm(torch.cat(lengths)))


def rate_factor(step: int, total: int, config: SaeTrainingConfig) -> float:
    """The factor of the learning rate at a step: warm-up, plateau, decay.

    Example:
        >>> config = SaeTrainingConfig(warmup_share=0.2, decay_share=0.5)
        >>> [round(rate_factor(step, 10, config), 2) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    rise = min(1.0, (step + 1) / max(1, round(config.warmup_share * total)))
    decay = round(config.decay_share * total)
    if config.schedule == "constant" or not decay:
        return rise
    left = min(1.0, (total - step) / decay)
    return min(rise, left if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def penalty_coefficient(step: int, total: int, config: SaeTrainingConfig) -> float:
    """The sparsity penalty's coefficient at a step: rising from 0, constant after the warm-up.

    Example:
        >>> config = SaeTrainingConfig(architecture="standard", l1_coefficient=8.0, penalty_warmup_share=0.4)
        >>> [penalty_coefficient(step, 10, config) for step in range(6)]
        [0.0, 2.0, 4.0, 6.0, 8.0, 8.0]
    """
    penalty = ARCHITECTURES[config.architecture].penalty
    full: float = getattr(config, penalty) if penalty else 0.0
    warmup = int(config.penalty_warmup_share * total)
    return full * min(1.0, step / warmup) if warmup else full


@torch.no_grad()
def resample(
    sae: TrainableSae, optimizer: torch.optim.Optimizer, dead: Tensor, x: Tensor, sae_out: Tensor, *, seed: int
) -> None:
    """Restart dead features, int64 `[n_dead]`, at inputs that the SAE reconstructs badly, and reset their moments in
    the optimizer.

    Inputs are drawn with probability proportional to the square of their loss. The decoder row becomes the input's
    direction with the mean length of alive rows, the encoder row the same direction a fifth as long as alive rows, and
    bias and threshold become zero. `x` are this process's scaled inputs, float32 `[n, d_in]`, and `sae_out` their
    reconstructions; with the same `seed` the result is the same in every process. Source: Bricken et al. (2023),
    Towards Monosemanticity, appendix "Neuron resampling".
    """
    if not len(dead):
        return
    inputs, losses = gathered(x), gathered((x - sae_out).square().sum(1))
    weights = losses.double().square()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(
        weights.cpu() + 1e-30, len(dead), replacement=len(dead) > len(inputs), generator=generator
    )
    directions = inputs[chosen.to(x.device)] - sae.b_dec.data
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
