"""Configuration of a study: the fields below are the keys of its YAML file. Frozen, strict, no input or output."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from saeffect.config_keys import config_error
from saeffect.errors import SaeffectError, unknown_name

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


class StrictModel(BaseModel):
    """Base of every configuration object: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls, values: Any, *, at: str) -> Self:
        """Validate plain data; UnknownName for an unknown key (valid ones listed), ConfigError for a wrong value."""
        try:
            return cls.model_validate(values)
        except SaeffectError as error:  # from a validator that knows more than pydantic
            raise error.placed(at) from None
        except ValidationError as error:
            raise config_error(cls, error, at=at) from error


def _all_different(what: str, values: Sequence[object]) -> None:
    doubled = [value for value, n in Counter(values).items() if n > 1]
    if doubled:
        raise ValueError(f"the {what} {doubled[0]!r} is there twice")


def _plain(prompts: Sequence[str]) -> list[str]:
    return [" ".join(prompt.casefold().split()) for prompt in prompts]


class ModelConfig(StrictModel):
    """Which language model."""

    path: str = Field(min_length=1, description="Hub id, folder, .gguf file, or bundled:smollm2-135m-instruct.")
    adapter: str | None = Field(None, description="PEFT adapter: folder, hub id, or bundled:<name>.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the processor has it, else float32."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(False, description="Let the model's repository run its own Python code.")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class TextSource(StrictModel):
    """One kind of text."""

    name: str = Field(min_length=1, description="What to call it: general, domain, ...")
    path: str = Field(
        min_length=1,
        description="A file (.jsonl, .txt, .csv, .tsv, each also .gz or .zst; .parquet), a folder that `save_to_disk`"
        " of datasets wrote, or a dataset id on the hub.",
    )
    field: str = Field("text", description="Which field of a row holds the text.")
    licence: str = Field("", description="For model cards.")


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
        description="Folder in SAELens' layout, or bundled:<name>. In every arm or, unsteered, none.",
    )
    more_saes: tuple[str, ...] = Field(
        (), description="Further SAEs of the same model from other seeds: what they show is the noise of SAE training."
    )
    hook: str | None = Field(None, description="TransformerLens name; by default the one in the SAE's cfg.json.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Changes of training.sae for this arm, such as {seed: 1} for a placebo."
    )

    @model_validator(mode="after")
    def _different_seeds(self) -> Self:
        if self.more_saes and self.sae is None:
            raise ValueError("more_saes are seeds beside sae, which is missing")
        _all_different("SAE", (self.sae, *self.more_saes))
        return self


