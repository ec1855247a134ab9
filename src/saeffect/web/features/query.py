"""What a reader asks of the feature list, as it stands in the address, and how its words are found in short strings."""

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
    "search_form",
    "written",
]

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
        return urlencode({name: written(value) for name, value in wanted.items() if value != _DEFAULTS[name]})

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


def written(value: Any) -> str:
    """A value of a filter as the address has it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


FloatArray = npt.NDArray[np.float64]

INSIDE, PREFIX, EXACT = 1.0, 2.0, 3.0
"""Grades of a hit; 0 is none."""
_END = 10  # the line feed, which no searched string holds


def search_form(text: str) -> str:
    """The form in which tokens, labels and words are compared: hidden characters visible, trimmed, lower case.

    Example:
        >>> search_form("ĠHeart"), search_form("\\n"), search_form("  ")
        ('heart', '\\\\n', '␣␣')
    """
    shown = printable_token(text)
    return shown.strip().lower() or "␣" * len(shown)


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
        # The string to which each byte belongs; the line feed in front to none.
        self._owner = np.concatenate([[-1], np.repeat(np.arange(self._n), lengths)]).astype(np.int32)

    def grades(self, word: str) -> FloatArray:
        """Float64 [n]: `EXACT`, `PREFIX`, `INSIDE`, or 0 where a string does not contain the word."""
        found = np.zeros(self._n)
        wanted = np.frombuffer(word.encode("utf-8", "replace"), dtype=np.uint8)
        if not len(wanted) or _END in wanted or len(wanted) >= len(self._bytes):
            return found
        at = np.flatnonzero(self._bytes[: len(self._bytes) - len(wanted)] == wanted[0])
        for offset in range(1, len(wanted)):
            at = at[self._bytes[at + offset] == wanted[offset]]
        starts = self._bytes[at - 1] == _END
        ends = self._bytes[at + len(wanted)] == _END
        # In this order the better grade is written last.
        for grade, here in ((INSIDE, at), (PREFIX, at[starts]), (EXACT, at[starts & ends])):
            found[self._owner[here]] = grade
        return found


class TokenSearch:
    """Finds features by their top tokens; of equal grades the feature that promotes the token more comes first.

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
        grades = np.append(self._text.grades(word), 0.0)  # the last one is that of no token
        hit = grades >= (EXACT if whole else INSIDE)
        # In hundredths and 16 bits: many features hold a word of one letter, and each key must be answered at once.
        hundredths, k = (100 * grades * hit).astype(np.int16), len(self._by_rank)
        best = np.zeros(self._by_rank.shape[1], dtype=np.int16)
        for rank, tokens in enumerate(self._by_rank if hit.any() else ()):
            value = hundredths + hit * np.int16(90 * (1 - rank / k))
            np.maximum(best, value.take(tokens), out=best)
        return best / 100.0
