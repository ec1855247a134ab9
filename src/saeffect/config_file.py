"""Study and recipe files: YAML, read strictly into plain values; all problems raise SaeffectError."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from saeffect.errors import BadFile, ConfigError, NotFound
from saeffect.paths import decode_utf8, read_bytes, resolve_paths, user_path

__all__ = ["read_config_file"]

# Far beyond any study.
_MAX_BYTES = 10_000_000  # bytes
_MAX_VALUES = 100_000
_MAX_DEPTH = 40
_MAX_BRACKETS = 100  # open at once, unclosed ones in prose included
_MAX_INTEGER = 2**63

_MERGE = "tag:yaml.org,2002:merge"
_MAPPING = "tag:yaml.org,2002:map"
_SEQUENCE = "tag:yaml.org,2002:seq"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_config_file(path: Path | str, kind: str, *, relative_to: Path | None = None, fix: str | None = None) -> Any:
    """The values of a YAML file, every path in them made absolute.

    `kind` names the file in messages ("study", "recipe"); `relative_to` replaces the file's folder as base of relative
    paths; `fix` is the remedy if there is no such file.

    NotFound: no such file, or a path in it that exists only relative to the current folder. BadFile, with its line: not
    YAML in UTF-8; nested too deeply or circular; an unknown tag; an invalid date; a number of thousands of digits.
    ConfigError: a repeated key (with both lines), or an impossible path.
    """
    file = user_path(path)
    if not file.exists():
        raise NotFound(f"there is no {kind} file {str(path)!r}.", at=str(path), fix=fix or "check the path.")
    data = read_bytes(file, kind)
    if len(data) > _MAX_BYTES:
        raise BadFile(f"a {kind} file is a few pages of YAML; this one has {len(data):,} bytes.", at=str(path))
    text = decode_utf8(data, at=str(path))
    if _open_brackets(text) > _MAX_BRACKETS:  # PyYAML would take minutes
        raise _too_deep(str(path))
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise _too_deep(str(path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        raise BadFile(f"this is not YAML: {problem}.", at=where, fix="look at this line and the one before.") from error
    except (ValueError, OverflowError) as error:  # an escape that stands for no character
        raise BadFile(f"this is not YAML: {error}.", at=str(path), fix="look for a backslash in it.") from error
    values = None if root is None else _Builder(str(path)).build(root)
    folder = file.absolute().parent if relative_to is None else relative_to
    return resolve_paths(values, folder, at=str(path))


class _Builder:
    """Plain values from YAML nodes. Counts the values behind aliases and merge keys: a few lines can give billions."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._values = 0
        self._ancestors: list[yaml.Node] = []
        self._scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise BadFile(
                f"the aliases of this file stand for more than {_MAX_VALUES:,} values.",
                at=self._at(node),
                fix="write what is meant without them.",
            )
        if node in self._ancestors:
            raise BadFile("this alias stands for something that it is part of.", at=self._at(node), fix="take it out.")
        if len(self._ancestors) == _MAX_DEPTH:
            raise _too_deep(self._at(node))
        self._ancestors.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
                return self._mapping(node)
            if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
                return [self.build(item) for item in node.value]
            return self._scalar(node)
        finally:
            self._ancestors.pop()

    def _mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        values: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for mapping in self._merged(value_node):
                    merged = mapping | merged
                continue
            key = self._scalar(key_node)
            if key in lines:
                raise ConfigError(
                    f"the key {key!r} is there twice, on lines {lines[key]} and {key_node.start_mark.line + 1}.",
                    at=self._at(key_node),
                    fix="keep one of the two.",
                )
            lines[key] = key_node.start_mark.line + 1
            values[key] = self.build(value_node)
        return merged | values

    def _merged(self, node: yaml.Node) -> Iterator[dict[Any, Any]]:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for item in items:
            value = self.build(item)
            if not isinstance(value, dict):
                raise BadFile("only mappings can be merged with <<.", at=self._at(item))
            yield value

    def _scalar(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise BadFile("a plain value was expected.", at=self._at(node), fix="write a word or a number.")
        try:
            value = self._scalars.construct_object(node)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "it has a tag that is not known"
            raise BadFile(f"this is no plain value: {problem}.", at=self._at(node), fix="leave the tag out.") from error
        except (ValueError, OverflowError, KeyError) as error:  # the last for !!bool maybe
            raise self._invalid_scalar(node) from error
        if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
            raise self._invalid_scalar(node)
        if isinstance(value, str) and _LONE_SURROGATE.search(value):
            raise BadFile("this text holds half a character (a lone surrogate).", at=self._at(node), fix="mend it.")
        return value

    def _invalid_scalar(self, node: yaml.Node) -> BadFile:
        text = str(node.value)[:40]
        fix = "mend it, or put it into quotation marks if it is text."
        return BadFile(f"there is no such date or number: {text!r}.", at=self._at(node), fix=fix)

    def _at(self, node: yaml.Node) -> str:
        return f"{self._path}, line {node.start_mark.line + 1}"


def _open_brackets(text: str) -> int:
    """Largest depth of open brackets."""
    return max(
        itertools.accumulate(1 if match[0] in "[{" else -1 for match in re.finditer(r"[\[{\]}]", text)), default=0
    )


def _too_deep(at: str) -> BadFile:
    return BadFile(
        f"mappings and lists stand more than {_MAX_DEPTH} deep in each other.", at=at, fix="check brackets and indents."
    )
