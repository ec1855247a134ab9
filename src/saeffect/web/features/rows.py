"""The feature list of a page: one row a feature, the filters that are set, and the addresses of its links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import isfinite, nan
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

from saeffect.report.texts import chips
from saeffect.report.words.numbers import count, fixed, interval, p_value, plural, signed
from saeffect.web.features.index import FeatureIndex, SearchResult
from saeffect.web.features.query import CHOICES, SORTS, Query, format_value, search_form
from saeffect.web.features.view import BASES, share
from saeffect.web.pages import environment

__all__ = ["FILTERS", "ListedFeature", "feature_address", "list_view", "options"]

FILTERS = {
    "domain": "Domain",
    "fate": "Fate",
    "verdict": "Verdict",
    "tested": "Steering",
    "direction": "Change",
    "coherence_min": "Coherence from",
    "coherence_max": "Coherence to",
    "density_min": "Density from",
    "density_max": "Density to",
    "effect_min": "Effect from",
    "p_max": "p at most",
}
"""The filters and their titles."""
_N_TOKENS = 8
_COLUMNS = (
    ("change", "Change", "in units of what null fine-tunes show, and p among them"),
    ("effect", "Effect", "steered minus placebo"),
    ("coherence", "Coherence", ""),
    ("density", "Density", "share of tokens"),
    ("similarity", "Match", "fate, and similarity to the match"),
)


@dataclass(frozen=True)
class ListedFeature:
    """A row of the list; each of its `tokens` in search form, and as HTML, plain and as a hit."""

    arm: str
    role: str
    number: int
    href: str
    label: str
    model_label: str
    accuracy: str
    tokens: tuple[tuple[str, str, str], ...]
    domain: bool
    cells: Markup

    def words(self, searched: Sequence[str]) -> Markup:
        """The first tokens, and the hits of a search."""
        html = []
        for i, (form, plain, marked) in enumerate(self.tokens):
            hit = any(word in form for word in searched)
            if i < _N_TOKENS or hit:
                html.append(marked if hit else plain)
        return Markup("".join(html[: _N_TOKENS + 2]))


def feature_address(arm: str, number: int, query: Query) -> str:
    """The address of a feature's page, with the query of the list."""
    return f"/features/{quote(arm, safe='')}/{number}{_query_suffix(query)}"


def _query_suffix(query: Query) -> str:
    query_text = query.address(page=1)
    return f"?{query_text}" if query_text else ""


def list_view(index: FeatureIndex, query: Query, result: SearchResult) -> dict[str, Any]:
    """The values of the list's template, for one page of a result; links are addresses of the changed query."""
    basis = index.basis(query)
    total = sum(result.counts["arm"].values())
    arms = [("", "All arms", query.address(arm=""), total, not query.arm)]
    arms += [
        (index.roles[arm], arm, query.address(arm=arm), result.counts["arm"].get(arm, 0), query.arm == arm)
        for arm in index.arms
    ]
    return {
        "query": query,
        # Cached: most key presses repeat rows.
        "rows": tuple(
            index.cached(("row", position, basis, query.by), partial(_row, index, position, basis, query.by))
            for position in result.positions.tolist()
        ),
        "searched": tuple(search_form(word) for word in query.q.replace('"', " ").split()),
        "behind": _query_suffix(query),
        "total": plural(result.total, "feature"),
        "page": result.page,
        "pages": result.pages,
        "before": query.address(page=result.page - 1) if result.page > 1 else None,
        "after": query.address(page=result.page + 1) if result.page < result.pages else None,
        "arms": tuple(arms),
        "heads": tuple(_column_heading(query, *column) for column in _COLUMNS),
        "active": tuple(
            (f"{FILTERS[name]} {format_value(value)}", query.address(**{name: "" if isinstance(value, str) else None}))
            for name, value in query.filters.items()
            if name in FILTERS
        ),
        "counts": result.counts,
        "missing": index.missing,
        "unsorted": _unsorted_note(index, query, result),
    }


