"""The base class of sparse autoencoders: configuration, properties of an architecture, weights and forward pass."""

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

__all__ = ["ARCHITECTURES", "SaeConfig", "SparseAutoencoder", "Start"]

#: Every architecture by name. A class registers itself when it is defined; those of this package are in `saeffect.sae`.
ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {}


@dataclass(frozen=True)
class SaeConfig:
    """What an SAE is, in SAELens' terms.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        k: Active features a token (topk only).
        apply_b_dec_to_input: Whether the decoder's bias is subtracted from the input.
        normalize_activations: "none", "layer_norm" (each input standardised) or "constant_norm_rescale" (each input
            scaled to a norm of √d_in), undone on the output.
        rescale_acts_by_decoder_norm: TopK only: rank features by activation times decoder norm.
        centre_input: Whether each input's mean is subtracted, and added to the output (TransformerLens'
            center_writing_weights).
        metadata: Its origin: model_name, hook_name, training tokens, and so on.
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
        """The hook in the metadata, if any, as a TransformerLens name."""
        name = self.metadata.get("hook_name")
        return (hook_of_module(str(name)) or str(name)) if name else None

    @property
    def module_path(self) -> str | None:
        """The transformers module whose output the SAE reads, if the metadata name one."""
        names = (self.metadata.get(key) for key in ("hookpoint", "hook_name"))
        return next((str(name) for name in names if name and hook_of_module(str(name))), None)


@dataclass
class Start:
    """Weights to start training from, as a JumpReLU: `relu(pre) · (pre > threshold)`, `pre = x @ W_enc + b_enc`."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None  # None: an architecture without thresholds


