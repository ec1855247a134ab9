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

__all__ = ["PAGE", "FeatureIndex", "SearchResult", "Verdicts"]

PAGE = 50
"""Features on a page of the list."""
_CACHED_RESULTS = 128  # results of recent queries
_MAX_CACHED_PARTS = 10_000
_MAX_WORDS = 12  # words of a search; further ones are ignored
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Verdicts per feature of the index: counts of yes, no and unsure [n], and the most common label."""

    n_yes: IntArray
    n_no: IntArray
    n_unsure: IntArray
    labels: Sequence[str]


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The result of a query: one page of `positions` of features in the index, in order.

    `counts`: by filter, the number of features for each of its values, all other filters applied.
    """

    positions: IntArray
    total: int
    page: int
    pages: int
    counts: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """The features of all available arms, arm after arm, each by number.

    Attributes:
        arms: Names of arms, in the order of the study; `roles` are their roles.
        start: First position of each arm, and the end of the last: [n_arms + 1].
        numbers: int64 [n], the feature's number in its SAE.
        columns: float64 [n] each; NaN is undefined. Changes are `change_<basis>`, `z_<basis>`, `p_<basis>`; matches
            `similarity_<by>` and `match_<by>`.
        codes: int8 [n], index of a filter's value in `CHOICES`: domain, tested, `fate_writes`, `fate_fires`.
        tokens, token_table: Distinct top tokens, and their numbers [n, k], -1 for none.
        verdicts: People's answers.
        model_labels: By position, rows of a language model's labels.
        missing: By arm without features, the reason.
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
        """The same features with other verdicts."""
        return self._copy("_cached_orders", verdicts=verdicts)

    def with_model_labels(self, rows: Mapping[int, Mapping[str, Any]]) -> FeatureIndex:
        """The same features with a language model's labels, which are searched and ordered by `accuracy`."""
        if not rows:
            return self
        accuracy = np.full(len(self), np.nan)
        accuracy[list(rows)] = [row["accuracy"] for row in rows.values()]
        return self._copy("_label_search", columns={**self.columns, "accuracy": accuracy}, model_labels=rows)

    def _copy(self, *shared: str, **values: Any) -> FeatureIndex:
        """A copy with other values that shares the cached properties named, and those that no value changes."""
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
    def _measured_columns(self) -> frozenset[str]:
        """Columns with a finite number."""
        return frozenset(name for name, values in self.columns.items() if np.isfinite(values).any())

    @cached_property
    def _cached_search(self) -> Callable[[Query], SearchResult]:
        """`_search`, with a cache."""
        return lru_cache(_CACHED_RESULTS)(self._search)

    @cached_property
    def _cached_orders(self) -> dict[tuple[str, bool], IntArray]:
        return {}

    @cached_property
    def _cached_parts(self) -> dict[Hashable, Any]:
        return {}

    def cached(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The result of `make`, cached with the index: for parts of pages."""
        value: _Value | None = self._cached_parts.get(key)
        if value is None:
            if len(self._cached_parts) >= _MAX_CACHED_PARTS:
                self._cached_parts.clear()
            value = self._cached_parts[key] = make()
        return value

    def arm_of(self, position: int) -> str:
        """Name of the arm of the feature at a position."""
        return self.arms[int(np.searchsorted(self.start, position, side="right")) - 1]

    def slice(self, arm: str) -> slice:
        """The positions of an arm; UnknownName for an unknown arm, NotFound for one without features yet."""
        if arm in self.missing:
            raise NotFound(f"there are no features of {arm}: {self.missing[arm]}.", at=arm)
        if arm not in self.arms:
            raise unknown_name("arm", arm, self.arms, at="arm")
        i = self.arms.index(arm)
        return slice(int(self.start[i]), int(self.start[i + 1]))

    def position(self, arm: str, number: int) -> int:
        """The position of a feature; NotFound if the arm has no feature of this number."""
        arm_slice = self.slice(arm)
        numbers = self.numbers[arm_slice]
        i = int(np.searchsorted(numbers, number))
        if i == len(numbers) or numbers[i] != number:
            last = f"they go up to {numbers[-1]:,}" if len(numbers) else "it has none"
            raise NotFound(f"{arm} has no feature {number}; {last}.", at=arm, fix="look for it in the list.")
        return arm_slice.start + i

    def top_tokens(self, position: int) -> list[str]:
        """The top tokens of a feature, best first."""
        return [self.tokens[token] for token in self.token_table[position].tolist() if token >= 0]

    def value(self, name: str, position: int) -> float:
        """A number of a feature, NaN where the run has none."""
        column = self.columns.get(name)
        return float(column[position]) if column is not None else float("nan")

    def code(self, name: str, position: int) -> str:
        """The value that a feature has for a filter: verdict, domain, tested, `fate_writes` or `fate_fires`."""
        codes = self._verdict_codes if name == "verdict" else self.codes[name]
        return CHOICES[name.partition("_")[0]][codes[position]]

    def basis(self, query: Query) -> str:
        """The basis of changes of a query: its own, else the first that this run has."""
        if query.basis:
            return query.basis
        available = [name for name in CHOICES["basis"] if f"z_{name}" in self._measured_columns]
        return available[0] if available else "read"

    def find(self, query: Query) -> SearchResult:
        """The features that fit a query, one page of them; UnknownName for an arm that does not exist."""
        result = self._cached_search(dataclasses.replace(query, page=1))
        pages = max(1, -(-result.total // PAGE))
        page = min(query.page, pages)
        shown = result.positions[(page - 1) * PAGE : page * PAGE]
        return dataclasses.replace(result, positions=shown, page=page, pages=pages)

    def neighbours(self, query: Query, position: int) -> tuple[int | None, int | None, int]:
        """The positions before and after one in the order of a query, and its rank from 1; 0 if it is not included."""
        positions = self._cached_search(dataclasses.replace(query, page=1)).positions
        matches = np.flatnonzero(positions == position)
        if not len(matches):
            return None, None, 0
        i = int(matches[0])
        before = int(positions[i - 1]) if i else None
        after = int(positions[i + 1]) if i + 1 < len(positions) else None
        return before, after, i + 1

    def _search(self, query: Query) -> SearchResult:
        """All matching features, in order."""
        scores = self._scores(query.q)
        masks = self._masks(query)
        base = scores > 0 if scores is not None else np.ones(len(self), dtype=bool)
        for name, mask in masks.items():
            if name not in _COUNTED:
                base &= mask
        counts, fits = self._counts(query, base, {name: mask for name, mask in masks.items() if name in _COUNTED})
        positions = self._order(query, fits, scores)
        return SearchResult(positions, len(positions), 1, 1, counts)

    def _scores(self, words: str) -> FloatArray | None:
        """Score of each feature for all words, 0 where one is missing; None without words."""
        searched = [word for word in _split(words) if word[0]][:_MAX_WORDS]
        if not searched:
            return None
        total = np.zeros(len(self))
        fits = np.ones(len(self), dtype=bool)
        for word, whole in searched:
            score = self._token_search.scores(word, whole=whole)
            labels = self._label_search.grades(word)
            labelled = list(self.model_labels)
            labels[labelled] = np.maximum(labels[labelled], self._model_label_search.grades(word))
            np.maximum(score, np.where(labels >= (EXACT if whole else INSIDE), labels + 1, 0), out=score)
            if word.isascii() and word.lstrip("#").isdigit():
                numbers = self._digits.grades(word.lstrip("#"))
                # Numbers match from the first digit.
                np.maximum(score, np.where(numbers >= PREFIX, numbers + (3 if word[0] == "#" else 1), 0), out=score)
            fits &= score > 0
            total += score
        return np.where(fits, total, 0)

    def _masks(self, query: Query) -> dict[str, BoolArray]:
        """By filter of the query, the features that pass it."""
        masks: dict[str, BoolArray] = {}
        if query.arm:
            part = self.slice(query.arm)
            masks["arm"] = np.zeros(len(self), dtype=bool)
            masks["arm"][part] = True
        for name in ("domain", "tested", "fate", "verdict"):
            value = getattr(query, name)
            if value:
                masks[name] = self._codes(name, query) == CHOICES[name].index(value)
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
        """By counted filter the number of features per value; and the features that pass all filters."""
        counts = {}
        fits = base.copy()
        for mask in masks.values():
            fits &= mask
        for name in _COUNTED:
            remaining = fits
            if name in masks:
                remaining = base.copy()
                for filter_name, mask in masks.items():
                    remaining &= mask if filter_name != name else True
            if name == "arm":
                ends = np.concatenate([[0], np.cumsum(remaining)])[self.start]
                counts[name] = dict(zip(self.arms, np.diff(ends).tolist(), strict=True))
            else:
                numbers = np.bincount(self._codes(name, query)[remaining], minlength=len(CHOICES[name])).tolist()
                counts[name] = {value: n for value, n in zip(CHOICES[name], numbers, strict=True) if n}
        return counts, fits

    def _codes(self, name: str, query: Query) -> npt.NDArray[np.int8]:
        if name == "verdict":
            return self._verdict_codes
        return self.codes[f"fate_{query.by}" if name == "fate" else name]

    def _column(self, name: str) -> FloatArray:
        column = self.columns.get(name)
        return column if column is not None else np.full(len(self), np.nan)

    def _change(self, basis: str) -> FloatArray:
        """The change in units of nulls; without nulls, the raw change."""
        return self._column(f"z_{basis}" if f"z_{basis}" in self._measured_columns else f"change_{basis}")

    def arms_with_sort_value(self, query: Query, position: int) -> tuple[str, ...] | None:
        """The arms with a value of the sort column; None if this feature has one."""
        if query.sort in {"", "relevance", "-relevance"} and query.q:
            return None
        values = self._sort_values(self._sort_key(query))
        if np.isfinite(values[position]):
            return None
        return tuple(arm for arm in self.arms if np.isfinite(values[self.slice(arm)]).any())

    def _sort_key(self, query: Query) -> str:
        name = query.sort.removeprefix("-")
        if name in {"", "relevance", "change"}:
            return f"change {self.basis(query)}"
        return {"p": f"p_{self.basis(query)}", "similarity": f"similarity_{query.by}"}.get(name, name)

    def _sort_values(self, key: str) -> FloatArray:
        """Values to sort by, the largest first; NaN if undefined."""
        if key == "feature":
            return -self.numbers.astype(np.float64)
        if key.startswith("change "):
            return np.abs(self._change(key.removeprefix("change ")))
        return -self._column(key) if key.startswith("p_") else self._column(key)

    def _order(self, query: Query, fits: BoolArray, scores: FloatArray | None) -> IntArray:
        ascending = query.sort.startswith("-")
        if scores is not None and query.sort in {"", "relevance", "-relevance"}:
            positions = np.flatnonzero(fits)
            hundredths = np.rint(-100 * scores[positions]).astype(np.int16)  # int16 sorts ten times as fast
            order = positions[np.argsort(hundredths, kind="stable")]
            return order[::-1] if ascending else order
        order = self._full_order(self._sort_key(query), ascending)
        return order[fits[order]]

    def _full_order(self, key: str, ascending: bool) -> IntArray:
        """All positions ordered by a column, the largest first (numbers and p: the smallest), undefined ones last."""
        if (key, ascending) not in self._cached_orders:
            values = self._sort_values(key) if ascending else -self._sort_values(key)
            self._cached_orders[key, ascending] = np.argsort(values, kind="stable")  # NaN last
        return self._cached_orders[key, ascending]


_COUNTED = ("arm", "domain", "fate", "verdict", "tested")


def _split(words: str) -> list[tuple[str, bool]]:
    """Words of a search in search form, and whether each was in quotes; an open quote closes at the end.

    Example:
        >>> _split('Heart "blood cell" #12')
        [('heart', False), ('blood cell', True), ('#12', False)]
    """
    forms: list[tuple[str, bool]] = []
    for i, part in enumerate(words.split('"')):
        pieces = [part] if i % 2 else part.split()
        forms += [(search_form(piece), bool(i % 2)) for piece in pieces if piece.strip()]
    return forms
