"""The keys of a study's steering section. Frozen, strict, no input or output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from saeffect.config_chat import Prompt, as_chat, prompt_name
from saeffect.config_keys import StrictModel, all_different

__all__ = ["InterventionConfig", "PAPER_PROTOCOL", "Positions", "SamplingConfig", "SteeringConfig"]

PAPER_PROTOCOL: Mapping[str, Any] = {
    "operator": "add",
    "coefficient": 50.0,
    "positions": "prompt",
    "prompts": ("What topic is on your mind?",),
    "placebos": (),
    "baselines": (),
    "samples": 1,
    "max_new_tokens": 50,
    "temperature": 1.0,
    "top_p": 0.3,
    "frequency_penalty": 1.0,
    "outcomes": ("similarity",),
    "outcome_encoder": "bert-base-uncased",
}
"""The keys that `protocol: paper` decides: from the cfg.json of the paper's runs, its code, and its appendix."""


Positions = Literal[
    "all", "generated", "prompt", "system", "user", "assistant", "first_assistant", "template", "special"
]
_CHAT_POSITIONS = ("system", "user", "assistant", "first_assistant", "template", "special")


def _normalised(prompts: Sequence[Prompt]) -> list[str]:
    return [" ".join(prompt_name(prompt).casefold().split()) for prompt in prompts]


