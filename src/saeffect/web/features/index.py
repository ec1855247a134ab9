"""All features of all arms in memory, as columns: searched, filtered, counted and ordered within milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from saeffect.errors import NotFound, unknown_name
from saeffect.web.features.query import CHOICES, EXACT, INSIDE, PREFIX, Query, StringSearch, TokenSearch, search_form

__all__ = ["PAGE", "FeatureIndex", "Found", "Verdicts"]

PAGE = 50
"""Features on a page of the list."""
_KEPT = 128  # answers to recent questions
_PIECES = 10_000
_WORDS = 12  # of a search that are looked for
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Verdicts:
    """People's answers, one a feature of the index: how many said yes, no and unsure [n], and the label most gave."""

    n_yes: IntArray
    n_no: IntArray
    n_unsure: IntArray
    labels: Sequence[str]


@dataclass(frozen=True, eq=False)
class Found:
    """The answer to a query: places of features in the index in order, of which `places` is one page.

    `counts` says for each filter how many features each of its values would leave, the other filters as they are.
    """

    places: IntArray
    total: int
    page: int
    pages: int
    counts: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """The features of the arms that are there, arm after arm, each by number.

    Attributes:
        arms: Names of arms, in the order of the study; `roles` are their roles.
        start: First place of each arm, and behind the last: [n_arms + 1].
        numbers: int64 [n], the feature's number in its SAE.
        columns: float64 [n] each; NaN is undefined. Changes are `change_<basis>`, `z_<basis>`, `p_<basis>`; matches
            `similarity_<by>` and `match_<by>`.
        codes: int8 [n], the place of a filter's value in `CHOICES`: domain, tested, `fate_writes`, `fate_fires`.
        tokens, token_table: Distinct top tokens, and their numbers [n, k], -1 for none.
        verdicts: People's answers.
        model_labels: By place, rows of a language model's labels.
        missing: By arm, why its features are not here.
    """

    arms: tuple[str, ...]
    roles: Mapping[str, str]
    start: IntArray
    numbers: IntArray
    columns: Mapping[str, FloatArray]
    codes: Mapping[str, npt.NDArray[np.int8]]
    tokens: Sequence[str]
    token_table: npt.NDArray[np.int32]
    verdicts: Verdicts
    missing: Mapping[str, str] = field(default_factory=dict)
    model_labels: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def with_verdicts(self, verdicts: Verdicts) -> FeatureIndex:
        """The same features with other people's answers."""
        return self._changed("_orders", verdicts=verdicts)

    def with_model_labels(self, rows: Mapping[int, Mapping[str, Any]]) -> FeatureIndex:
        """The same features with a language model's labels, which are searched and ordered by `accuracy`."""
        if not rows:
            return self
        accuracy = np.full(len(self), np.nan)
        accuracy[list(rows)] = [row["accuracy"] for row in rows.values()]
        return self._changed("_label_search", columns={**self.columns, "accuracy": accuracy}, model_labels=rows)

    def _changed(self, *shared: str, **values: Any) -> FeatureIndex:
        """A copy with other values, which shares what takes long and does not depend on them."""
        new = dataclasses.replace(self, **values)
        new.__dict__.update({name: getattr(self, name) for name in ("_token_search", "_digits", *shared)})
        return new

    @cached_property
    def _token_search(self) -> TokenSearch:
        return TokenSearch(self.tokens, self.token_table)

    @cached_property
    def _digits(self) -> StringSearch:
        return StringSearch([str(number) for number in self.numbers.tolist()])

    @cached_property
    def _label_search(self) -> StringSearch:
        return StringSearch([search_form(label) for label in self.verdicts.labels])

    @cached_property
    def _model_label_search(self) -> StringSearch:
        return StringSearch([search_form(row["label"]) for row in self.model_labels.values()])

    @cached_property
    def _verdict_codes(self) -> npt.NDArray[np.int8]:
        yes, no, unsure = self.verdicts.n_yes, self.verdicts.n_no, self.verdicts.n_unsure
        names = CHOICES["verdict"]
        codes = np.full(len(self), names.index("none"), dtype=np.int8)
        codes[unsure > 0] = names.index("unsure")
        codes[(yes > 0) & (yes == no)] = names.index("disputed")
        codes[yes > no], codes[no > yes] = names.index("yes"), names.index("no")
        return codes

    @cached_property
    def _known(self) -> frozenset[str]:
        """Columns in which any feature has a number."""
        return frozenset(name for name, values in self.columns.items() if np.isfinite(values).any())

    @cached_property
    def _answers(self) -> Callable[[Query], Found]:
        """`_ordered`, with the last few answers kept."""
        return lru_cache(_KEPT)(self._ordered)

    @cached_property
    def _orders(self) -> dict[tuple[str, bool], IntArray]:
        return {}

    @cached_property
    def _pieces(self) -> dict[Hashable, Any]:
        return {}

    def kept(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """What `make` returns, kept with the index: for pieces of pages that many readers ask for."""
        found: _Value | None = self._pieces.get(key)
        if found is None:
            if len(self._pieces) >= _PIECES:
                self._pieces.clear()
            found = self._pieces[key] = make()
        return found

    def arm_of(self, place: int) -> str:
        """Name of the arm of the feature at a place."""
        return self.arms[int(np.searchsorted(self.start, place, side="right")) - 1]

    def slice(self, arm: str) -> slice:
        """The places of an arm; UnknownName for none of the study, NotFound where its features are not there yet."""
        if arm in self.missing:
            raise NotFound(f"there are no features of {arm}: {self.missing[arm]}.", at=arm)
        if arm not in self.arms:
            raise unknown_name("arm", arm, self.arms, at="arm")
        at = self.arms.index(arm)
        return slice(int(self.start[at]), int(self.start[at + 1]))

    def place(self, arm: str, number: int) -> int:
        """Where a feature stands; NotFound if the arm has no feature of this number."""
        part = self.slice(arm)
        numbers = self.numbers[part]
        at = int(np.searchsorted(numbers, number))
        if at == len(numbers) or numbers[at] != number:
            last = f"they go up to {numbers[-1]:,}" if len(numbers) else "it has none"
            raise NotFound(f"{arm} has no feature {number}; {last}.", at=arm, fix="look for it in the list.")
        return part.start + at

    def top_tokens(self, place: int) -> list[str]:
        """The top tokens of a feature, best first."""
        return [self.tokens[token] for token in self.token_table[place].tolist() if token >= 0]

    def value(self, name: str, place: int) -> float:
        """A number of a feature, NaN where the run has none."""
        column = self.columns.get(name)
        return float(column[place]) if column is not None else float("nan")

    def code(self, name: str, place: int) -> str:
        """The value that a feature has for a filter: verdict, domain, tested, `fate_writes` or `fate_fires`."""
        codes = self._verdict_codes if name == "verdict" else self.codes[name]
        return CHOICES[name.partition("_")[0]][codes[place]]

    def basis(self, query: Query) -> str:
        """The basis of changes that a query means: its own, else the first that this run judged or measured."""
        if query.basis:
            return query.basis
        known = [name for name in CHOICES["basis"] if f"z_{name}" in self._known]
        return known[0] if known else "read"

    def find(self, query: Query) -> Found:
        """The features that fit a query, one page of them; UnknownName for an arm that does not exist."""
        whole = self._answers(dataclasses.replace(query, page=1))
        pages = max(1, -(-whole.total // PAGE))
        page = min(query.page, pages)
        return dataclasses.replace(whole, places=whole.places[(page - 1) * PAGE : page * PAGE], page=page, pages=pages)

    def around(self, query: Query, place: int) -> tuple[int | None, int | None, int]:
        """The features before and after one in the order of a query, and its rank from 1, 0 if it is not in it."""
        places = self._answers(dataclasses.replace(query, page=1)).places
        at = np.flatnonzero(places == place)
        if not len(at):
            return None, None, 0
        i = int(at[0])
        before = int(places[i - 1]) if i else None
        after = int(places[i + 1]) if i + 1 < len(places) else None
        return before, after, i + 1

    def _ordered(self, query: Query) -> Found:
        """All features that fit, in order."""
        scores = self._scores(query.q)
        masks = self._masks(query)
        base = scores > 0 if scores is not None else np.ones(len(self), dtype=bool)
        for name, mask in masks.items():
            if name not in _COUNTED:
                base &= mask
        counts, fits = self._counts(query, base, {name: mask for name, mask in masks.items() if name in _COUNTED})
        places = self._order(query, fits, scores)
        return Found(places, len(places), 1, 1, counts)

    def _scores(self, words: str) -> FloatArray | None:
        """How well each feature fits all words, 0 where one is missing; None without words."""
        asked = [word for word in _split(words) if word[0]][:_WORDS]
        if not asked:
            return None
        total = np.zeros(len(self))
        fits = np.ones(len(self), dtype=bool)
        for word, whole in asked:
            score = self._token_search.scores(word, whole=whole)
            labels = self._label_search.grades(word)
            by_model = list(self.model_labels)
            labels[by_model] = np.maximum(labels[by_model], self._model_label_search.grades(word))
            np.maximum(score, np.where(labels >= (EXACT if whole else INSIDE), labels + 1, 0), out=score)
            if word.isascii() and word.lstrip("#").isdigit():
                numbers = self._digits.grades(word.lstrip("#"))
                # A number is looked for from its first digit.
                np.maximum(score, np.where(numbers >= PREFIX, numbers + (3 if word[0] == "#" else 1), 0), out=score)
            fits &= score > 0
            total += score
        return np.where(fits, total, 0)

    def _masks(self, query: Query) -> dict[str, BoolArray]:
        """The features that each filter of the query leaves."""
        masks: dict[str, BoolArray] = {}
        if query.arm:
            part = self.slice(query.arm)
            masks["arm"] = np.zeros(len(self), dtype=bool)
            masks["arm"][part] = True
        for name in ("domain", "tested", "fate", "verdict"):
            wanted = getattr(query, name)
            if wanted:
                masks[name] = self._codes(name, query) == CHOICES[name].index(wanted)
        basis = self.basis(query)
        for name in ("coherence", "density", "effect"):
            low, high = getattr(query, f"{name}_min"), getattr(query, f"{name}_max", None)
            if low is not None or high is not None:
                values = self._column(name)
                fits = np.isfinite(values)
                fits &= values >= low if low is not None else True
                masks[name] = fits & (values <= high if high is not None else True)
        if query.p_max is not None:
            masks["p"] = self._column(f"p_{basis}") <= query.p_max
        if query.direction:
            change = self._change(basis)
            masks["direction"] = change > 0 if query.direction == "more" else change < 0
        return masks

    def _counts(
        self, query: Query, base: BoolArray, masks: Mapping[str, BoolArray]
    ) -> tuple[dict[str, dict[str, int]], BoolArray]:
        """For each counted filter the features of each value, and which fit all filters."""
        counts = {}
        fits = base.copy()
        for mask in masks.values():
            fits &= mask
        for name in _COUNTED:
            left = fits
            if name in masks:
                left = base.copy()
                for other, mask in masks.items():
                    left &= mask if other != name else True
            if name == "arm":
                ends = np.concatenate([[0], np.cumsum(left)])[self.start]
                counts[name] = dict(zip(self.arms, np.diff(ends).tolist(), strict=True))
            else:
                found = np.bincount(self._codes(name, query)[left], minlength=len(CHOICES[name])).tolist()
                counts[name] = {value: n for value, n in zip(CHOICES[name], found, strict=True) if n}
        return counts, fits

    def _codes(self, name: str, query: Query) -> npt.NDArray[np.int8]:
        if name == "verdict":
            return self._verdict_codes
        return self.codes[f"fate_{query.by}" if name == "fate" else name]

    def _column(self, name: str) -> FloatArray:
        column = self.columns.get(name)
        return column if column is not None else np.full(len(self), np.nan)

    def _change(self, basis: str) -> FloatArray:
        """The change in units of what nulls show; where there are no nulls, as it is."""
        return self._column(f"z_{basis}" if f"z_{basis}" in self._known else f"change_{basis}")

    def lacking(self, query: Query, place: int) -> tuple[str, ...] | None:
        """None if a feature has a value of what the query sorts by; else the arms that have some."""
        if query.sort in {"", "relevance", "-relevance"} and query.q:
            return None
        values = self._sort_values(self._sort_key(query))
        if np.isfinite(values[place]):
            return None
        return tuple(arm for arm in self.arms if np.isfinite(values[self.slice(arm)]).any())

    def _sort_key(self, query: Query) -> str:
        name = query.sort.removeprefix("-")
        if name in {"", "relevance", "change"}:
            return f"change {self.basis(query)}"
        return {"p": f"p_{self.basis(query)}", "similarity": f"similarity_{query.by}"}.get(name, name)

    def _sort_values(self, key: str) -> FloatArray:
        """What a list is sorted by, the largest first; NaN if undefined."""
        if key == "feature":
            return -self.numbers.astype(np.float64)
        if key.startswith("change "):
            return np.abs(self._change(key.removeprefix("change ")))
        return -self._column(key) if key.startswith("p_") else self._column(key)

    def _order(self, query: Query, fits: BoolArray, scores: FloatArray | None) -> IntArray:
        turned = query.sort.startswith("-")
        if scores is not None and query.sort in {"", "relevance", "-relevance"}:
            places = np.flatnonzero(fits)
            hundredths = np.rint(-100 * scores[places]).astype(np.int16)  # which numpy sorts ten times as fast
            order = places[np.argsort(hundredths, kind="stable")]
            return order[::-1] if turned else order
        order = self._whole_order(self._sort_key(query), turned)
        return order[fits[order]]

    def _whole_order(self, key: str, turned: bool) -> IntArray:
        """All places ordered by a column, the largest first (numbers and p: the smallest), undefined ones last."""
        if (key, turned) not in self._orders:
            values = self._sort_values(key) if turned else -self._sort_values(key)
            self._orders[key, turned] = np.argsort(values, kind="stable")  # NaN last
        return self._orders[key, turned]


_COUNTED = ("arm", "domain", "fate", "verdict", "tested")


def _split(words: str) -> list[tuple[str, bool]]:
    """Words of a search in search form, and whether each stood in quotes; an open quote closes at the end.

    Example:
        >>> _split('Heart "blood cell" #12')
        [('heart', False), ('blood cell', True), ('#12', False)]
    """
    found: list[tuple[str, bool]] = []
    for i, part in enumerate(words.split('"')):
        pieces = [part] if i % 2 else part.split()
        found += [(search_form(piece), bool(i % 2)) for piece in pieces if piece.strip()]
    return found
