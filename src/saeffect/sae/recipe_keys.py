"""The keys of a recipe as a page of Markdown, from the descriptions that stand beside the fields."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from saeffect.config import ModelConfig, TextSource
from saeffect.sae.recipe_config import SaeRecipe
from saeffect.sae.training_config import SaeTrainingConfig, architectures_of

__all__ = ["recipe_keys"]

_HEAD = """# The keys of a recipe

What `saeffect train-sae` and `saeffect harvest` read from a YAML file, and a study from its section `training` (there
without `model` and `hook`, which each arm has). Keys that are not here are refused. This page is what
`saeffect train-sae --keys` prints.
"""

_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Recipe", SaeRecipe),
    ("`sae`, and each of `saes`", SaeTrainingConfig),
    ("`model`", ModelConfig),
    ("each of `text`", TextSource),
)


def recipe_keys() -> str:
    """A table for the recipe and one for each kind of mapping in it."""
    parts = [_HEAD]
    for title, model in _SECTIONS:
        rows = [_row(name, field, model) for name, field in model.model_fields.items()]
        parts.append("\n".join([f"## {title}", "", "| key | default | meaning |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _row(name: str, field: FieldInfo, model: type[BaseModel]) -> str:
    of = architectures_of(name) if model is SaeTrainingConfig else ()
    meaning = (field.description or "") + (f" Only for {', '.join(of)}." if of else "")
    choices = _choices(field.annotation)
    meaning += f" One of {', '.join(map(str, choices))}." if choices else ""
    return f"| `{name}` | {_default(field)} | {meaning.strip()} |"


def _choices(annotation: Any) -> tuple[Any, ...]:
    """What a Literal, or an optional one, may be."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return arguments
    return next((found for found in map(_choices, arguments) if found), ())


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "none"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()
