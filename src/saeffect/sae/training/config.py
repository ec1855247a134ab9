"""Every number that decides an SAE, given the activations. Defaults that differ by architecture are in one table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from saeffect.config import StrictModel

__all__ = ["Architecture", "SaeTrainingConfig", "architectures_of"]

Architecture = Literal["standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"]

# Fields that only some architectures have. Setting another's is a mistake worth hearing about.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "k": ("topk", "batchtopk", "matryoshka"),
    "auxiliary_k": ("topk", "batchtopk", "matryoshka"),
    "auxiliary_weight": ("topk", "batchtopk", "matryoshka"),
    "rescale_acts_by_decoder_norm": ("topk", "batchtopk", "matryoshka"),
    "threshold_rate": ("batchtopk", "matryoshka"),
    "matryoshka_widths": ("matryoshka",),
    "l1_coefficient": ("standard", "gated"),
    "l0_coefficient": ("jumprelu",),
    "l0_kind": ("jumprelu",),
    "pre_act_coefficient": ("jumprelu",),
    "threshold_at_start": ("jumprelu",),
    "bandwidth": ("jumprelu",),
}


def architectures_of(field: str) -> tuple[str, ...]:
    """Architectures that a field is a setting of; none if it is a setting of all of them."""
    return _ONLY_FOR.get(field, ())


class SaeTrainingConfig(StrictModel):
    """Everything that decides the SAE, given the activations. None means: as usual for the architecture."""

    architecture: Architecture = Field("topk", description="What decides which features are active, and the loss.")
    d_sae: int = Field(4608, ge=1, description="Number of features.")
    k: int = Field(32, ge=1, description="Active features a token (on average, for batchtopk and matryoshka).")
    matryoshka_widths: tuple[int, ...] | None = Field(
        None, description="Features of each nested SAE, rising, the last being d_sae. None: d_sae/8, /4, /2, d_sae."
    )
    init_from: str | None = Field(
        None, description="Folder of an SAE whose weights to start from: features keep their index."
    )

    epochs: int = Field(2, ge=1, description="Passes over the activations, unless `steps` is given.")
    steps: int | None = Field(None, ge=1, description="Training steps; the text is read again if it is too short.")
    batch_size: int = Field(1024, ge=1, description="Tokens a step, over all processes.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="How the rate falls over the last `decay_share` of the steps."
    )
    warmup_share: float = Field(0.02, ge=0, lt=1, description="Share of the steps with a rising rate.")
    decay_share: float = Field(0.3, ge=0, le=1, description="Share of the steps, at the end, with a falling rate.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Memory of Adam's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Memory of Adam's second moment.")
    clip_gradient_norm: float | None = Field(
        1.0, gt=0, description="Longest gradient, over all weights. None: never clipped."
    )

    l1_coefficient: float = Field(5.0, ge=0, description="Weight of the L1 penalty on inputs of mean norm sqrt(d_in).")
    l0_coefficient: float = Field(1.0, ge=0, description="Weight of the L0 penalty.")
    l0_kind: Literal["step", "tanh"] = Field(
        "step", description="JumpReLU's L0: the number of active features, or the sum of tanh(4 · act · decoder norm)."
    )
    pre_act_coefficient: float | None = Field(None, ge=0, description="Weight of the penalty on dead pre-activations.")
    penalty_warmup_share: float = Field(
        0.05, ge=0, le=1, description="Share of the steps with a rising penalty; the paper's total_steps // 20."
    )
    threshold_at_start: float = Field(0.01, gt=0, description="JumpReLU's thresholds at the start.")
    bandwidth: float = Field(0.05, gt=0, description="Width of the kernel for the thresholds' gradient.")
    threshold_rate: float = Field(0.01, gt=0, le=1, description="Rate of the running mean of BatchTopK's threshold.")

    decoder_init_norm: float | None = Field(
        None, gt=0, description="Length of decoder rows at the start. None: 0.1 for free ones, 1 for unit ones."
    )
    decoder_rows: Literal["free", "unit"] | None = Field(
        None, description="Whether decoder rows are kept at length 1. None: unit for topk, batchtopk and matryoshka."
    )
    b_dec_init: Literal["zeros", "mean"] | None = Field(
        None, description="Where the decoder's bias starts. None: at the mean for unit decoders, else zeros."
    )
    apply_b_dec_to_input: bool = Field(True, description="Take the decoder's bias off the input.")
    rescale_acts_by_decoder_norm: bool = Field(
        False, description="Rank features by activation times decoder norm (SAELens' default)."
    )
    normalise_inputs: Literal["expected_average_only_in", "none"] = Field(
        "expected_average_only_in", description="Scale inputs to a mean norm of sqrt(d_in); folded into the weights."
    )

    dead_after: int = Field(100_000, ge=1, description="A feature is dead after so many tokens without firing.")
    auxiliary_k: int = Field(256, ge=1, description="Dead features a token may use in the auxiliary loss.")
    auxiliary_weight: float = Field(1 / 32, ge=0, description="Weight of the auxiliary loss; 0 for none.")
    resample_every: int | None = Field(None, ge=1, description="Steps between resamplings of dead features.")
    resample_until: float = Field(0.9, gt=0, le=1, description="No resampling after this share of the steps.")
    dead_window: int = Field(1000, ge=1, description="Steps over which a firing rate is measured for resampling.")
    dead_threshold: float = Field(1e-4, ge=0, lt=1, description="Firing rate under which a feature is resampled.")

    encoder_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the encoder's product alone; what could be active is evaluated again in float32."
    )
    dense_above: float = Field(
        0.04, ge=0, le=1, description="Share of entries active from which whole matrices are multiplied."
    )
    chunk: int = Field(1024, ge=1, description="Tokens an encoder product; bounds the memory.")

    metrics_every: int | None = Field(
        None,
        ge=1,
        description="Steps between lines of metrics.jsonl, and of progress. None: 30, or what makes 200 lines of a long"
        " training.",
    )
    evaluate_every: int = Field(600, ge=1, description="Steps between measurements on held-out text.")
    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of the newest stay.")
    seed: int = Field(0, description="Of the weights, and of the order of the activations unless `data_seed` is given.")
    data_seed: int | None = Field(None, description="Order of the activations. None: the seed.")

    @model_validator(mode="after")
    def _fits(self) -> SaeTrainingConfig:
        for name, of in _ONLY_FOR.items():
            if self.architecture not in of and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a setting of {', '.join(of)}, not of {self.architecture}")
        if self.has_k and self.k > self.d_sae:
            raise ValueError(f"k={self.k} is more than d_sae={self.d_sae}")
        widths = self.matryoshka_widths
        if widths is not None and (
            not widths or list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != self.d_sae
        ):
            raise ValueError(f"matryoshka_widths={list(widths)} must rise and end with d_sae={self.d_sae}")
        return self

    @property
    def has_k(self) -> bool:
        """Whether the architecture keeps k features a token."""
        return self.architecture in _ONLY_FOR["k"]

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows are kept at length 1."""
        return self.has_k if self.decoder_rows is None else self.decoder_rows == "unit"

    @property
    def decoder_norm_at_start(self) -> float:
        """Length of the decoder rows at the start."""
        return (1.0 if self.unit_decoder else 0.1) if self.decoder_init_norm is None else self.decoder_init_norm

    @property
    def b_dec_at_start(self) -> str:
        """Where the decoder's bias starts."""
        return self.b_dec_init or ("mean" if self.unit_decoder else "zeros")

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each nested SAE."""
        return self.matryoshka_widths or tuple(sorted({max(1, self.d_sae // d) for d in (8, 4, 2, 1)}))