class TextConfig(StrictModel):
    """Text on which activity is measured and contexts are found; the same for every arm."""

    bundled: str | None = Field(None, description="Bundled token ids, such as smollm2-sampled.")
    sources: tuple[TextSource, ...] = Field((), description="Or files; call their names general and domain.")
    tokens: int = Field(100_000, ge=256, description="At most so many tokens, over all sources.")
    context_size: int = Field(256, ge=8, description="Tokens a row; bundled rows are cut to so many.")
    bos: BosRule = Field(
        "auto",
        description="Whether every row and every prompt begins with the tokenizer's BOS token, such as `<bos>`. auto:"
        " as the SAEs' cfg.json says (prepend_bos); where they say nothing, as the tokenizer does.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.bundled is None) == (not self.sources):
            raise ValueError("give either bundled or sources")
        _all_different("source name", [source.name for source in self.sources])
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


class InterventionConfig(StrictModel):
    """What is done to a model: keys shared by the steering section and `saeffect.steering.SteeringPlan`."""

    operator: Literal["add", "clamp", "ablate"] = Field(
        "add",
        description="Add the decoder row; set the activation to a multiple of its maximum on the text; or to 0.",
    )
    doses: tuple[float, ...] = Field(
        min_length=1,
        description="Candidates; one is used. add: units of the hook's mean residual norm. clamp: multiples of the"
        " feature's maximum. ablate has none.",
        json_schema_extra={"default": "0.4 to add, 5 to clamp"},
    )
    positions: Literal["all", "generated", "prompt"] = Field(
        "all", description="prompt: the prompt's but the last, as the paper's code did."
    )
    prompts: tuple[str, ...] = Field(
        ("What topic is on your mind?",), min_length=1, description="Beginnings of texts; each is an independent trial."
    )
    placebos: tuple[str, ...] = Field(
        ("random", "matched"), description="The test is against matched if it is there, else against random."
    )
    samples: int = Field(4, ge=1, description="Texts a prompt.")
    batch_size: int = Field(
        64,
        ge=1,
        description="Texts generated at once, each with a vector of its own. Products over another number of texts"
        " round differently, so numbers of another batch size agree to about 1e-7 only.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.operator == "clamp" and min(self.doses) < 0:
            raise ValueError(f"a feature cannot be clamped below 0, so leave {min(self.doses)} out")
        if self.operator == "ablate" and self.doses != (1.0,):
            raise ValueError(f"an ablation has no doses, so leave {list(self.doses)} out")
        _all_different("number in doses", self.doses)
        _all_different("prompt", _plain(self.prompts))
        _all_different("placebo", self.placebos)
        return self


class SamplingConfig(StrictModel):
    """How texts are sampled: keys shared by the steering section and `saeffect.steering.Sampling`."""

    max_new_tokens: int = Field(50, ge=1, description="Length of a text.")
    temperature: float = Field(1.0, ge=0, description="0: the most probable token each time.")
    top_p: float = Field(0.3, gt=0, le=1, description="Sampling keeps the most probable tokens up to this share.")
    frequency_penalty: float = Field(1.0, description="Taken off a token's logit for each time it was generated.")


class SteeringConfig(SamplingConfig, InterventionConfig):
    """Interventions: operator and doses, features, controls, and outcomes."""

    coefficient: float | None = Field(
        None, gt=0, description="add: the paper's multiple of the decoder row, in place of doses."
    )
    search_prompts: tuple[str, ...] = Field(
        (),
        description="For the dose search; none of them a test prompt. By default the first half of the prompts,"
        " which are then not tested on.",
    )
    search_features: int = Field(8, ge=1, description="Features of each arm that the search steers.")
    max_features: int | None = Field(None, ge=1, description="Test a random sample of so many domain features an arm.")
    together: dict[str, tuple[tuple[int, ...], ...]] = Field(
        default_factory=dict, description="For an arm, sets of features to steer at once, such as {control: [[3, 17]]}."
    )
    baselines: tuple[str, ...] = Field(
        ("prompt", "mean_difference"), description="What steering with a feature must beat to be worth it."
    )
    baseline_features: int = Field(4, ge=0, description="Tested features of each arm that the baselines are run for.")
    outcomes: tuple[str, ...] = Field(
        ("similarity",),
        min_length=1,
        description="Declared before the run: the first decides what passes; all that are not here are exploratory.",
    )
    outcome_encoder: str | None = Field(
        None,
        description="Vectors for similarity: a bundled name, a vectors file, a folder or hub id of an encoder such as"
        " bert-base-uncased. By default those of coherence.embeddings.",
    )

    @property
    def unit(self) -> Literal["residual_norm", "coefficient"]:
        """Unit of a dose of the operator "add"."""
        return "residual_norm" if self.coefficient is None else "coefficient"

    @property
    def primary_placebo(self) -> str:
        """The placebo that the test compares with."""
        return "matched" if "matched" in self.placebos or not self.placebos else self.placebos[0]

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, value: Any) -> Any:
        """Fill in doses and search prompts that follow from other keys."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        usual = {"clamp": 5.0, "ablate": 1.0}.get(str(value.get("operator")), 0.4)
        value.setdefault("doses", [value.get("coefficient") or usual])
        doses, prompts = value["doses"], value.get("prompts")
        several = isinstance(doses, list | tuple) and len(doses) > 1
        if several and not value.get("search_prompts") and isinstance(prompts, list | tuple) and len(prompts) > 1:
            half = len(prompts) // 2
            value["search_prompts"], value["prompts"] = prompts[:half], prompts[half:]
        return value

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        if len(self.doses) > 1 and not self.search_prompts:
            raise ValueError("several doses need search_prompts to choose on, or a second prompt")
        if min(self.doses) <= 0:
            raise ValueError(f"doses must be above 0, not {list(self.doses)}")
        if self.coefficient is not None and (self.operator != "add" or self.doses != (self.coefficient,)):
            raise ValueError("a coefficient goes with the operator add, in place of doses")
        _all_different("prompt", _plain((*self.prompts, *self.search_prompts)))
        _all_different("baseline", self.baselines)
        _all_different("outcome", self.outcomes)
        for arm, sets in self.together.items():
            if any(len(members) < 2 or len(set(members)) < len(members) for members in sets):
                raise ValueError(f"together.{arm}: each set needs at least two features, all different")
        return self


class ComparisonConfig(StrictModel):
    """Intervals and tests."""

    alpha: float = Field(0.05, gt=0, lt=1, description="Highest q at which a feature passes.")
    n_boot: int = Field(2_000, ge=40, description="Resamples of a bootstrap interval.")
    n_permutations: int = Field(10_000, ge=100, description="Of a permutation test, unless all can be listed.")
    tests: tuple[str, ...] = Field(
        ("domain_share", "pass_rate", "coherence_mean"),
        min_length=1,
        description="Quantities of the contrasts that are tested; fixed before the run, all others are exploratory.",
    )


class ChangesConfig(StrictModel):
    """What both models read to find what fine-tuning changed: the first rows of the text, each cut."""

    rows: int = Field(192, ge=2, description="Rows of the text, from the first on.")
    tokens_per_row: int = Field(64, ge=8, description="Of each row, from its beginning.")


class PutBackConfig(StrictModel):
    """How much of what fine-tuning does is carried by the features that changed most: they are put back."""

    rows: int = Field(24, ge=2, description="Rows of each source of text; an interval's units.")
    tokens_per_row: int = Field(64, ge=8, description="Of each row, from its beginning.")
    sizes: tuple[int, ...] = Field(
        (1, 2, 5, 10, 20, 50, 100, 200),
        min_length=1,
        description="Numbers of features, the most changed first; all of them come last.",
    )
    sizes_reversed: tuple[int, ...] = Field(
        (20, 100), description="The same when the fine-tuned model's values are put into the base model."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("sizes", "sizes_reversed"):
            sizes = getattr(self, name)
            if min(sizes, default=1) < 1:
                raise ValueError(f"{name}: a set has at least one feature, not {min(sizes)}")
            _all_different(f"number in {name}", sizes)
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
    steering: SteeringConfig | None = Field(
        default_factory=lambda: SteeringConfig.model_validate({}),
        description="What is done to features, and what is measured of it.",
    )
    comparison: ComparisonConfig = Field(ComparisonConfig(), description="Intervals and tests.")
    training: dict[str, Any] | None = Field(
        None, description="How to train the arms' SAEs: a recipe without model and hook, which each arm has."
    )

    @model_validator(mode="after")
    def _sound(self) -> Self:
        # Names become folders, so they must not be paths.
        for name in (self.name, *self.arms):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
                raise ValueError(f"{name!r} is no name; use letters, digits, dot, dash, underscore")
        roles = Counter(arm.role for arm in self.arms.values())
        if roles["control"] != 1 or roles["treatment"] != 1:
            raise ValueError("a study has exactly one control and one treatment arm")
        without = [name for name, arm in self.arms.items() if arm.sae is None]
        if without and (len(without) < len(self.arms) or self.steering is not None or roles["placebo"]):
            raise ValueError(f"arms.{without[0]}.sae is missing; without it, no arm has one, and steering is null")
        for name in self.steering.together if self.steering else ():
            if name not in self.arms:
                raise unknown_name("arm", name, self.arms, at="steering.together")
        return self
