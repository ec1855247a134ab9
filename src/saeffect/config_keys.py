"""Keys of a YAML file: their strict base class, Markdown tables from the descriptions, errors that name a key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from saeffect.errors import ConfigError, SaeffectError, unknown_name

__all__ = ["StrictModel", "all_different", "config_error", "keys_table"]


def config_error(model: type[BaseModel], error: ValidationError, *, at: str = "") -> ConfigError:
    """The first pydantic error, as a SaeffectError that names the key."""
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    location = ", ".join(filter(None, [at, ".".join(keys)]))
    if first["type"] == "extra_forbidden":
        return unknown_name("key", keys[-1], _keys_at(model, keys[:-1]), at=location)
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        kind = next(key for key in reversed(keys) if not key.isdigit()).removesuffix("s")
        valid = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        return unknown_name(kind, first["input"], valid, at=location)
    if first["type"] == "missing":
        return ConfigError(f"the key {keys[-1]!r} is missing.", at=location)
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if isinstance(first["input"], dict | list | BaseModel):
        return ConfigError(f"{message}.", at=location)
    value = repr(first["input"])
    return ConfigError(f"{message}. Got {value if len(value) <= 200 else f'{value[:200]} …'}.", at=location)


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model that a path of keys leads to."""
    for key in path:
        field = model.model_fields.get(key)
        if field is None:  # a key of a mapping, such as an arm's name
            continue
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)


def keys_table(title: str, model: type[BaseModel], *, more: Callable[[str], str] = lambda _: "") -> str:
    """A Markdown section: one table row a key, with its default and meaning, to which `more(key)` adds.

    A field's `json_schema_extra`, {"default": ...}, describes a default that depends on other keys. Keys named in the
    model's `keys_last` come last.

    Example:
        >>> from saeffect.config import CoherenceConfig
        >>> print(keys_table("`coherence`", CoherenceConfig).splitlines()[-1])
        | `embeddings` | `glove-wiki-gigaword-100` | Bundled name or a vectors file. |
    """
    last: tuple[str, ...] = getattr(model, "keys_last", ())
    fields = sorted(model.model_fields.items(), key=lambda item: item[0] in last)
    rows = [_row(name, field, more(name)) for name, field in fields]
    return "\n".join([f"## {title}", "", "| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _row(name: str, field: FieldInfo, more: str) -> str:
    choices, is_list = _choices(field.annotation), get_origin(field.annotation) is tuple
    choices_text = f"{'Any' if is_list else 'One'} of {', '.join(map(str, choices))}." if choices else ""
    meaning = " ".join(part for part in (field.description or "", more, choices_text) if part)
    return f"| `{name}` | {_default(field)} | {meaning} |"


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The choices of a Literal, an optional Literal, or a list of them."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return arguments
    return next((choices for choices in map(_choices, arguments) if choices), ())


def _default(field: FieldInfo) -> str:
    if isinstance(field.json_schema_extra, dict) and "default" in field.json_schema_extra:
        return str(field.json_schema_extra["default"])
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, tuple | list):
        return ", ".join(map(_format_value, value)) or "none"
    return "none" if value is None or value == {} else _format_value(value)


def _format_value(value: Any) -> str:
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()


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


def all_different(what: str, values: Sequence[object]) -> None:
    """ValueError if two values are equal."""
    repeated = [value for value, n in Counter(values).items() if n > 1]
    if repeated:
        raise ValueError(f"the {what} {repeated[0]!r} is there twice")
