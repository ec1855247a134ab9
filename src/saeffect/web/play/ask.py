"""A request to the playground, one object for form, URL and file; and kept results: a file each in the run directory's
folder `play`, so that a link shows the same texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Self
from urllib.parse import urlencode

from pydantic import Field, field_validator, model_validator

from saeffect.config_keys import StrictModel
from saeffect.errors import BadFile, ConfigError, InUse, NotFound, SaeffectError
from saeffect.io import fingerprint, read_json, write_json
from saeffect.steering.plan import SteeringPlan
from saeffect.web.site import Site

__all__ = ["Ask", "MAX_FEATURES", "MAX_TOKENS", "Result", "Side", "Text", "forget", "keep", "kept_list", "read_kept"]

MAX_FEATURES, MAX_TOKENS, _MAX_PROMPT = 12, 200, 8_000


class Ask(StrictModel):
    """A prompt, features of one arm's SAE (none: only unsteered texts), and the settings of steering and sampling.

    Equal asks give equal texts: those of `saeffect.steering.run_trials` with `plan` on a table with these features.
    """

    prompt: str = Field(min_length=1, max_length=_MAX_PROMPT)
    chat: bool = False
    arm: str = ""
    features: tuple[int, ...] = Field((), max_length=MAX_FEATURES)
    operator: Literal["add", "clamp", "ablate"] = "add"
    dose: float = Field(0.4, ge=-100, le=100)
    positions: Literal["all", "generated", "prompt"] = "all"
    placebo: Literal["", "matched", "random"] = ""
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(0.3, gt=0, le=1)
    frequency_penalty: float = Field(1.0, ge=-10, le=10)
    max_new_tokens: int = Field(50, ge=1, le=MAX_TOKENS)
    seed: int = Field(0, ge=0, lt=2**53)
    ends: bool = True

    @field_validator("features", mode="before")
    @classmethod
    def _split_features(cls, value: Any) -> Any:
        """Features of a URL are separated by commas."""
        if isinstance(value, str):
            value = [part for part in value.replace(" ", "").split(",") if part]
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if len(set(self.features)) < len(self.features):
            raise ValueError("a feature is there twice")
        if self.features and not self.arm:
            raise ValueError("features need the arm whose SAE they are of")
        if any(feature < 0 for feature in self.features):
            raise ValueError("features are numbered from 0")
        if self.operator == "clamp" and self.dose < 0:
            raise ValueError("a feature cannot be clamped below 0")
        return self

    @classmethod
    def from_query(cls, query: Mapping[str, str] | Sequence[tuple[str, str]], defaults: Mapping[str, Any]) -> Self:
        """The request of a URL's query, completed by defaults; `feature` is an alias of `features`.

        Errors as `StrictModel.read`; a missing prompt is taken from the defaults.
        """
        pairs = list(query.items()) if isinstance(query, Mapping) else list(query)
        values: dict[str, Any] = {key: value for key, value in pairs if key not in ("feature", "features")}
        features = [value for key, value in pairs if key in ("feature", "features")]
        if features:
            values["features"] = ",".join(features)
        elif "arm" not in values:
            values["features"] = defaults.get("features", ())
        return cls.read({**defaults, **values}, at="the address")

    def query(self) -> str:
        """The URL query of this request."""
        values = self.model_dump()
        values["features"] = ",".join(map(str, self.features))
        values |= {key: int(values[key]) for key in ("chat", "ends")}
        return urlencode({key: value for key, value in values.items() if value != ""})

    def plan(self, text: str) -> SteeringPlan:
        """The steering plan, for the prompt as the model reads it (a chat turn includes its markers)."""
        return SteeringPlan(
            prompts=(text,),
            doses=(1.0 if self.operator == "ablate" else self.dose,),
            operator=self.operator,
            positions=self.positions,
            placebos=(self.placebo,) if self.placebo else (),
            samples=1,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            frequency_penalty=self.frequency_penalty,
            allow_end=self.ends,
            seed=self.seed,
        )


_FOLDER, _MAX_KEPT = "play", 500
_KEPT_NAME = re.compile(r"[0-9a-f]{16}")

Token = tuple[str, tuple[float, ...]]


class Text(StrictModel):
    """One text: its condition, and its tokens with the activation of each feature."""

    condition: str
    label: str
    text: str
    tokens: tuple[Token, ...]


class Side(StrictModel):
    """One model's texts, and its tokens of the prompt."""

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
        if len(_names(site)) >= _MAX_KEPT:
            raise InUse(f"{_MAX_KEPT} results are kept already.", at=str(file.parent), fix="delete some of them.")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(file, checked.model_copy(update={"kept": now}).model_dump(mode="json"))
    return name


def read_kept(site: Site, name: str) -> Result:
    """A kept result; NotFound if there is none of that name, BadFile if its file is damaged."""
    if not _KEPT_NAME.fullmatch(name) or not site.has(_FOLDER, f"{name}.json"):
        raise NotFound("there is no kept result of that name.", at=name[:40], fix="it may have been deleted.")
    file = site.path(_FOLDER, f"{name}.json")
    try:
        return Result.read(read_json(file), at=str(file))
    except ConfigError as error:
        raise BadFile(f"this is no kept result: {error.message}", at=str(file), fix="delete the file.") from error


def kept_list(site: Site) -> list[tuple[str, Result]]:
    """All kept results that can be read, the latest first."""
    results = []
    for name in _names(site):
        try:
            results.append((name, read_kept(site, name)))
        except SaeffectError:
            continue
    return sorted(results, key=lambda pair: pair[1].kept, reverse=True)


def forget(site: Site, name: str) -> None:
    """Delete a kept result; errors as `read_kept` for a name that is none."""
    read_kept(site, name)
    site.path(_FOLDER, f"{name}.json").unlink(missing_ok=True)


def _names(site: Site) -> list[str]:
    folder = site.path(_FOLDER)
    return [file.stem for file in folder.glob("*.json") if _KEPT_NAME.fullmatch(file.stem)] if folder.is_dir() else []
