"""The keys of a recipe as a page of Markdown, from the descriptions that stand beside the fields."""

from __future__ import annotations

from saeffect.config import ModelConfig, TextSource
from saeffect.config_keys import keys_table
from saeffect.sae.training.config import SaeTrainingConfig, architectures_of
from saeffect.sae.training.recipe_config import SaeRecipe

__all__ = ["recipe_keys"]

_HEAD = """# The keys of a recipe

What `saeffect train-sae` and `saeffect harvest` read from a YAML file, and a [study](study.md) from its section
`training` (there without `model` and `hook`, which each arm has). Keys that are not here are refused; paths are
relative to the file, as [in a study](study.md). This page is what `saeffect train-sae --keys` prints.
"""


def recipe_keys() -> str:
    """A table for the recipe and one for each kind of mapping in it."""
    return "\n".join(
        [
            _HEAD,
            keys_table("Recipe", SaeRecipe),
            keys_table("`sae`, and each of `saes`", SaeTrainingConfig, more=_only_for),
            keys_table("`model`", ModelConfig),
            keys_table("each of `text`", TextSource),
        ]
    )


def _only_for(name: str) -> str:
    of = architectures_of(name)
    return f"Only for {', '.join(of)}." if of else ""
