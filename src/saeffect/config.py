"""Configuration of a study: the fields below are the keys of its YAML file. Frozen, strict, no input or output."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from saeffect.config_chat import ReadKeys, with_field
from saeffect.config_keys import StrictModel, all_different
from saeffect.config_steering import InterventionConfig, SamplingConfig, SteeringConfig
from saeffect.errors import unknown_name

__all__ = [
    "ArmConfig",
    "BosRule",
    "ChangesConfig",
    "CoherenceConfig",
    "ComparisonConfig",
    "FeaturesConfig",
    "GateConfig",
    "InterventionConfig",
    "ModelConfig",
    "PushConfig",
    "PutBackConfig",
    "SCRIPTS",
    "SamplingConfig",
    "SelectionConfig",
    "SteeringConfig",
    "StrictModel",
    "StudyConfig",
    "TOKEN_CHOICES",
    "TextConfig",
    "TextSource",
]


BosRule = Literal["auto", "always", "never"]
"""Whether texts begin with the tokenizer's BOS token, see `saeffect.lm.tokens`."""
TOKEN_CHOICES = ("all", "embeddings")
SCRIPTS = (
    *("latin", "greek", "cyrillic", "armenian", "georgian", "hebrew", "arabic", "ethiopic", "mongolian", "cherokee"),
    *("devanagari", "bengali", "gurmukhi", "gujarati", "oriya", "tamil", "telugu", "kannada", "malayalam", "sinhala"),
    *("thai", "lao", "tibetan", "myanmar", "khmer", "han", "hiragana", "katakana", "hangul", "bopomofo"),
)