def _apply_paper_protocol(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with `PAPER_PROTOCOL` filled in; ValueError if it contradicts it. The encoder may be a local copy."""
    for key in section.keys() & (PAPER_PROTOCOL.keys() | {"doses"}):
        value, fixed = section[key], PAPER_PROTOCOL.get(key, (PAPER_PROTOCOL["coefficient"],))
        is_copy = key == "outcome_encoder" and PurePath(str(value)).name == fixed
        if not is_copy and (tuple(value) if isinstance(value, list) else value) != fixed:
            shown = list(fixed) if isinstance(fixed, tuple) else fixed
            raise ValueError(f"protocol: paper decides {key}, which is {shown} there: leave it out")
    return {**PAPER_PROTOCOL, **section}


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
    positions: Positions = Field(
        "all",
        description="prompt: the prompt's but the last, as in the paper's code. In chats, the tokens of a part; the"
        " assistant's (also of earlier turns) at the positions that predict them.",
    )
    prompts: tuple[Prompt, ...] = Field(
        ("What topic is on your mind?",),
        min_length=1,
        description="Beginnings of texts, or conversations (lists of messages) to continue; each is an independent"
        " trial.",
    )
    placebos: tuple[str, ...] = Field(
        ("random", "matched"), description="The test is against matched if it is there, else against random."
    )
    samples: int = Field(4, ge=1, description="Texts a prompt.")
    batch_size: int = Field(
        64,
        ge=1,
        description="Texts generated at once, each with its own vector; with `positions: all` of as many prompts as"
        " fit. Another batch size rounds differently: numbers agree to about 1e-7 only.",
    )

    @model_validator(mode="after")
    def _check_intervention(self) -> Self:
        if self.operator == "clamp" and min(self.doses) < 0:
            raise ValueError(f"a feature cannot be clamped below 0, so leave {min(self.doses)} out")
        if self.operator == "ablate" and self.doses != (1.0,):
            raise ValueError(f"an ablation has no doses, so leave {list(self.doses)} out")
        if self.positions in _CHAT_POSITIONS and any(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"positions: {self.positions} goes with prompts that are chats: set format: chat")
        all_different("number in doses", self.doses)
        all_different("prompt", _normalised(self.prompts))
        all_different("placebo", self.placebos)
        return self


def _parse_prompt(prompt: Any, section: Mapping[str, Any], at: str) -> Any:
    """A prompt of a steering section; text becomes a conversation if the section has format: chat."""
    if isinstance(prompt, str) and section.get("format") != "chat":
        return prompt
    return as_chat(prompt, section.get("system"), at=at) if isinstance(prompt, str | list | tuple) else prompt


class SamplingConfig(StrictModel):
    """How texts are sampled: keys shared by the steering section and `saeffect.steering.Sampling`."""

    max_new_tokens: int = Field(50, ge=1, description="Length of a text.")
    temperature: float = Field(1.0, ge=0, description="0: the most probable token each time.")
    top_p: float = Field(0.3, gt=0, le=1, description="Sampling keeps the most probable tokens up to this share.")
    frequency_penalty: float = Field(1.0, description="Subtracted from a token's logit for each time it was generated.")
    protocol: Literal["rigorous", "paper"] = Field(
        "rigorous",
        description="paper: steer and score as the code of Gupta & Sica (2024) did, to the letter. It decides most keys"
        " of this section and refuses other values for them.",
    )


class SteeringConfig(SamplingConfig, InterventionConfig):
    """Interventions: operator and doses, features, controls, and outcomes."""

    coefficient: float | None = Field(
        None, gt=0, description="add: the paper's multiple of the decoder row, in place of doses."
    )
    format: Literal["text", "chat"] = Field(
        "text",
        description="chat: each prompt is what a user says, and the assistant answers; written by text.chat_template."
        " Prompts that are lists of messages are chats anyway.",
    )
    system: str | None = Field(None, description="System message of chats that have none.")
    search_prompts: tuple[Prompt, ...] = Field(
        (),
        description="For the dose search; none may be a test prompt. By default the first half of the prompts,"
        " which are then not tested on.",
    )
    search_features: int = Field(8, ge=1, description="Features of each arm that the search steers.")
    max_features: int | None = Field(None, ge=1, description="Test a random sample of this many features an arm.")
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
        description="Declared before the run: the first decides what passes; all others are exploratory.",
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
    def _fill_defaults(cls, value: Any) -> Any:
        """Fill in doses and search prompts that follow from other keys."""
        if not isinstance(value, dict):
            return value
        value = _apply_paper_protocol(value) if value.get("protocol") == "paper" else dict(value)
        default_dose = {"clamp": 5.0, "ablate": 1.0}.get(str(value.get("operator")), 0.4)
        value.setdefault("doses", [value.get("coefficient") or default_dose])
        doses, prompts = value["doses"], value.get("prompts")
        has_several = isinstance(doses, list | tuple) and len(doses) > 1
        if has_several and not value.get("search_prompts") and isinstance(prompts, list | tuple) and len(prompts) > 1:
            half = len(prompts) // 2
            value["search_prompts"], value["prompts"] = prompts[:half], prompts[half:]
        for key in ("prompts", "search_prompts"):
            prompts = value.get(key, cls.model_fields[key].default)
            if isinstance(prompts, list | tuple):
                value[key] = [_parse_prompt(prompt, value, f"{key}.{i}") for i, prompt in enumerate(prompts)]
        return value

    @property
    def has_chats(self) -> bool:
        """Whether a prompt is a conversation."""
        return not all(isinstance(prompt, str) for prompt in (*self.prompts, *self.search_prompts))

    @model_validator(mode="after")
    def _check_doses(self) -> Self:
        if len(self.doses) > 1 and not self.search_prompts:
            raise ValueError("several doses need search_prompts to choose on, or a second prompt")
        if self.positions in _CHAT_POSITIONS and any(isinstance(prompt, str) for prompt in self.search_prompts):
            raise ValueError(f"positions: {self.positions} goes with search_prompts that are chats: set format: chat")
        if min(self.doses) <= 0:
            raise ValueError(f"doses must be above 0, not {list(self.doses)}")
        if self.coefficient is not None and (self.operator != "add" or self.doses != (self.coefficient,)):
            raise ValueError("a coefficient goes with the operator add, in place of doses")
        all_different("prompt", _normalised((*self.prompts, *self.search_prompts)))
        all_different("baseline", self.baselines)
        all_different("outcome", self.outcomes)
        for arm, sets in self.together.items():
            if any(len(members) < 2 or len(set(members)) < len(members) for members in sets):
                raise ValueError(f"together.{arm}: each set needs at least two features, all different")
        return self
