"""The text of a row of data: a field, a nested field, or a template over several fields."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saeffect.errors import BadFile, ConfigError

__all__ = ["TextField", "kind_of"]


@dataclass(frozen=True)
class TextField:
    """How the text of a row is made: `wanted` as the user wrote it; `parts`, pairs of literal text and the field name
    that follows it (None at the end).

    Example:
        >>> TextField.parse("Q: {question}\\nA: {answers.text.0}").names
        ('question', 'answers.text.0')
    """

    wanted: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, wanted: str) -> TextField:
        """Parse `text`, `meta.text` or `"{question}\\n{answer}"` (literal braces are doubled); ConfigError if
        it is invalid. A backslash and n, as a shell or single quotes in YAML leave them, are a line feed too.
        """
        if "{" not in wanted:
            return cls(wanted, (("", wanted),))
        parts: list[tuple[str, str | None]] = []
        try:
            for before, name, how, conversion in string.Formatter().parse(wanted):
                if how or conversion or (name is not None and (not name or "{" in name)):
                    raise ValueError("a field is a name in braces, such as {question}")
                parts.append((before.replace("\\n", "\n").replace("\\t", "\t"), name))
        except ValueError as error:
            raise ConfigError(
                f"{wanted!r} is no template: {error}.", at="field", fix='write field: "{question}\\n{answer}".'
            ) from error
        if not any(name for _, name in parts):
            raise ConfigError(
                f"{wanted!r} names no field.", at="field", fix='write field: "{question}\\n{answer}", or a name.'
            )
        return cls(wanted, tuple(parts))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.parts if name is not None)

    def columns(self, columns: list[str]) -> list[str]:
        """The columns of a table that the fields are in."""
        return [name for name in columns if any(name == n or n.startswith(f"{name}.") for n in self.names)]

    def text(self, row: Mapping[str, Any], at: str) -> str:
        """The text of a row read at position `at`; BadFile if a field is missing there or holds no text."""
        if len(self.parts) == 1 and not self.parts[0][0]:
            return _string(self.names[0], _value(row, self.names[0], at), at)
        return "".join(
            before + ("" if name is None else _string(name, _value(row, name, at), at, numbers=True))
            for before, name in self.parts
        )

    def messages(self, row: Mapping[str, Any] | str, at: str) -> str:
        """The list of messages in a row read at position `at`, as JSON; BadFile if there is none. A string is taken as
        JSON already, as in cells of CSV.
        """
        if isinstance(row, str):
            raise BadFile("this is plain text, and no messages.", at=at, fix=_CHAT_EXAMPLE)
        if len(self.names) > 1 or self.parts[0][0]:
            raise ConfigError(
                f"{self.wanted!r} is a template, and a conversation is one field.", at="field", fix=_CHAT_EXAMPLE
            )
        value = _value(row, self.names[0], at)
        if isinstance(value, str) and value.lstrip().startswith("["):
            return value
        if not isinstance(value, list | tuple):
            raise BadFile(
                f"the field {self.wanted!r} holds {kind_of(value)}, not a list of messages.", at=at, fix=_CHAT_EXAMPLE
            )
        return json.dumps(value, ensure_ascii=False)


_CHAT_EXAMPLE = 'a conversation is a list such as [{"role": "user", "content": "..."}], one a line of a .jsonl file.'


def _value(row: Mapping[str, Any], name: str, at: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _missing_field(row, name, at)
    return value


def _missing_field(row: Mapping[str, Any], name: str, at: str) -> BadFile:
    names = [str(key)[:40] for key in sorted(map(str, row))]
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "nothing"
    fix = "name the one that holds text"
    chat = next((str(key) for key, value in row.items() if _is_chat(value)), None)
    if chat is not None:
        fix = f"{chat!r} looks like messages: set format: chat and field: {chat} (--chat --field {chat})"
    elif len(names) > 1:
        fix += ', or several: field: "' + "\\n".join(f"{{{key}}}" for key in names[:2]) + '"'
    return BadFile(f"there is no field {name!r} here; it has: {listed}.", at=at, fix=f"{fix}.")


def _string(name: str, value: Any, at: str, *, numbers: bool = False) -> str:
    if isinstance(value, str):
        return value
    if numbers and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise BadFile(
        f"the field {name!r} holds {kind_of(value)}, not text.",
        at=at,
        fix="these look like messages: set format: chat (--chat)."
        if _is_chat(value)
        else "leave out such rows, or name the field that holds text.",
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return json.dumps(value)
    kinds = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)