class ModelConfig(StrictModel):
    """Which language model."""

    path: str = Field(min_length=1, description="Hub id, folder, .gguf file, or bundled:smollm2-135m-instruct.")
    adapter: str | None = Field(None, description="PEFT adapter: folder, hub id, or bundled:<name>.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the processor has it, else float32."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    device_map: Literal["auto", "balanced", "sequential"] | None = Field(
        None,
        description="Spread the weights over all GPUs, then memory, then disk, as accelerate does.",
    )
    max_memory: dict[int | str, str] | None = Field(
        None, description="With device_map: the most that each GPU, by number, and the cpu may hold, such as 20GiB."
    )
    quantize: Literal["8bit", "4bit"] | None = Field(
        None, description="Load the weights with 8 or 4 bits (needs bitsandbytes); the rest runs in dtype."
    )
    merge_adapter: bool | None = Field(
        None,
        description="Merge the adapter into the weights, or keep it beside them; by default it is merged unless the"
        " model is quantised or spread over devices, where it cannot be.",
    )
    trust_remote_code: bool = Field(False, description="Let the model's repository run its own Python code.")

    @property
    def full_name(self) -> str:
        """The model with its adapter, for people."""
        return self.path + (f" + {self.adapter}" if self.adapter else "")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_placement(self) -> ModelConfig:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device and device_map are both given; expected one of them")
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("max_memory says how to spread a model over devices; it needs device_map")
        return self


class TextSource(StrictModel):
    """One kind of text: its path alone, or a mapping."""

    name: str = Field("", description="Its name: general, domain, ...; by default the last part of its path.")
    path: str = Field(
        min_length=1,
        description="A file (.jsonl, .json, .txt, .csv, .tsv, each also .gz or .zst; .parquet, .arrow), a folder or a"
        " pattern of such files, a folder that `save_to_disk` of datasets wrote, or a dataset on the hub (org/name, or"
        " hf:name).",
    )
    field: str = Field(
        "text",
        min_length=1,
        description='Which field of a row holds the text, or a template: `"{question}\\n{answer}"`.',
    )
    subset: str | None = Field(None, description="Subset (configuration) of a dataset on the hub.")
    split: str = Field("train", min_length=1, description="Split of a dataset.")
    encoding: str = Field(
        "utf-8", description="Of text that is not UTF-8, such as cp1252; a byte order mark decides by itself."
    )
    licence: str = Field("", description="For model cards.")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        value = {"path": value} if isinstance(value, str) else value
        if isinstance(value, dict) and isinstance(value.get("path"), str) and not value.get("name"):
            last = re.sub(r"[*?\[\]]+", "", PurePath(value["path"].removeprefix("hf:")).name).partition(".")[0]
            value = {**value, "name": last.strip("-_") or "text"}
        return value


class ArmConfig(StrictModel):
    """One language model with one SAE."""

    role: Literal["control", "treatment", "placebo"] = Field(
        description="control: the base model. treatment: the fine-tuned one. placebo: the base model again,"
        " with an SAE of another seed."
    )
    model: ModelConfig = Field(description="Which language model; the keys are below.")
    sae: str | None = Field(
        None,
        min_length=1,
        description="Folder of an SAE in any layout of [saes.md](saes.md); or saelens:<release>/<id>,"
        " hf:<repository>/<folder>, bundled:<name>. In every arm or, unsteered, none.",
    )
    more_saes: tuple[str, ...] = Field(
        (), description="Further SAEs of the same model from other seeds, which show the noise of SAE training."
    )
    hook: str | None = Field(None, description="TransformerLens name; by default the one in the SAE's cfg.json.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Replaces keys of training.sae for this arm, such as {seed: 1} for a placebo."
    )

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if self.more_saes and self.sae is None:
            raise ValueError("more_saes are seeds beside sae, which is missing")
        all_different("SAE", (self.sae, *self.more_saes))
        return self


class TextConfig(ReadKeys):
    """Text on which activity is measured and contexts are found; the same for every arm."""

    bundled: str | None = Field(None, description="Bundled token ids, such as smollm2-sampled.")
    sources: tuple[TextSource, ...] = Field((), description="Or files; best named general and domain.")
    tokens: int = Field(100_000, ge=256, description="At most this many tokens, over all sources.")
    context_size: int = Field(256, ge=8, description="Tokens a row; longer bundled rows are cut.")
    bos: BosRule = Field(
        "auto",
        description="Whether every row and every prompt begins with the tokenizer's BOS token, such as `<bos>`. auto:"
        " as the SAEs' cfg.json says (prepend_bos); where they say nothing, as the chat template writes it if chats are"
        " read or steered, else as the tokenizer does. A BOS that the template writes is never doubled.",
    )

    @property
    def label(self) -> str:
        """The text's name, or those of its sources."""
        return self.bundled or ", ".join(source.name for source in self.sources)

    @model_validator(mode="before")
    @classmethod
    def _fill_fields(cls, value: Any) -> Any:
        has_sources = isinstance(value, dict) and "sources" in value
        return value | {"sources": with_field(value["sources"], value.get("format"))} if has_sources else value

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.bundled is None) == (not self.sources):
            raise ValueError("give either bundled or sources")
        if self.bundled is not None and self.format == "chat":
            raise ValueError("bundled text is no chat: give sources with messages")
        all_different("source name", [source.name for source in self.sources])
        return self


class GateConfig(StrictModel):
    """When an SAE is good enough for its model: below these the study stops or warns."""

    tokens: int = Field(4_096, ge=256, description="Tokens of the study's text to measure on.")
    min_explained_variance: float = Field(0.6, le=1, description="Share of the variance of activations.")
    min_ce_loss_score: float = Field(
        0.8, le=1, description="(CE_zero - CE_sae) / (CE_zero - CE_clean), when activations are replaced."
    )
    on_failure: Literal["stop", "warn"] = Field("stop", description="When an SAE is below.")


