"""A recipe: everything that decides an SAE. The fields below are the keys of its YAML and of their reference page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from saeffect.config import BosRule, ModelConfig, StrictModel, TextSource
from saeffect.config_chat import ReadKeys, with_field
from saeffect.config_keys import keys_table
from saeffect.errors import ConfigError
from saeffect.lm.hooks import parse_hook
from saeffect.sae.base import ARCHITECTURES, SparseAutoencoder

__all__ = ["SaeRecipe", "SaeTrainingConfig", "recipe_keys"]

_TOKENS_IN_SHARDS = 1_048_576
# Keys that SAEs trained in one pass over the activations share, since they take the same batches.
_SHARED = ("batch_size", "steps", "epochs", "checkpoint_every", "normalise_inputs", "order_seed")

_HEAD = """# The keys of a recipe

What `saeffect train-sae` and `saeffect harvest` read from a YAML file, and a [study](study.md) from its section
`training` (there without `model` and `hook`, which each arm has). Keys that are not here are refused; paths are
relative to the file, as [in a study](study.md). This page is what `saeffect train-sae --keys` prints.
"""


class SaeTrainingConfig(StrictModel):
    """Everything that decides the SAE, given the activations. None means the architecture's default."""

    architecture: str = Field("topk", description="What decides which features are active, and the loss.")
    d_sae: int = Field(4608, ge=1, description="Number of features.")
    k: int = Field(32, ge=1, description="Active features a token (on average over a batch for all but topk).")
    matryoshka_widths: tuple[int, ...] | None = Field(
        None, description="Features of each nested SAE, rising, the last being d_sae. None: d_sae/8, /4, /2, d_sae."
    )
    init_from: str | None = Field(
        None,
        description="Folder of an SAE, or its name, whose weights to start from: features keep their index.",
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
        None,
        description="Whether decoder rows are kept at length 1, a crosscoder's with both sides together. None: unit if"
        " `k` decides what is active.",
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
    centre_inputs: bool = Field(
        False,
        description="Take each activation's mean over its dimensions off, and add it to the reconstruction: as SAEs of"
        " models loaded with center_writing_weights do.",
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

    @field_validator("architecture")
    @classmethod
    def _check_architecture(cls, name: str) -> str:
        if name not in _trainable():
            raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, _trainable()))})
        return name

    @model_validator(mode="after")
    def _check_keys(self) -> SaeTrainingConfig:
        for name in dict.fromkeys(key for kind in _trainable().values() for key in kind.keys):
            architectures = _architectures_with(name)
            if self.architecture not in architectures and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a setting of {', '.join(architectures)}, not of {self.architecture}")
        if self.has_k and self.k > self.d_sae:
            raise ValueError(f"k={self.k} is more than d_sae={self.d_sae}")
        if self.centre_inputs and self.kind.sides:
            raise ValueError("centre_inputs is for one model; a crosscoder reads two")
        widths = self.matryoshka_widths
        if widths is not None and (
            not widths or list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != self.d_sae
        ):
            raise ValueError(f"matryoshka_widths={list(widths)} must rise and end with d_sae={self.d_sae}")
        return self

    @property
    def kind(self) -> type[SparseAutoencoder]:
        return _trainable()[self.architecture]

    @property
    def has_k(self) -> bool:
        return "k" in self.kind.keys

    @property
    def unit_decoder(self) -> bool:
        return self.kind.unit_rows if self.decoder_rows is None else self.decoder_rows == "unit"

    @property
    def decoder_norm_at_start(self) -> float:
        return (1.0 if self.unit_decoder else 0.1) if self.decoder_init_norm is None else self.decoder_init_norm

    @property
    def b_dec_at_start(self) -> str:
        return self.b_dec_init or ("mean" if self.unit_decoder else "zeros")

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each nested SAE."""
        return self.matryoshka_widths or tuple(sorted({max(1, self.d_sae // d) for d in (8, 4, 2, 1)}))

    @property
    def order_seed(self) -> int:
        """What decides the order of the activations."""
        return self.seed if self.data_seed is None else self.data_seed

    def unlike(self, other: SaeTrainingConfig) -> tuple[str, Any, Any] | None:
        """A key that keeps two SAEs from training side by side, and its two values; None if they can."""
        for key in _SHARED:
            value, other_value = getattr(self, key), getattr(other, key)
            if value != other_value:
                return ("data_seed" if key == "order_seed" else key), value, other_value
        return None


class SaeRecipe(ReadKeys):
    """Model, hook, text and training: arms to be compared share all of it but the model."""

    model: ModelConfig = Field(description="Hub id, folder or .gguf file, or a mapping with path, adapter, dtype, ...")
    tuned: ModelConfig | None = Field(
        None,
        description="A fine-tuned version of `model`, to train on both: a crosscoder on the activations of both side by"
        " side, any other architecture on tuned minus base.",
    )
    hook: str = Field(description="TransformerLens name, such as blocks.8.hook_resid_pre.")
    text: tuple[TextSource, ...] = Field(
        min_length=1, description="Sources, each with name, path, field, licence; rows are taken from each in turn."
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of text to train on, over all sources. None: 1,048,576; if streamed, all there is.",
    )
    held_out_tokens: int = Field(81_920, ge=1, description="Tokens to measure on, from other documents.")
    held_out: float = Field(0.06, gt=0, lt=0.5, description="Share of documents kept for measuring.")
    context_size: int = Field(256, ge=8, description="Tokens a row.")
    bos: BosRule = Field(
        "auto",
        description="Whether every row begins with the tokenizer's BOS token, such as `<bos>`. auto: as the SAE of"
        " `init_from` says (prepend_bos); else as the tokenizer does.",
    )
    text_seed: int = Field(0, description="Order of the documents.")
    activations: Literal["shards", "streamed"] = Field(
        "shards",
        description="shards: harvested to disk first, and shared by all SAEs of the model. streamed: the model runs"
        " while the SAE trains; only the held-out activations are written.",
    )
    max_disk_gb: float | None = Field(
        None, gt=0, description="The most that activations may take on disk, in GB of 10^9 bytes. None: what is free."
    )
    pool_rows: int = Field(512, ge=1, description="Rows of text in the shuffled buffer, if streamed.")
    evaluation_rows: int = Field(8, ge=1, description="Held-out rows for the CE loss score during training.")
    evaluation_tokens: int = Field(16_384, ge=1, description="Held-out tokens for the other measures during training.")
    ce_rows: int = Field(48, ge=1, description="Held-out rows for the cross-entropy at the end.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float16", description="Of the saved weights.")
    sae: SaeTrainingConfig = Field(default_factory=SaeTrainingConfig, description="How to train; the keys are below.")
    saes: dict[str, dict[str, Any]] | None = Field(
        None,
        description="Several SAEs in one pass over the activations, by name: changes of `sae`, such as"
        " {seed-0: {seed: 0}, wide: {d_sae: 9216}}. Each goes to a folder of its name. They share the order of the"
        " data (`data_seed`, by default the seed in `sae`), and what else makes a batch.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_field(cls, value: Any) -> Any:
        return value | {"text": with_field(value["text"], value.get("format"))} if "text" in value else value

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        parse_hook(self.hook, at="hook")
        self.combination  # noqa: B018 - the property checks every training
        if self.activations == "streamed" and self.positions != ("all",):
            raise ValueError("streamed activations are of all positions: leave positions out, or harvest shards")
        if self.activations == "streamed" and self.tokens is None and self.sae.steps is None:
            raise ValueError("streamed text has no known length: give tokens, or sae.steps")
        return self

    @property
    def combination(self) -> Literal["both", "difference"] | None:
        """How two models' activations are combined; None for one model. ConfigError if architectures and `tuned` do not
        fit.
        """
        kinds = {name: bool(config.kind.sides) for name, config in self.trainings().items()}
        if self.tuned is None and any(kinds.values()):
            raise ConfigError(
                "a crosscoder reads two models.", at="tuned", fix="give the fine-tuned model: tuned: {path: ...}."
            )
        if len(set(kinds.values())) > 1:
            raise ConfigError(
                "crosscoders read both models, other SAEs their difference: they cannot share activations.",
                at="saes",
                fix="give them recipes of their own; shards are shared anyway.",
            )
        if self.tuned is None:
            return None
        return "both" if next(iter(kinds.values())) else "difference"

    @property
    def tokens_a_pass(self) -> int | None:
        """Tokens of text in one pass over it; None if unknown beforehand."""
        return _TOKENS_IN_SHARDS if self.tokens is None and self.activations == "shards" else self.tokens

    @property
    def max_disk_bytes(self) -> int | None:
        return None if self.max_disk_gb is None else int(self.max_disk_gb * 1e9)

    def trainings(self) -> dict[str, SaeTrainingConfig]:
        """The config of each SAE by name ("" for a single one); ConfigError for invalid names, keys or combinations."""
        if self.saes is None:
            return {"": self.sae}
        if not self.saes:
            raise ConfigError("no SAE is named.", at="saes", fix="name one, or leave saes out.")
        base = self.sae.model_dump(exclude_unset=True)
        base["data_seed"] = self.sae.order_seed
        configs = {}
        for name, changes in self.saes.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
                raise ConfigError(
                    f"{name!r} is no name for a folder.", at="saes", fix="use letters, digits, dot, dash, underscore."
                )
            configs[name] = config = SaeTrainingConfig.read(base | changes, at=f"saes.{name}")
            if unlike := config.unlike(configs[next(iter(configs))]):
                key, value, first = unlike
                raise ConfigError(
                    f"SAEs that are trained side by side share {key}; got {first} and {value}.",
                    at=f"saes.{name}.{key}",
                    fix="set it in sae alone, or give this SAE a recipe of its own: shards are shared anyway.",
                )
        return configs

    def folders(self, out: Path) -> dict[str, Path]:
        return {name: out / name if name else out for name in self.trainings()}

    def of_one(self, name: str) -> SaeRecipe:
        """The recipe of one of the SAEs, without the others."""
        return self.model_copy(update={"sae": self.trainings()[name], "saes": None})


def recipe_keys() -> str:
    """The keys as a page of Markdown: a table for the recipe and one for each mapping in it."""
    return "\n".join(
        [
            _HEAD,
            keys_table("Recipe", SaeRecipe),
            keys_table("`sae`, and each of `saes`", SaeTrainingConfig, more=_architecture_note),
            keys_table("`model`", ModelConfig),
            keys_table("each of `text`", TextSource),
        ]
    )


def _architecture_note(key: str) -> str:
    if key == "architecture":
        return f"One of {', '.join(_trainable())}."
    architectures = _architectures_with(key)
    return f"Only for {', '.join(architectures)}." if architectures else ""


def _trainable() -> dict[str, type[SparseAutoencoder]]:
    return {name: kind for name, kind in ARCHITECTURES.items() if kind.trainable}


def _architectures_with(key: str) -> tuple[str, ...]:
    """Architectures that have a key; empty for keys that all have."""
    return tuple(name for name, kind in _trainable().items() if key in kind.keys)
