"""What every sparse autoencoder has in common: weights, names, and the way from input to reconstruction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saeffect.errors import ShapeMismatch
from saeffect.lm.hooks import hook_of_module

__all__ = ["SaeConfig", "SparseAutoencoder"]


@dataclass(frozen=True)
class SaeConfig:
    """What an SAE is, in SAELens' words.

    Attributes:
        architecture: A key of `saelens_format.ARCHITECTURES`.
        d_in: Width of the activations.
        d_sae: Number of features.
        k: Active features a token (topk only).
        apply_b_dec_to_input: Whether the decoder's bias is taken off the input first.
        normalize_activations: "none" or "layer_norm" (each input standardised, undone on the way out).
        rescale_acts_by_decoder_norm: TopK only: rank features by activation times decoder norm.
        centre_input: Whether it was trained on residuals centred over dimensions (TransformerLens'
            center_writing_weights): the mean is taken off the input and put back on the output.
        metadata: Where it comes from: model_name, hook_name, training tokens, and so on.
    """

    architecture: str
    d_in: int
    d_sae: int
    k: int | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    centre_input: bool = False
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def hook_name(self) -> str | None:
        """The hook that the metadata name, if any, in TransformerLens' words."""
        found = self.metadata.get("hook_name")
        return (hook_of_module(str(found)) or str(found)) if found else None

    @property
    def module_path(self) -> str | None:
        """The module of transformers whose output the SAE reads, if the metadata name it so."""
        named = (self.metadata.get(key) for key in ("hookpoint", "hook_name"))
        return next((str(name) for name in named if name and hook_of_module(str(name))), None)


class SparseAutoencoder(nn.Module, ABC):
    """`feature_acts = activation((x - b_dec) @ W_enc + b_enc)`, `sae_out = feature_acts @ W_dec + b_dec`.

    Attributes:
        cfg: The configuration.
        vectors: Names of the parameters with one number a feature, float32 `[d_sae]`.
        W_enc: float32 `[d_in, d_sae]`.
        b_enc: One of the vectors, in most architectures.
        W_dec: float32 `[d_sae, d_in]`.
        b_dec: float32 `[d_in]`.
    """

    architecture: ClassVar[str]
    vectors: ClassVar[tuple[str, ...]] = ("b_enc",)
    b_enc: nn.Parameter

    def __init__(self, cfg: SaeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_sae))
        for name in self.vectors:
            setattr(self, name, nn.Parameter(torch.zeros(cfg.d_sae)))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))

    @abstractmethod
    def activation(self, hidden_pre: Tensor) -> Tensor:
        """From pre-activations `[..., d_sae]` to feature activations of the same shape, zero where off."""

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations.

        Args:
            x: Activations of the model, `[..., d_in]`, any float dtype.

        Returns:
            `feature_acts`, float32 `[..., d_sae]`, at least 0.

        Raises:
            ShapeMismatch: The last axis is not `d_in`.
        """
        return self.activation(self.hidden_pre(self._normalised(x)[0]))

    def hidden_pre(self, sae_in: Tensor) -> Tensor:
        """Pre-activations `[..., d_sae]` of normalised inputs."""
        if self.cfg.apply_b_dec_to_input:
            sae_in = sae_in - self.b_dec
        return sae_in @ self.W_enc + self.b_enc

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_in]` of normalised inputs from feature activations `[..., d_sae]`."""
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / self.W_dec.norm(dim=-1)
        return feature_acts @ self.W_dec + self.b_dec

    def directions(self, features: Tensor) -> Tensor:
        """What one unit of each feature's activation adds to a reconstruction of normalised inputs.

        Args:
            features: Int64, any shape.

        Returns:
            Float32 `[*features.shape, d_in]`.
        """
        rows = self.W_dec[features]
        return rows / rows.norm(dim=-1, keepdim=True) if self.cfg.rescale_acts_by_decoder_norm else rows

    def output_scale(self, x: Tensor) -> Tensor | float:
        """By what normalised reconstructions of `x` are multiplied on the way out, `[..., 1]`, or 1."""
        return self._normalised(x)[2]

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction, float32 `[..., d_in]`, on the scale of the input."""
        sae_in, mean, scale = self._normalised(x)
        return self.decode(self.activation(self.hidden_pre(sae_in))) * scale + mean

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        if x.shape[-1] != self.cfg.d_in:
            raise ShapeMismatch(
                f"inputs are {x.shape[-1]} wide, but this SAE has d_in={self.cfg.d_in}.",
                fix="check model and hook.",
            )
        x = x.to(self.W_enc.dtype)
        if self.cfg.centre_input:
            centre = x.mean(dim=-1, keepdim=True)
            return x - centre, centre, 1.0
        if self.cfg.normalize_activations != "layer_norm":
            return x, 0.0, 1.0
        mean = x.mean(dim=-1, keepdim=True)
        scale = (x - mean).std(dim=-1, keepdim=True)
        return (x - mean) / (scale + 1e-5), mean, scale  # as SAELens: the epsilon only on the way in
