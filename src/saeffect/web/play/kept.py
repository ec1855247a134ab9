"""Results that users keep: a file each in the run directory's folder `play`, so that a link shows the same texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from saeffect.config_keys import StrictModel
from saeffect.errors import BadFile, ConfigError, InUse, NotFound, SaeffectError
from saeffect.io import fingerprint, read_json, write_json
from saeffect.web.play.ask import Ask
from saeffect.web.site import Site

__all__ = ["Result", "Side", "Text", "forget", "keep", "kept_list", "read_kept"]

_FOLDER, _MOST = "play", 500
_NAME = re.compile(r"[0-9a-f]{16}")

Token = tuple[str, tuple[float, ...]]


class Text(StrictModel):
    """One text: its condition, and its tokens with the activation of each feature."""

    condition: str
    label: str
    text: str
    tokens: tuple[Token, ...]


class Side(StrictModel):
    """One model's texts, and the prompt as it read it."""

    name: str
    role: str
    model: str
    notes: tuple[str, ...] = ()
    length: float | None = None
    prompt: tuple[Token, ...] = ()
    rows: tuple[Text, ...]


class Result(StrictModel):
    """A finished answer; `scale` is each feature's largest activation on the study's text."""

    ask: Ask
    sides: tuple[Side, ...]
    scale: tuple[float, ...] = ()
    kept: str = Field("", max_length=40)


def keep(site: Site, result: Mapping[str, Any]) -> str:
    """Write a result of the worker and return its name; equal results have one. BadFile if it cannot be written.

    InUse if there are too many.
    """
    checked = Result.read(result, at="the result")
    name = fingerprint(checked.model_dump(mode="json", exclude={"kept"}))[:16]
    file = site.path(_FOLDER, f"{name}.json")
    if not file.is_file():
        if len(_names(site)) >= _MOST:
            raise InUse(f"{_MOST} results are kept already.", at=str(file.parent), fix="delete some of them.")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(file, checked.model_copy(update={"kept": now}).model_dump(mode="json"))
    return name


def read_kept(site: Site, name: str) -> Result:
    """A kept result; NotFound if there is none of that name, BadFile if its file is damaged."""
    if not _NAME.fullmatch(name) or not site.has(_FOLDER, f"{name}.json"):
        raise NotFound("there is no kept result of that name.", at=name[:40], fix="it may have been deleted.")
    file = site.path(_FOLDER, f"{name}.json")
    try:
        return Result.read(read_json(file), at=str(file))
    except ConfigError as error:
        raise BadFile(f"this is no kept result: {error.message}", at=str(file), fix="delete the file.") from error


def kept_list(site: Site) -> list[tuple[str, Result]]:
    """All kept results that can be read, the latest first."""
    found = []
    for name in _names(site):
        try:
            found.append((name, read_kept(site, name)))
        except SaeffectError:
            continue
    return sorted(found, key=lambda pair: pair[1].kept, reverse=True)


def forget(site: Site, name: str) -> None:
    """Delete a kept result; errors as `read_kept` for a name that is none."""
    read_kept(site, name)
    site.path(_FOLDER, f"{name}.json").unlink(missing_ok=True)


def _names(site: Site) -> list[str]:
    folder = site.path(_FOLDER)
    return [file.stem for file in folder.glob("*.json") if _NAME.fullmatch(file.stem)] if folder.is_dir() else []
