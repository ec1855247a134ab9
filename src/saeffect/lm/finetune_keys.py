"""The keys of a recipe for fine-tuning as a page of Markdown, from the descriptions that stand beside the fields."""

from __future__ import annotations

from saeffect.config import ModelConfig
from saeffect.config_keys import keys_table
from saeffect.lm.finetune import FinetuneConfig

__all__ = ["finetune_keys"]

_HEAD = """# The keys of a recipe for fine-tuning

What `saeffect finetune` reads from a YAML file. Keys that are not here are refused; paths are relative to the file, as
[in a study](study.md). This page is what `saeffect finetune --keys` prints.
"""


def finetune_keys() -> str:
    """A table for the recipe and one for its model."""
    return "\n".join([_HEAD, keys_table("Recipe", FinetuneConfig), keys_table("`model`", ModelConfig)])
