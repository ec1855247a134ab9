"""Crosscoders: one set of features for two models, read from both models' activations of the same tokens.

A crosscoder is an SAE whose input is both activations concatenated, `x = [x_base, x_tuned]`: a feature has one
activation, and a decoder in each model. It differs from other SAEs only in the norm of a decoder row: the sum of the
lengths of its two sides, so that a feature of one model costs less than one of both.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from saeffect.errors import ShapeMismatch
from saeffect.sae.base import SaeConfig
from saeffect.sae.batchtopk import BatchTopKSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.trainable import TrainableSae
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = [
    "BASE",
    "TUNED",
    "Crosscoder",
    "CrosscoderSae",
    "JumpReluCrosscoderSae",
    "L1CrosscoderSae",
    "side",
]

BASE, TUNED = 0, 1
"""Indices of the sides of input and decoder."""


def side(x: Tensor, which: int) -> Tensor:
    """One model's half of concatenated inputs, decoder rows or a decoder's bias, `[..., d_in]`.

    Example:
        >>> side(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), TUNED).tolist()
        [[3.0, 4.0]]
    """
    return x.unflatten(-1, (2, -1))[..., which, :]


class Crosscoder(TrainableSae):
    """What all crosscoders share; `cfg.d_in` is the width of both models together.

    Source: Lindsey et al. (2024), Sparse Crosscoders for Cross-Layer Features and Model Diffing.
    """

    sides = ("base", "tuned")

    def __init__(self, cfg: SaeConfig) -> None:
        if cfg.d_in % 2:
            raise ShapeMismatch(
                f"a crosscoder reads two models of one width side by side, so d_in={cfg.d_in} cannot be odd.",
                fix="give the width of both together.",
            )
        super().__init__(cfg)

    @staticmethod
    def row_norms(rows: Tensor) -> Tensor:
        """See `SparseAutoencoder`: the sum of the lengths of both sides."""
        return rows.unflatten(-1, (2, -1)).norm(dim=-1).sum(dim=-1)

    def pull_on_norms(self, d_norm: Tensor, norm: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `TrainableSae`: multiples of each side, `[n, 2]`."""
        del norm
        rows = self.W_dec.data if rows is None else rows
        return d_norm[:, None] / rows.unflatten(-1, (2, -1)).norm(dim=-1).clamp_min(1e-12)

    @torch.no_grad()
    def initialise(self, sample: Tensor, config: SaeTrainingConfig) -> None:
        """See `TrainableSae`; both sides start equal, so that only the models make them differ."""
        super().initialise(sample, config)
        half = side(self.W_dec, BASE)
        row = torch.cat([half, half], dim=1)
        self.W_dec.copy_(row * (config.decoder_norm_at_start / row.norm(dim=1, keepdim=True)))
        self.W_enc.copy_(self.W_dec.T)


class JumpReluCrosscoderSae(Crosscoder, JumpReluSae):
    """A crosscoder with a threshold for each feature."""

    architecture, label = "crosscoder_jumprelu", "JumpReLU crosscoder"


class CrosscoderSae(Crosscoder, BatchTopKSae):
    """Keeps the largest activations of a batch, each times the sum of its feature's decoder lengths.

    It is saved as a JumpReLU crosscoder: at inference a feature is on above the threshold estimated in training,
    divided by that sum. Source: Minder et al. (2025), Overcoming Sparsity Artifacts in Crosscoders.
    """

    architecture, label = "crosscoder", "BatchTopK crosscoder"
    keys: ClassVar[tuple[str, ...]] = tuple(key for key in BatchTopKSae.keys if key != "rescale_acts_by_decoder_norm")
    saved_as: ClassVar[str] = "crosscoder_jumprelu"

    def __init__(self, cfg: SaeConfig) -> None:
        super().__init__(dataclasses.replace(cfg, rescale_acts_by_decoder_norm=True))

    @torch.no_grad()
    def for_inference(self) -> JumpReluSae:
        """A JumpReLU crosscoder, a copy, with the same matrices and biases."""
        metadata = {**self.cfg.metadata, "training_architecture": self.architecture, "k": self.cfg.k}
        cfg = dataclasses.replace(
            self.cfg, architecture=self.saved_as, k=None, rescale_acts_by_decoder_norm=False, metadata=metadata
        )
        sae = JumpReluCrosscoderSae(cfg)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(getattr(self, name))
        sae.threshold.copy_(self.topk_threshold / self.row_norms(self.W_dec).double().clamp_min(1e-8))
        return sae.to(self.W_dec.device)


class L1CrosscoderSae(Crosscoder, StandardSae):
    """The penalty is `coefficient · Σ_f feature_acts_f · (‖base decoder_f‖ + ‖tuned decoder_f‖)`."""

    architecture, label = "crosscoder_l1", "L1 crosscoder"
