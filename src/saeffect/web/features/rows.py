"""The feature list as a page shows it: a row a feature, what is filtered, and where the links of its parts lead."""

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
from saeffect.web.features.index import FeatureIndex, Found
from saeffect.web.features.query import CHOICES, SORTS, Query, search_form, written
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
"""The filters that are named in a list, and what they are called."""
_TOKENS = 8
_HEADS = (
    ("change", "Change", "in units of what null fine-tunes show, and p among them"),
    ("effect", "Effect", "steered minus placebo"),
    ("coherence", "Coherence", ""),
    ("density", "Density", "share of tokens"),
    ("similarity", "Match", "fate, and similarity to the match"),
)


@dataclass(frozen=True)
class ListedFeature:
    """A row of the list. Its `tokens` as they are searched, and as HTML, plain and as a hit."""

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
        """The first tokens, and those that the search found."""
        shown = []
        for i, (form, plain, marked) in enumerate(self.tokens):
            hit = any(word in form for word in searched)
            if i < _TOKENS or hit:
                shown.append(marked if hit else plain)
        return Markup("".join(shown[: _TOKENS + 2]))


def feature_address(arm: str, number: int, query: Query) -> str:
    """The address of a feature's page that knows the list it was opened from."""
    return f"/features/{quote(arm, safe='')}/{number}{_behind(query)}"


def _behind(query: Query) -> str:
    asked = query.address(page=1)
    return f"?{asked}" if asked else ""


def list_view(index: FeatureIndex, query: Query, found: Found) -> dict[str, Any]:
    """What the template of the list shows of the page that `found` holds; links are addresses of the list, changed."""
    basis = index.basis(query)
    every = sum(found.counts["arm"].values())
    arms = [("", "All arms", query.address(arm=""), every, not query.arm)]
    arms += [
        (index.roles[arm], arm, query.address(arm=arm), found.counts["arm"].get(arm, 0), query.arm == arm)
        for arm in index.arms
    ]
    return {
        "query": query,
        # Kept: most keystrokes show rows that others have shown.
        "rows": tuple(
            index.kept(("row", place, basis, query.by), partial(_row, index, place, basis, query.by))
            for place in found.places.tolist()
        ),
        "searched": tuple(search_form(word) for word in query.q.replace('"', " ").split()),
        "behind": _behind(query),
        "total": plural(found.total, "feature"),
        "page": found.page,
        "pages": found.pages,
        "before": query.address(page=found.page - 1) if found.page > 1 else None,
        "after": query.address(page=found.page + 1) if found.page < found.pages else None,
        "arms": tuple(arms),
        "heads": tuple(_head(query, *head) for head in _HEADS),
        "active": tuple(
            (f"{FILTERS[name]} {written(value)}", query.address(**{name: "" if isinstance(value, str) else None}))
            for name, value in query.filters.items()
            if name in FILTERS
        ),
        "counts": found.counts,
        "missing": index.missing,
        "unsorted": _unsorted(index, query, found),
    }


def _unsorted(index: FeatureIndex, query: Query, found: Found) -> str:
    """What to say of a page whose features have no value to be sorted by; "" if they have."""
    arms = index.lacking(query, int(found.places[0])) if found.total else None
    if arms is None:
        return ""
    name = SORTS[query.sort.removeprefix("-").replace("relevance", "") or "change"]
    who = f"features of {' and '.join(arms)} have one" if arms else "no feature of this run has one"
    return f"Nothing to sort by: these have no value of “{name}”; {who}."


def _head(query: Query, name: str, title: str, note: str) -> tuple[str, str, str, str, str]:
    """Title, note, where a click leads, and how the column is ordered: "ascending", "descending" or "none"."""
    now = query.sort or ("" if query.q else "change")
    order = {name: "descending", f"-{name}": "ascending"}.get(now, "none")
    return name, title, note, query.address(sort=f"-{name}" if order == "descending" else name), order


@lru_cache(maxsize=100_000)
def _listed(token: str) -> tuple[str, str, str]:
    """A token as it is searched, and as HTML, plain and as a hit."""
    shown = f"<bdi>{escape(chips([token], [0.0], ())[0].text)}</bdi></span>"
    return search_form(token), f"<span>{shown}", f'<span class="hit">{shown}'


def _row(index: FeatureIndex, place: int, basis: str, by: str) -> ListedFeature:
    arm, number = index.arm_of(place), int(index.numbers[place])
    change = index.value(f"z_{basis}", place)
    raw = index.value(f"change_{basis}", place)
    p, effect = index.value(f"p_{basis}", place), index.value("effect", place)
    coherence, similarity = index.value("coherence", place), index.value(f"similarity_{by}", place)
    fate = index.code(f"fate_{by}", place)
    labelled = index.model_labels.get(place, {})
    accuracy = index.value("accuracy", place)
    between = interval(labelled.get("low", nan), labelled.get("high", nan), 2)
    return ListedFeature(
        arm=arm,
        role=index.roles[arm],
        number=number,
        href=f"/features/{quote(arm, safe='')}/{number}",
        label=index.verdicts.labels[place],
        model_label=labelled.get("label", ""),
        accuracy=f"detection {fixed(accuracy, 2)} {between}" if isfinite(accuracy) else "",
        tokens=tuple(_listed(token) for token in index.top_tokens(place)),
        domain=index.code("domain", place) == "yes",
        cells=environment()
        .get_template("feature_cells.html.j2")
        .module.cells(  # type: ignore[attr-defined]
            change=signed(change, 1) if isfinite(change) else signed(raw) if isfinite(raw) else "",
            p=f"p {p_value(p)}" if isfinite(p) else "",
            effect=signed(effect) if isfinite(effect) else "",
            tested={"passed": "passed", "failed": "not passed"}.get(index.code("tested", place), ""),
            coherence=fixed(coherence, 2) if isfinite(coherence) else "",
            density=share(index.value("density", place)),
            fate="" if fate == "unknown" else fate,
            similarity=fixed(similarity, 2) if isfinite(similarity) else "",
            verdict={"none": ""}.get(verdict := index.code("verdict", place), verdict),
        ),
    )


def options(query: Query, found: Found) -> dict[str, list[tuple[str, str, bool]]]:
    """For each filter with values: value, text with its count, and whether it is chosen; the first is no filter."""
    names = {"basis": BASES, "by": {"writes": "what it writes", "fires": "when it fires"}}
    made = {}
    for name, values in CHOICES.items():
        chosen, counts = getattr(query, name), found.counts.get(name)
        shown = [value for value in values if counts is None or counts.get(value) or value == chosen]
        made[name] = [
            (
                value,
                names.get(name, {}).get(value, value) + (f" ({count(counts.get(value, 0))})" if counts else ""),
                value == chosen,
            )
            for value in shown
        ]
    made["sort"] = [(value, title, query.sort.removeprefix("-") == value) for value, title in SORTS.items()]
    return made