def _unsorted_note(index: FeatureIndex, query: Query, result: SearchResult) -> str:
    """A note if the first feature has no value to sort by, else ""."""
    arms = index.arms_with_sort_value(query, int(result.positions[0])) if result.total else None
    if arms is None:
        return ""
    name = SORTS[query.sort.removeprefix("-").replace("relevance", "") or "change"]
    available = f"features of {' and '.join(arms)} have one" if arms else "no feature of this run has one"
    return f"Nothing to sort by: these have no value of “{name}”; {available}."


def _column_heading(query: Query, name: str, title: str, note: str) -> tuple[str, str, str, str, str]:
    """Name, title, note, address of a click, and order: "ascending", "descending" or "none"."""
    sort = query.sort or ("" if query.q else "change")
    order = {name: "descending", f"-{name}": "ascending"}.get(sort, "none")
    return name, title, note, query.address(sort=f"-{name}" if order == "descending" else name), order


@lru_cache(maxsize=100_000)
def _token_html(token: str) -> tuple[str, str, str]:
    """A token in search form, and as HTML, plain and as a hit."""
    html = f"<bdi>{escape(chips([token], [0.0], ())[0].text)}</bdi></span>"
    return search_form(token), f"<span>{html}", f'<span class="hit">{html}'


def _row(index: FeatureIndex, position: int, basis: str, by: str) -> ListedFeature:
    arm, number = index.arm_of(position), int(index.numbers[position])
    change = index.value(f"z_{basis}", position)
    raw_change = index.value(f"change_{basis}", position)
    p, effect = index.value(f"p_{basis}", position), index.value("effect", position)
    coherence, similarity = index.value("coherence", position), index.value(f"similarity_{by}", position)
    fate = index.code(f"fate_{by}", position)
    model_label = index.model_labels.get(position, {})
    accuracy = index.value("accuracy", position)
    bounds = interval(model_label.get("low", nan), model_label.get("high", nan), 2)
    return ListedFeature(
        arm=arm,
        role=index.roles[arm],
        number=number,
        href=f"/features/{quote(arm, safe='')}/{number}",
        label=index.verdicts.labels[position],
        model_label=model_label.get("label", ""),
        accuracy=f"detection {fixed(accuracy, 2)} {bounds}" if isfinite(accuracy) else "",
        tokens=tuple(_token_html(token) for token in index.top_tokens(position)),
        domain=index.code("domain", position) == "yes",
        cells=environment()
        .get_template("feature_cells.html.j2")
        .module.cells(  # type: ignore[attr-defined]
            change=signed(change, 1) if isfinite(change) else signed(raw_change) if isfinite(raw_change) else "",
            p=f"p {p_value(p)}" if isfinite(p) else "",
            effect=signed(effect) if isfinite(effect) else "",
            tested={"passed": "passed", "failed": "not passed"}.get(index.code("tested", position), ""),
            coherence=fixed(coherence, 2) if isfinite(coherence) else "",
            density=share(index.value("density", position)),
            fate="" if fate == "unknown" else fate,
            similarity=fixed(similarity, 2) if isfinite(similarity) else "",
            verdict={"none": ""}.get(verdict := index.code("verdict", position), verdict),
        ),
    )


def options(query: Query, result: SearchResult) -> dict[str, list[tuple[str, str, bool]]]:
    """By filter, its choices: value, text with count, and whether it is selected."""
    names = {"basis": BASES, "by": {"writes": "what it writes", "fires": "when it fires"}}
    choices = {}
    for name, values in CHOICES.items():
        chosen, counts = getattr(query, name), result.counts.get(name)
        available = [value for value in values if counts is None or counts.get(value) or value == chosen]
        choices[name] = [
            (
                value,
                names.get(name, {}).get(value, value) + (f" ({count(counts.get(value, 0))})" if counts else ""),
                value == chosen,
            )
            for value in available
        ]
    choices["sort"] = [(value, title, query.sort.removeprefix("-") == value) for value, title in SORTS.items()]
    return choices
