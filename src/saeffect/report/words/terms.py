"""The registry of terms, `terms.yaml`: the report explains each where it first appears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources

import yaml

from saeffect.errors import ConfigError
from saeffect.report.context import ReportContext
from saeffect.report.words.names import dose_meaning, operator_words, outcome_words
from saeffect.report.words.numbers import percent

__all__ = ["Explainer", "Term", "add_term", "terms"]


@dataclass(frozen=True)
class Term:
    """A term and what it means in a line or two; `terms.yaml` lists what is filled in from the study."""

    name: str
    meaning: str


@cache
def _registry() -> dict[str, Term]:
    text = resources.files("saeffect.report").joinpath("terms.yaml").read_text(encoding="utf-8")
    return {key: Term(entry["term"], entry["means"]) for key, entry in yaml.safe_load(text).items()}


def add_term(key: str, term: Term) -> None:
    """Explain one term more, in the glossary and at the first table that names its key.

    Raises:
        ConfigError: There is one of this key.
    """
    if key in _registry():
        raise ConfigError(f"there is a term {key!r} already.", at="key", fix="give it another key.")
    _registry()[key] = term


def terms(context: ReportContext) -> Mapping[str, Term]:
    """Every term of the report, by key, with the study's own settings filled in."""
    settings = {
        "k": context.top_k,
        "least": context.min_matches,
        "alpha": context.alpha,
        "domain": context.domain,
        "percent": percent(context.alpha, 0),
        "outcome": outcome_words(context.steering.deciding if context.steering else "similarity").title,
        "dose": dose_meaning(context.steering),
        **operator_words(context.steering),
    }
    return {key: replace(term, meaning=term.meaning.format(**settings)) for key, term in _registry().items()}


@dataclass
class Explainer:
    """Hands out each term's meaning once, at its first use."""

    known: Mapping[str, Term]
    explained: set[str] = field(default_factory=set)

    def first(self, keys: Iterable[str]) -> tuple[Term, ...]:
        """The terms among `keys` that have not been explained yet.

        Example:
            >>> explain = Explainer(terms(ReportContext()))
            >>> [len(explain.first(["p", "q"])), len(explain.first(["q", "pp"]))]
            [2, 1]
        """
        fresh = [key for key in keys if key not in self.explained]
        self.explained.update(fresh)
        return tuple(self.known[key] for key in fresh)
