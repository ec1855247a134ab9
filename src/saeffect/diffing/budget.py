"""The keys of a budget file, which says what a fine-tune may change. Frozen, strict, no I/O."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from saeffect.config import StrictModel
from saeffect.config_keys import keys_table

__all__ = ["ALL_TEXT", "Budget", "GroupRule", "TextLimit", "budget_keys"]

ALL_TEXT = "all"
"""The name of the limit on the whole text, whatever its source."""

_HEAD = """# The keys of a budget file

What `saeffect guard` reads from a YAML file, and what `saeffect guard --keys` prints. Keys that are not here are
refused. Paths are relative to the file. How a rule is judged is explained in [guard.md](guard.md).
"""


class GroupRule(StrictModel):
    """What may happen to one group of features."""

    vocabulary: str | None = Field(
        None,
        description="The group is about these words: a bundled list, or a text file with a word a line. Features with"
        " enough top tokens in it, and the words themselves where the model expects them.",
    )
    min_matches: int = Field(2, ge=1, description="Top tokens in the vocabulary that put a feature into the group.")
    features: tuple[int, ...] = Field((), description="Or these features of the SAE, by number.")
    may: Literal["rise", "fall", "either", "neither"] = Field(
        "neither", description="What it may do without breaking the budget; either: it is only reported."
    )
    at_least: float = Field(
        1.0,
        ge=1,
        description="The smallest change that matters, as a factor: 1.5 for half as much again, or two thirds.",
    )
    within_nulls: float | None = Field(
        None,
        gt=0.5,
        lt=1,
        description="Such as 0.99: the rule breaks outside of where this share of the nulls would lie, in place of"
        " alpha.",
    )

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        if (self.vocabulary is None) == (not self.features):
            raise ValueError("give either vocabulary or features")
        if len(set(self.features)) < len(self.features):
            raise ValueError("a feature is there twice")
        if self.may == "either" and self.within_nulls is not None:
            raise ValueError("what may do either cannot have to stay within the nulls; leave one of the two out")
        return self


class TextLimit(StrictModel):
    """How far predictions on one source of the text may move."""

    kl: float | None = Field(
        None, gt=0, description="Largest mean KL of the tuned from the base model's predictions, in nats a token."
    )
    perplexity_ratio: float | None = Field(
        None, gt=0, description="Largest ratio of the tuned model's perplexity to the base model's."
    )

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.kl is None and self.perplexity_ratio is None:
            raise ValueError("give kl, perplexity_ratio, or both")
        return self


class Budget(StrictModel):
    """A whole budget: its YAML file has these keys."""

    groups: dict[str, GroupRule] = Field(default_factory=dict, description="Rules for groups of features, by name.")
    texts: dict[str, TextLimit] = Field(
        default_factory=dict, description="Limits by the name of a source of the text; `all` for the whole text."
    )
    alpha: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="How often a fine-tune that taught nothing may break any rule for a group, all rules together.",
    )

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, as their verdicts have them."""
        limits = [
            f"{kind.replace('_', ' ')} {source}"
            for source, limit in self.texts.items()
            for kind in ("kl", "perplexity_ratio")
            if getattr(limit, kind) is not None
        ]
        return (*(f"group {name}" for name in self.groups), *limits)

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        if not self.groups and not self.texts:
            raise ValueError("the budget is empty, so nothing could break it; give groups, texts, or both")
        return self


def budget_keys() -> str:
    """The keys of a budget file as a Markdown page."""
    tables = (
        keys_table("The file", Budget),
        keys_table("each of `groups`", GroupRule),
        keys_table("each of `texts`", TextLimit),
    )
    return "\n".join([_HEAD, *tables])
