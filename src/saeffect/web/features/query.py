"""A query of the feature list, as the address holds it, and the search for its words in short strings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

from saeffect.diffing.standardised import BASES
from saeffect.errors import ConfigError, unknown_name
from saeffect.lm.tokens import printable_token

__all__ = [
    "CHOICES",
    "EXACT",
    "INSIDE",
    "MEASURES",
    "PREFIX",
    "Query",
    "SORTS",
    "StringSearch",
    "TokenSearch",
    "format_value",
    "search_form",
]

MEASURES = {"writes": "decoder cosine", "fires": "activation correlation"}
"""Measures by which features of two SAEs are matched: name in the address, name in the fate tables."""
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
"""Sort orders and their titles; `-` before a name in the address reverses the order."""
_MAX_CHARACTERS, _MAX_PAGE = 200, 100_000


@dataclass(frozen=True)
class Query:
    """A query of the feature list; every field is a parameter of the address, which leaves out defaults.

    Attributes:
        q: Words that must all occur in top tokens, label or number; in quotes: whole tokens only.
        arm: Name of an arm; "" for all.
        by: Measure of the match that decides the fate, see `MEASURES`.
        basis: Of the change between the models; "" for the first that the run has.
        sort: One of `SORTS`, with "-" in front to reverse; "" for best match, without words the largest change.
        coherence_min, ...: Inclusive bounds; None for none. Densities are shares of tokens.
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
        values: dict[str, Any] = {}
        for field in fields(cls):
            text = params.get(field.name, "").strip()
            if not text:
                continue
            if field.name in CHOICES and text not in CHOICES[field.name]:
                raise unknown_name(field.name, text[:60], CHOICES[field.name], at=field.name)
            if field.name == "sort" and text.removeprefix("-") not in SORTS:
                raise unknown_name("order", text[:60], SORTS, at="sort")
            if field.name in {"q", "arm"} and len(text) > _MAX_CHARACTERS:
                raise ConfigError(
                    f"{field.name} has {len(text)} characters; at most {_MAX_CHARACTERS} are read.", at=field.name
                )
            if field.name.endswith(("_min", "_max")):
                values[field.name] = _number(text, field.name)
            elif field.name == "page":
                values["page"] = _page(text)
            else:
                values[field.name] = text
        return cls(**values)

    def address(self, **changes: Any) -> str:
        """This query with `changes`, as the part of an address after "?"; "" if nothing differs from the defaults.

        Any change but that of the page returns to the first page.

        Example:
            >>> Query(q="heart", page=3).address(arm="control")
            'q=heart&arm=control'
        """
        page = changes.pop("page", 1 if changes else self.page)
        values = {name: changes.get(name, getattr(self, name)) for name in _DEFAULTS} | {"page": page}
        return urlencode({name: format_value(value) for name, value in values.items() if value != _DEFAULTS[name]})

    @property
    def filters(self) -> dict[str, Any]:
        """The filters that are set; words, arm, order, page, measure and basis are none."""
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
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _MAX_PAGE):
        raise ConfigError(f"page must be a whole number from 1. Got {text[:60]!r} instead.", at="page")
    return int(text)


def format_value(value: Any) -> str:
    """A value of a filter as in the address."""
    return f"{value:g}" if isinstance(value, float) else str(value)


FloatArray = npt.NDArray[np.float64]

INSIDE, PREFIX, EXACT = 1.0, 2.0, 3.0
"""Grades of a hit; 0 is none."""
_END = 10  # line feed: in no searched string


def search_form(text: str) -> str:
    """The form in which tokens, labels and words are compared: hidden characters visible, trimmed, lower case.

    Example:
        >>> search_form("ĠHeart"), search_form("\\n"), search_form("  ")
        ('heart', '\\\\n', '␣␣')
    """
    visible = printable_token(text)
    return visible.strip().lower() or "␣" * len(visible)


class StringSearch:
    """Finds a word in `strings` (of `search_form`), all at once in one buffer of bytes.

    Example:
        >>> StringSearch(["heart", "hearty", "sweetheart", "liver"]).grades("heart").tolist()
        [3.0, 2.0, 1.0, 0.0]
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode("utf-8", "replace") for string in strings]
        self._n = len(encoded)
        self._bytes = np.frombuffer(b"\n" + b"".join(part + b"\n" for part in encoded), dtype=np.uint8)
        lengths = np.fromiter((len(part) + 1 for part in encoded), dtype=np.int64, count=self._n)
        # The string of each byte; -1 for the first line feed.
        self._owner = np.concatenate([[-1], np.repeat(np.arange(self._n), lengths)]).astype(np.int32)

    def grades(self, word: str) -> FloatArray:
        """Float64 [n]: `EXACT`, `PREFIX`, `INSIDE`, or 0 where a string does not contain the word."""
        grades = np.zeros(self._n)
        pattern = np.frombuffer(word.encode("utf-8", "replace"), dtype=np.uint8)
        if not len(pattern) or _END in pattern or len(pattern) >= len(self._bytes):
            return grades
        hits = np.flatnonzero(self._bytes[: len(self._bytes) - len(pattern)] == pattern[0])
        for offset in range(1, len(pattern)):
            hits = hits[self._bytes[hits + offset] == pattern[offset]]
        starts = self._bytes[hits - 1] == _END
        ends = self._bytes[hits + len(pattern)] == _END
        # The better grade is written last.
        for grade, graded in ((INSIDE, hits), (PREFIX, hits[starts]), (EXACT, hits[starts & ends])):
            grades[self._owner[graded]] = grade
        return grades


class TokenSearch:
    """Finds features by their top tokens; at equal grades the higher rank of the token wins.

    `tokens` are distinct strings, `table` [n_features, k] holds their numbers, best first, and -1 for none.
    """

    def __init__(self, tokens: Sequence[str], table: npt.NDArray[np.int32]) -> None:
        forms = [search_form(token) for token in tokens]
        self._text = StringSearch(forms)
        self._by_rank = np.where(table < 0, len(forms), table).T.copy()

    def scores(self, word: str, *, whole: bool = False) -> FloatArray:
        """Float64 [n_features]: the best grade of a feature's tokens plus at most 0.9 for its rank; 0 for none.

        `whole`: only tokens that are the word.
        """
        grades = np.append(self._text.grades(word), 0.0)  # of "no token"
        hit = grades >= (EXACT if whole else INSIDE)
        # int16 hundredths for speed: a one-letter word hits many features, and each key press searches.
        hundredths, k = (100 * grades * hit).astype(np.int16), len(self._by_rank)
        best = np.zeros(self._by_rank.shape[1], dtype=np.int16)
        for rank, tokens in enumerate(self._by_rank if hit.any() else ()):
            value = hundredths + hit * np.int16(90 * (1 - rank / k))
            np.maximum(best, value.take(tokens), out=best)
        return best / 100.0