class FeaturesConfig(StrictModel):
    """How features are named and exemplified."""

    top_k: int = Field(10, ge=2, le=100, description="Top tokens a feature.")
    projection: Literal["cosine", "dot"] = Field("cosine", description="dot is the paper's.")
    tokens: tuple[str, ...] = Field(
        ("all",),
        min_length=1,
        description="Which can be top tokens: all; embeddings: those that the word vectors know; or scripts, such as"
        " latin or [latin, greek]: those without a letter of another one.",
    )
    examples: int = Field(6, ge=1, le=50, description="Max-activating contexts a feature.")
    window: int = Field(24, ge=4, le=256, description="Tokens before the peak in a context.")

    @field_validator("tokens", mode="before")
    @classmethod
    def _known_tokens(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        for name in names if isinstance(names, list | tuple) else ():
            valid = (*TOKEN_CHOICES, *SCRIPTS) if len(names) == 1 else SCRIPTS
            if name not in valid:
                raise unknown_name("choice of tokens", str(name), valid, at="features.tokens")
        return names


class CoherenceConfig(StrictModel):
    """Which word vectors."""

    embeddings: str = Field("glove-wiki-gigaword-100", description="Bundled name or a vectors file.")


class SelectionConfig(StrictModel):
    """What makes a feature one of the domain."""

    vocabulary: str | None = Field("medical", description="Bundled name, or a text file with a word a line; or null.")
    domain: str = Field("", description="What to call the domain; by default the vocabulary's name.")
    min_matches: int = Field(2, ge=1, description="Top tokens in the vocabulary.")
    verdicts: str | None = Field(None, description="CSV: feature, arm, rater, verdict, label, note.")

    @property
    def subject(self) -> str:
        """What the domain is called."""
        return self.domain or PurePath(self.vocabulary or "domain").stem


class ComparisonConfig(StrictModel):
    """Intervals and tests."""

    alpha: float = Field(0.05, gt=0, lt=1, description="Highest q at which a feature passes.")
    n_boot: int = Field(2_000, ge=40, description="Resamples of a bootstrap interval.")
    n_permutations: int = Field(10_000, ge=100, description="Of a permutation test, unless all can be enumerated.")
    tests: tuple[str, ...] = Field(
        ("domain_share", "pass_rate", "coherence_mean"),
        min_length=1,
        description="Quantities of the contrasts that are tested; fixed before the run, all others are exploratory.",
    )
    crossed: tuple[Literal["direct_effect", "activity", "coherence", "reconstruction", "steering"], ...] = Field(
        (),
        description="Read and steer each arm's SAE on both models, to separate effects of the model from those of the"
        " SAE. All but steering take minutes; steering doubles the texts or more.",
    )


class ChangesConfig(StrictModel):
    """What both models read to find what fine-tuning changed: the beginnings of the first rows of the text."""

    rows: int = Field(192, ge=2, description="Number of first rows of the text.")
    tokens_per_row: int = Field(64, ge=8, description="First tokens of each row.")


class PutBackConfig(StrictModel):
    """How much of what fine-tuning does is carried by the features that changed most: they are put back."""

    rows: int = Field(24, ge=2, description="Rows of each source of text; the units of intervals.")
    tokens_per_row: int = Field(64, ge=8, description="First tokens of each row.")
    sizes: tuple[int, ...] = Field(
        (1, 2, 5, 10, 20, 50, 100, 200),
        min_length=1,
        description="Numbers of most changed features to put back; a set of all features is added.",
    )
    sizes_reversed: tuple[int, ...] = Field(
        (20, 100), description="The same for putting the fine-tuned model's values into the base model."
    )
    groups: int = Field(
        3, ge=0, description="Named groups that are put back one by one, the surest first; all together are added."
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for name in ("sizes", "sizes_reversed"):
            sizes = getattr(self, name)
            if min(sizes, default=1) < 1:
                raise ValueError(f"{name}: a set has at least one feature, not {min(sizes)}")
            all_different(f"number in {name}", sizes)
        return self


class PushConfig(StrictModel):
    """What the base model writes when it is pushed along the mean activation difference, and along that of nulls."""

    doses: tuple[float, ...] = Field(
        (0.15,),
        min_length=1,
        description="How far it is pushed, in mean residual norms of the base model. Far pushes leave no words.",
    )
    nulls: int = Field(
        19,
        ge=0,
        description="Null fine-tunes along whose mean differences it is pushed, too: the first. With 19 p can be 0.05.",
    )
    samples: int = Field(2, ge=1, le=4, description="Texts for each opening, dose and fine-tune.")

    @model_validator(mode="after")
    def _check_doses(self) -> Self:
        if min(self.doses) <= 0:
            raise ValueError(f"doses: a push is longer than 0, not {min(self.doses):g}")
        all_different("number in doses", self.doses)
        return self


class StudyConfig(StrictModel):
    """A whole study: its YAML file has these keys."""

    name: str = Field(description="Letters, digits, dot, dash, underscore.")
    title: str = Field("", description="Heading of the report; by default the name.")
    seed: int = Field(0, ge=0, description="Everything random follows from it.")
    arms: dict[str, ArmConfig] = Field(
        min_length=2, description="By name: one control, one treatment, and any number of placebos."
    )
    text: TextConfig = Field(description="What activity is measured on; the same for every arm.")
    gate: GateConfig = Field(GateConfig(), description="When an SAE is good enough for its model.")
    features: FeaturesConfig = Field(FeaturesConfig(), description="How features are named and exemplified.")
    coherence: CoherenceConfig = Field(CoherenceConfig(), description="Which word vectors.")
    selection: SelectionConfig = Field(SelectionConfig(), description="What makes a feature one of the domain.")
    nulls: str | None = Field(
        None,
        description="Fine-tunes that teach nothing, to judge changes by: a folder that `saeffect finetune RECIPE --null"
        " 20 --study STUDY` made, or bundled:smollm2-medical.",
    )
    changes: ChangesConfig = Field(ChangesConfig(), description="What both models read to find what changed.")
    put_back: PutBackConfig | None = Field(
        PutBackConfig(), description="What the changed features cause, or `null` for a study without it."
    )
    push: PushConfig | None = Field(
        None, description="What the mean activation difference makes the base model write; none: not tried."
    )
    steering: SteeringConfig | None = Field(
        default_factory=lambda: SteeringConfig.model_validate({}),
        description="What is done to features, and what is measured of it.",
    )
    comparison: ComparisonConfig = Field(ComparisonConfig(), description="Intervals and tests.")
    training: dict[str, Any] | None = Field(
        None, description="How to train the arms' SAEs: a recipe without model and hook, which come from the arm."
    )

    @property
    def has_chats(self) -> bool:
        """Whether conversations are read or steered."""
        return self.text.format == "chat" or (self.steering is not None and self.steering.has_chats)

    @model_validator(mode="after")
    def _check_arms(self) -> Self:
        # Names become folders, so they must not be paths.
        for name in (self.name, *self.arms):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
                raise ValueError(f"{name!r} is no name; use letters, digits, dot, dash, underscore")
        roles = Counter(arm.role for arm in self.arms.values())
        if roles["control"] != 1 or roles["treatment"] != 1:
            raise ValueError("a study has exactly one control and one treatment arm")
        for name in {"direct_effect", "steering"} & set(self.comparison.crossed) if self.steering is None else ():
            raise ValueError(f"comparison.crossed: {name} needs the section steering")
        without_sae = [name for name, arm in self.arms.items() if arm.sae is None]
        if without_sae and (len(without_sae) < len(self.arms) or self.steering is not None or roles["placebo"]):
            raise ValueError(f"arms.{without_sae[0]}.sae is missing; without it, no arm has one, and steering is null")
        for name in self.steering.together if self.steering else ():
            if name not in self.arms:
                raise unknown_name("arm", name, self.arms, at="steering.together")
        return self
