"""The keys of a recipe for fine-tuning. Frozen, strict, no input or output."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from saeffect.config import BosRule, ModelConfig, TextSource
from saeffect.config_chat import ChatKeys
from saeffect.config_keys import keys_table

__all__ = ["FinetuneConfig", "finetune_keys"]

_KEYS_HEAD = """# The keys of a recipe for fine-tuning

What `saeffect finetune` reads from a YAML file. Keys that are not here are refused; paths are relative to the file, as
[in a study](study.md). This page is what `saeffect finetune --keys` prints.
"""
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FinetuneConfig(ChatKeys):
    """Everything that decides the adapter."""

    model: ModelConfig = Field(description="Hub id, folder or .gguf file, or a mapping with path, dtype, ...")
    text: TextSource = Field(
        description="Training text: a path, or a mapping with path, field, split, ... as in a study's text.sources."
    )
    control_text: TextSource | None = Field(
        None, description="Other text of these kinds, on which perplexity should not blow up."
    )
    field: str = Field(
        "text", description="Which field of a row holds the text, where text does not say it; of chats `messages`."
    )
    documents: int | None = Field(
        None, ge=1, description="Train on a random sample of so many documents; by default as many as the steps need."
    )
    bos: BosRule = Field(
        "auto",
        description="Whether every row begins with the tokenizer's BOS token, such as `<bos>`. auto: as the tokenizer"
        " does, or the chat template.",
    )
    loss: Literal["all", "assistant"] = Field(
        "all", description="Of chats: learn every token, or only what the assistant writes, to the end of its turn."
    )
    licence: str = Field("", description="Where the training text comes from and its licence, for the model card.")
    held_out: float = Field(0.03, gt=0, lt=0.5, description="Share of documents kept for measuring.")
    rank: int = Field(16, ge=1, description="Of the LoRA matrices.")
    alpha: float = Field(32.0, gt=0, description="Updates are scaled by alpha / rank.")
    modules: tuple[str, ...] = Field(_MODULES, description="Names of the linear layers to adapt.")
    steps: int = Field(160, ge=1, description="Training steps.")
    batch_size: int = Field(8, ge=1, description="Rows a step.")
    context_size: int = Field(256, ge=8, description="Tokens a row.")
    learning_rate: float = Field(4e-4, gt=0, description="At its highest.")
    warmup_steps: int = Field(10, ge=0, description="Steps in which the learning rate rises.")
    evaluation_rows: int = Field(64, ge=1, description="Held-out rows of each text for the perplexities.")
    checkpoint_every: int = Field(20, ge=1, description="Steps between checkpoints.")
    seed: int = Field(0, description="Everything random follows from it.")

    @model_validator(mode="before")
    @classmethod
    def _copy_field_to_texts(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("format") == "chat":
            value = {"field": "messages"} | value
        if not isinstance(value, dict) or "field" not in value:
            return value
        texts = {key: value[key] for key in ("text", "control_text") if isinstance(value.get(key), str | dict)}
        plain = {key: {"path": text} if isinstance(text, str) else text for key, text in texts.items()}
        return value | {key: {"field": value["field"], **text} for key, text in plain.items()}

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.loss == "assistant" and self.format == "text":
            raise ValueError("loss: assistant goes with format: chat")
        return self


def finetune_keys() -> str:
    """The keys of a recipe as a page of Markdown: a table for the recipe and one for its model."""
    return "\n".join([_KEYS_HEAD, keys_table("Recipe", FinetuneConfig), keys_table("`model`", ModelConfig)])