class SparseAutoencoder(nn.Module, ABC):
    """`feature_acts = activation((x - b_dec) @ W_enc + b_enc)`, `sae_out = feature_acts @ W_dec + b_dec`.

    Attributes:
        architecture: Its name in recipes, and in `ARCHITECTURES`.
        label: Its usual name in the literature, for display.
        saelens_name: Its name in SAELens' cfg.json.
        saved_as: The architecture in which it is saved, if another.
        keys: The recipe keys, of those that only some architectures have, that this one has.
        settings: Further keys of cfg.json that are kept in the metadata.
        penalty: The recipe key with the coefficient of its sparsity penalty.
        unit_rows: Whether its decoder rows are kept at length 1 by default.
        loss_parts: Parts of its loss besides "mse", and their labels; a name that ends with an underscore is a prefix.
        vectors: Parameters with one number a feature, float32 `[d_sae]`; the first decides whether a feature is on.
        sides: Names of the models whose activations are concatenated in its input; none for a single model.
        W_enc: float32 `[d_in, d_sae]`.
        W_dec: float32 `[d_sae, d_in]`.
        b_dec: float32 `[d_in]`; `b_enc` is one of the vectors, in most architectures.
    """

    architecture: ClassVar[str]
    label: ClassVar[str] = ""
    saelens_name: ClassVar[str] = ""
    saved_as: ClassVar[str | None] = None
    trainable: ClassVar[bool] = False
    keys: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    penalty: ClassVar[str | None] = None
    unit_rows: ClassVar[bool] = False
    loss_parts: ClassVar[tuple[tuple[str, str], ...]] = ()
    vectors: ClassVar[tuple[str, ...]] = ("b_enc",)
    sides: ClassVar[tuple[str, ...]] = ()
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "architecture" in cls.__dict__:
            cls.label = cls.__dict__.get("label", cls.architecture)
            cls.saelens_name = cls.__dict__.get("saelens_name", cls.architecture)
            ARCHITECTURES[cls.architecture] = cls

    def __init__(self, cfg: SaeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._copies: dict[torch.device, SparseAutoencoder] = {}
        # dtype is explicit, since torch's default changes while another thread loads a model in half precision.
        for name, shape in self.shapes(cfg).items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copies": {}}  # a changed copy of this SAE has copies of its own

    def on(self, device: torch.device) -> SparseAutoencoder:
        """This SAE on a device: itself, or a copy, which is kept."""
        if device.type == self.W_dec.device.type:
            return self
        if device not in self._copies:
            there = type(self)(self.cfg).to(device).eval().requires_grad_(requires_grad=False)
            there.load_state_dict(self.state_dict())
            self._copies[device] = there
        return self._copies[device]

    @classmethod
    def shapes(cls, cfg: SaeConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name, in order of storage."""
        vectors = dict.fromkeys(cls.vectors, (cfg.d_sae,))
        return {"W_enc": (cfg.d_in, cfg.d_sae), **vectors, "W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}

    @abstractmethod
    def activation(self, hidden_pre: Tensor) -> Tensor:
        """Feature activations of pre-activations `[..., d_sae]`, of the same shape, zero where a feature is off."""

    def encode(self, x: Tensor) -> Tensor:
        """`feature_acts`, float32 `[..., d_sae]`, at least 0, of any float `[..., d_in]`; ShapeMismatch for others.
        Computed where the SAE is, returned where `x` is.
        """
        return self.acts(self.normalised(x)).to(x.device)

    def normalised(self, x: Tensor) -> Tensor:
        """Activations of the model `[..., d_in]` as the encoder reads them: normalised or centred if the SAE asks for
        it; on the SAE's device.
        """
        return self._normalise(x)[0]

    def acts(self, sae_in: Tensor) -> Tensor:
        """Feature activations of normalised inputs."""
        return self.activation(self.hidden_pre(sae_in))

    def hidden_pre(self, sae_in: Tensor) -> Tensor:
        """Pre-activations `[..., d_sae]` of normalised inputs."""
        if self.cfg.apply_b_dec_to_input:
            sae_in = sae_in - self.b_dec
        return sae_in @ self.W_enc + getattr(self, self.vectors[0])

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_in]` of normalised inputs from feature activations `[..., d_sae]`."""
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / self.row_norms(self.W_dec)
        return feature_acts @ self.W_dec + self.b_dec

    def directions(self, features: Tensor) -> Tensor:
        """What one unit of each feature (int64) adds to normalised outputs, float32 `[*features.shape, d_in]`."""
        rows = self.W_dec[features]
        return rows / self.row_norms(rows)[..., None] if self.cfg.rescale_acts_by_decoder_norm else rows

    @staticmethod
    def row_norms(rows: Tensor) -> Tensor:
        """Lengths `[...]` of decoder rows `[..., d_in]`, by which penalties and rankings weight activations."""
        return rows.norm(dim=-1)

    def output_scale(self, x: Tensor) -> Tensor | float:
        """The factor between normalised reconstructions of `x` and the output, `[..., 1]`, or 1."""
        return self._normalise(x)[2]

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction, float32 `[..., d_in]`, on the scale of the input and on its device."""
        sae_in, mean, scale = self._normalise(x)
        return (self.decode(self.acts(sae_in)) * scale + mean).to(x.device)

    def as_start(self) -> Start:
        """This SAE's weights in the form from which any architecture can start training."""
        return Start(self.W_enc, self.b_enc, self.W_dec, self.b_dec, threshold=None)

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        if x.shape[-1] != self.cfg.d_in:
            raise ShapeMismatch(
                f"inputs are {x.shape[-1]} wide, but this SAE has d_in={self.cfg.d_in}.",
                fix="check model and hook.",
            )
        x = x.to(self.W_enc)
        if self.cfg.centre_input:
            centre = x.mean(dim=-1, keepdim=True)
            return x - centre, centre, 1.0
        if self.cfg.normalize_activations == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True).clamp_min(1e-30) / self.cfg.d_in**0.5
            return x / scale, 0.0, scale
        if self.cfg.normalize_activations != "layer_norm":
            return x, 0.0, 1.0
        mean = x.mean(dim=-1, keepdim=True)
        scale = (x - mean).std(dim=-1, keepdim=True)
        return (x - mean) / (scale + 1e-5), mean, scale  # as in SAELens: the epsilon for the input only
