"""The interface of trainable architectures. Gradients are written by hand, since autograd would multiply by zeros."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from saeffect.sae.base import SaeConfig, SparseAutoencoder, Start
from saeffect.sae.encoder import Encoder
from saeffect.sae.entries import Entries
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = ["StepInputs", "StepResult", "TrainableSae", "project_out_rows", "squared_error"]

_ROWS = 4096  # features whose gradients are computed at a time, so that they stay in the cache


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a step besides its batch.

    Attributes:
        n_tokens: Tokens of the whole batch, over all processes. Each loss is a sum over this process's tokens divided
            by it, so that losses and gradients add up over processes.
        coefficient: The sparsity penalty's coefficient at this step (warm-up applied).
        dead: Indices of features that have not fired for `dead_after` tokens, int64 `[n_dead]`.
        tangent: Whether to leave out the part of the decoder's gradient parallel to rows of fixed length; only set for
            classes with `leaves_out_parallel`, for others `before_step` subtracts that part.
    """

    config: SaeTrainingConfig
    encoder: Encoder
    n_tokens: int
    coefficient: float = 0.0
    dead: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    tangent: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step measured on this process's tokens. Losses are 0-dim float32, each already divided by
    `StepInputs.n_tokens`, and their sum is minimised; "mse" (sum over dimensions of the squared error) is always
    present.
    """

    losses: Mapping[str, Tensor]
    fired: Tensor  # tokens on which each feature was active, int64 [d_sae]
    sae_out: Tensor  # float32 [n, d_in]


class TrainableSae(SparseAutoencoder):
    """An SAE that can be trained. Its encoder is stored with one row a feature; `W_enc` is a transposed view.
    `leaves_out_parallel`: whether `accumulate_gradients` uses `StepInputs.tangent`; `running`: names of 0-dim float64
    buffers that training updates and a checkpoint must keep.
    """

    trainable = True
    leaves_out_parallel: ClassVar[bool] = False
    running: ClassVar[tuple[str, ...]] = ()
    _leaves: dict[str, nn.Parameter]

    def __init__(self, cfg: SaeConfig) -> None:
        super().__init__(cfg)
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, dtype=torch.float32).T)
        for name in self.running:
            # Float64, as in SAELens: in float32 a small rate times a small change is lost.
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def W_rows(self) -> Tensor:
        """The encoder with one row a feature, `[d_sae, d_in]`."""
        return self.W_enc.data.T

    def leaves(self) -> dict[str, nn.Parameter]:
        """The optimizer's parameters by name, the same contiguous tensors on every call, with `.grad`; they share
        the SAE's memory. "W_enc" is `[d_sae, d_in]`.
        """
        if not hasattr(self, "_leaves"):
            leaves = {}
            for name, parameter in self.named_parameters():
                data = self.W_rows if name == "W_enc" else parameter.data
                leaves[name] = nn.Parameter(data)
                leaves[name].grad = torch.zeros_like(data)
            object.__setattr__(self, "_leaves", leaves)  # not a submodule: state_dict keeps the parameters' names
        return self._leaves

    def gradient(self, name: str) -> Tensor:
        """The gradient of a leaf ("W_enc": `[d_sae, d_in]`)."""
        grad = self.leaves()[name].grad
        assert grad is not None
        return grad

    @torch.no_grad()
    def initialise(self, sample: Tensor, config: SaeTrainingConfig) -> None:
        """Random decoder rows of norm `config.decoder_norm_at_start`, the encoder their transpose; the decoder's
        bias may start at the mean of `sample`, scaled inputs, float32 `[n, d_in]`. Source: SAELens' heuristic
        initialisation, after Anthropic's April 2024 update.
        """
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(rows * (config.decoder_norm_at_start / rows.norm(dim=1, keepdim=True)))
        self.W_enc.copy_(self.W_dec.T)
        for name in self.vectors:
            getattr(self, name).zero_()
        self.b_dec.copy_(sample.mean(0)) if config.b_dec_at_start == "mean" else self.b_dec.zero_()

    @abstractmethod
    def accumulate_gradients(self, x: Tensor, step: StepInputs) -> StepResult:
        """Losses on a batch of scaled inputs, float32 `[n, d_in]`; replaces the leaves' `.grad`."""

    @classmethod
    def in_words(cls, config: SaeTrainingConfig) -> list[str]:
        """The architecture's settings of the recipe in words, for the model card."""
        del config
        return []

    @torch.no_grad()
    def after_step(self, step: StepInputs) -> None:
        """Restore constraints after the optimizer's step."""
        if step.config.unit_decoder:
            for rows in self.W_dec.data.split(_ROWS):
                rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def before_step(self, step: StepInputs) -> None:
        """Change gradients before the optimizer's step."""
        if step.config.unit_decoder and not step.tangent:
            # A few rows at a time, so that the products stay in the cache.
            for grad, rows in zip(self.gradient("W_dec").split(1024), self.W_dec.data.split(1024), strict=True):
                project_out_rows(grad, rows)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Convert an SAE of inputs multiplied by `scale` to one of unscaled activations (SAELens'
        `expected_average_only_in`, folded): both biases are divided by `scale`; the matrices stay, and feature
        activations become smaller by `scale`.
        """
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    def for_inference(self) -> SparseAutoencoder:
        """The SAE to save: this one, unless the architecture has another form at inference."""
        return self

    def running_state(self) -> dict[str, Tensor]:
        """Tensors besides the leaves that a checkpoint must keep; they are updated in place."""
        return {name: getattr(self, name) for name in self.running}

    # Starting from another SAE's weights.

    @torch.no_grad()
    def start_from(self, source: SparseAutoencoder, *, unit_decoder: bool) -> None:
        """Copy the weights of another SAE of any architecture; each feature keeps its index. With `unit_decoder` the
        lengths of decoder rows move into the encoder, and features that were ranked by activation are then ranked by
        activation times length.
        """
        start = source.as_start()
        ranked_alike = source.cfg.rescale_acts_by_decoder_norm <= self.cfg.rescale_acts_by_decoder_norm
        if unit_decoder or not ranked_alike:
            length = start.W_dec.norm(dim=1).clamp_min(1e-8)
            start.W_enc, start.b_enc = start.W_enc * length, start.b_enc * length
            start.W_dec = start.W_dec / length[:, None]
            start.threshold = None if start.threshold is None else start.threshold * length
        # If only one of the two SAEs subtracts b_dec from the input, the encoder's bias makes up for it.
        sign = int(self.cfg.apply_b_dec_to_input) - int(source.cfg.apply_b_dec_to_input)
        if sign:
            start.b_enc = start.b_enc + sign * (start.b_dec @ start.W_enc)
        self.W_enc.copy_(start.W_enc)
        self.W_dec.copy_(start.W_dec)
        self.b_dec.copy_(start.b_dec)
        self.set_start(start)

    def set_start(self, start: Start) -> None:
        """Copy the biases and thresholds that the architecture has; the matrices are set already."""
        self.b_enc.data.copy_(start.b_enc)

    # Parts of a step.

    def centred(self, x: Tensor) -> Tensor:
        """The encoder's input for an SAE's input."""
        return x - self.b_dec.data if self.cfg.apply_b_dec_to_input else x

    @torch.no_grad()
    def backward(
        self, entries: Entries, d_hidden: Tensor, d_out: Tensor, centred: Tensor, pull: Tensor | None = None
    ) -> None:
        """Set the gradients of the weights from gradients at the entries, whose values are the activations.

        `d_hidden` is the loss's gradient by pre-activation, shaped like `entries.values`, zero where none flows;
        `d_out` that by `sae_out` and `centred` the encoder's input, float32 `[n, d_in]`; `pull` the multiple of each
        decoder row, `[d_sae]`, or of each of its sides, `[d_sae, n_sides]`, to add to its gradient (see
        `pull_on_norms`).
        """
        W_dec, d_W_dec, d_W_enc = self.W_dec.data, self.gradient("W_dec"), self.gradient("W_enc")
        for start in range(0, len(W_dec), _ROWS):
            rows = slice(start, start + _ROWS)
            entries.outer(entries.values, d_out, d_W_dec[rows], rows=rows)
            if pull is not None:
                self.add_pull(d_W_dec[rows], W_dec[rows], pull[rows])
            entries.outer(d_hidden, centred, d_W_enc[rows], rows=rows)
        self.gradient("b_enc").copy_(entries.feature_sums(d_hidden))
        self.gradient("b_dec").copy_(d_out.sum(0))
        self.backward_to_b_dec(self.gradient("b_enc"))

    def backward_to_b_dec(self, d_hidden_sums: Tensor) -> None:
        """The part of b_dec's gradient that comes through the encoder: a matrix-vector product."""
        if self.cfg.apply_b_dec_to_input:
            self.gradient("b_dec").sub_(self.W_rows.T @ d_hidden_sums)

    @staticmethod
    def row_parallel_part(entries: Entries, d_acts: Tensor, step: StepInputs) -> Tensor | None:
        """Minus the component of the decoder's gradient along each row (of length 1), in multiples of the row; None
        if `step.tangent` is off. It follows from `d_acts = d_out @ W_dec.T`.
        """
        return entries.feature_sums(entries.values * d_acts).neg_() if step.tangent else None

    def pull_on_norms(self, d_norm: Tensor, norm: Tensor, rows: Tensor | None = None) -> Tensor:
        """The part of W_dec's gradient that comes through `row_norms`, in multiples of each row (or side of it).
        `d_norm` is the loss's gradient by norm, `norm` the norms, both float32 `[n]`; `rows` are W_dec by default.
        """
        del rows
        return d_norm / norm.clamp_min(1e-12)

    @staticmethod
    def add_pull(gradient: Tensor, rows: Tensor, pull: Tensor) -> None:
        """Add multiples of each row, or of each side of it, to the gradient, in place; all have `[n]` rows."""
        if pull.ndim == 2:
            shape = (len(rows), pull.shape[1], -1)
            gradient, rows, pull = gradient.view(shape), rows.view(shape), pull[:, :, None]
        else:
            pull = pull[:, None]
        gradient.addcmul_(rows, pull)


def project_out_rows(gradient: Tensor, rows: Tensor) -> None:
    """Subtract from the gradient its component along each row, in place; both float32 `[n, d_in]`, rows of length 1."""
    gradient.addcmul_(rows, (gradient * rows).sum(1, keepdim=True), value=-1)


def squared_error(error: Tensor) -> Tensor:
    """Sum of all squares of float32 `[n, d_in]`, 0-dim; summed row by row for accuracy."""
    return torch.linalg.vector_norm(error, dim=1).square_().sum()
