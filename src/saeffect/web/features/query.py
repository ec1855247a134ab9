"""What a reader asks of the feature list, as it stands in the address: words, filters, order and page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlencode

from saeffect.diffing.standardised import BASES
from saeffect.errors import ConfigError, unknown_name

__all__ = ["CHOICES", "MEASURES", "SORTS", "Query"]

MEASURES = {"writes": "decoder cosine", "fires": "activation correlation"}
"""By what features of two SAEs are matched: the name in the address, and in the fate tables."""
CHOICES: Mapping[str, tuple[str, ...]] = {
    "domain": ("yes", "no"),
    "fate": ("kept", "moved", "gone", "absorbed", "new", "unclear", "unknown"),
    "by": tuple(MEASURES),
    "verdict": ("yes", "no", "unsure", "disputed", "none"),
    "tested": ("passed", "failed", "untested"),
    "basis": ("combined", *BASES),
    "direction": ("more", "less"),
}
"""The values that each filter can have; "" is no filter."""
SORTS = {
    "relevance": "Best match",
    "change": "Change between the models",
    "p": "p against null fine-tunes",
    "effect": "Effect of steering",
    "coherence": "Coherence",
    "density": "Density",
    "mean_activation": "Mean activation",
    "matches": "Words in the vocabulary",
    "accuracy": "Detection by a model's label",
    "similarity": "Similarity to its match",
    "feature": "Number",
}
"""What the list can be ordered by, and how that is called; `-` before a name in the address turns the order round."""
_LONGEST, _LAST_PAGE = 200, 100_000


@dataclass(frozen=True)
class Query:
    """A question to the feature list; every field is a parameter of the address, defaults are left out of it.

    Attributes:
        q: Words that must all occur in top tokens, label or number; in quotes: whole tokens only.
        arm: Name of an arm; "" for all.
        by: Which match the fate is judged by, see `MEASURES`.
        basis: Of the change between the models; "" for the best there is.
        sort: One of `SORTS`, with "-" in front for the other direction; "" for best match, else the largest change.
        coherence_min: And so on: bounds that are included; None for none. Densities are shares of tokens.
    """

    q: str = ""
    arm: str = ""
    domain: str = ""
    fate: str = ""
    by: str = "writes"
    verdict: str = ""
    tested: str = ""
    basis: str = ""
    direction: str = ""
    sort: str = ""
    coherence_min: float | None = None
    coherence_max: float | None = None
    density_min: float | None = None
    density_max: float | None = None
    effect_min: float | None = None
    p_max: float | None = None
    page: int = 1

    @classmethod
    def read(cls, params: Mapping[str, str]) -> Query:
        """The query of an address; parameters of other names are ignored, empty ones are no filter.

        Raises:
            UnknownName: A filter or order that does not exist; the message lists those that do.
            ConfigError: A bound that is no finite number, a page that is none, words longer than 200 characters.
        """
        found: dict[str, Any] = {}
        for field in fields(cls):
            text = params.get(field.name, "").strip()
            if not text:
                continue
            if field.name in CHOICES and text not in CHOICES[field.name]:
                raise unknown_name(field.name, text[:60], CHOICES[field.name], at=field.name)
            if field.name == "sort" and text.removeprefix("-") not in SORTS:
                raise unknown_name("order", text[:60], SORTS, at="sort")
            if field.name in {"q", "arm"} and len(text) > _LONGEST:
                raise ConfigError(
                    f"{field.name} has {len(text)} characters; at most {_LONGEST} are read.", at=field.name
                )
            if field.name.endswith(("_min", "_max")):
                found[field.name] = _number(text, field.name)
            elif field.name == "page":
                found["page"] = _page(text)
            else:
                found[field.name] = text
        return cls(**found)

    def address(self, **changes: Any) -> str:
        """This query, changed, as the part of an address behind "?"; "" if nothing differs from the defaults.

        A change of anything but the page begins at the first page again.

        Example:
            >>> Query(q="heart", page=3).address(arm="control")
            'q=heart&arm=control'
        """
        page = changes.pop("page", 1 if changes else self.page)
        wanted = {name: changes.get(name, getattr(self, name)) for name in _DEFAULTS} | {"page": page}
        return urlencode({name: _written(value) for name, value in wanted.items() if value != _DEFAULTS[name]})

    @property
    def filters(self) -> dict[str, Any]:
        """The filters that are set, without words, arm, order, page, and how fates and changes are read."""
        unfiltering = {"q", "arm", "by", "basis", "sort", "page"}
        values = {name: getattr(self, name) for name in _DEFAULTS if name not in unfiltering}
        return {name: value for name, value in values.items() if value != _DEFAULTS[name]}


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Query)}


def _number(text: str, name: str) -> float:
    try:
        value = float(text.replace("−", "-").replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be a number. Got {text[:60]!r} instead.", at=name, fix="write it as 0.25.")
    return value


def _page(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _LAST_PAGE):
        raise ConfigError(f"page must be a whole number from 1. Got {text[:60]!r} instead.", at="page")
    return int(text)


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
