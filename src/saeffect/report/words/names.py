"""Names of features, quantities, outcomes and doses, and the report's glossary."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources

import yaml

from saeffect.comparison import ArmTables
from saeffect.comparison.quantities import wording
from saeffect.errors import ConfigError
from saeffect.lm.tokens import printable_token
from saeffect.report.context import ReportContext, SteeringResults
from saeffect.report.words.numbers import amount, amount_interval, fixed, is_defined, percent
from saeffect.steering.outcomes import OUTCOMES

__all__ = [
    "Explainer",
    "Term",
    "add_term",
    "capital",
    "dose_axis",
    "dose_words",
    "effect_text",
    "feature_names",
    "first_tokens",
    "interval_text",
    "level_text",
    "short_name",
    "terms",
]


def capital(text: str) -> str:
    """The text with its first letter in upper case, all else unchanged."""
    return text[:1].upper() + text[1:]


def first_tokens(tokens: Sequence[str], limit: int = 2, longest: int | None = 16) -> str:
    """A feature's first distinct top tokens (case aside), visible and cut to `longest` characters (None: whole).

    Example:
        >>> first_tokens([" insulin", " Insulin", " dose", " drug"]), first_tokens(["\\n", " "])
        ('insulin, dose', '\\\\n, ␣')
    """
    distinct: dict[str, str] = {}
    for token in tokens:
        text = printable_token(str(token)).strip() or "␣"
        distinct.setdefault(text.lower(), text)
        if len(distinct) == limit:
            break
    return ", ".join(
        text if longest is None or len(text) <= longest else text[: longest - 1] + "…" for text in distinct.values()
    )


def feature_names(
    arm: ArmTables | None, limit: int = 3, *, longest: int | None = 16, wanted: Container[int] | None = None
) -> Mapping[int, str]:
    """The `first_tokens` of an arm's features (all, or those `wanted`); empty if the arm is unknown."""
    if arm is None:
        return {}
    return {
        int(feature): first_tokens(list(tokens), limit, longest)
        for feature, tokens in zip(arm.features["feature"], arm.features["top_tokens"], strict=True)
        if wanted is None or int(feature) in wanted
    }


def short_name(quantity: str) -> str:
    """Name of a quantity within a sentence, without an article.

    Example:
        >>> short_name("pass_rate"), short_name("coherence_mean_seeds")
        ('pass rate', 'mean coherence (SAEs as units)')
    """
    short = wording(quantity.removesuffix("_seeds")).short
    return f"{short} (SAEs as units)" if quantity.endswith("_seeds") else short


def effect_text(value: object, outcome: str) -> str:
    """An effect with its sign, in the outcome's unit.

    Example:
        >>> effect_text(0.012, "off_list").split(), effect_text(0.0514, "similarity")
        (['+1.2', 'pp'], '+0.051')
    """
    return amount(value, _unit(outcome), sign=True) if is_defined(value) else "undefined"


def interval_text(low: object, high: object, outcome: str) -> str:
    """Both ends of an effect's interval in brackets, or "no interval"."""
    return amount_interval(low, high, _unit(outcome)) if is_defined(low) and is_defined(high) else "no interval"


def _unit(outcome: str) -> str:
    return "points" if OUTCOMES[outcome].is_share else ""


def level_text(value: object, outcome: str) -> str:
    """An outcome's own level (not a difference), shares as percentages.

    Example:
        >>> level_text(0.012, "off_list").split(), level_text(0.4, "similarity")
        (['1.2', '%'], '0.400')
    """
    if not is_defined(value):
        return "undefined"
    return percent(value) if OUTCOMES[outcome].is_share else fixed(value)


@dataclass(frozen=True)
class _DoseWords:
    axis: str
    method: str
    meaning: str


_ADDING = "by adding their direction to the residual stream, as long as {dose}"
_DOSES = {
    "residual_norm": _DoseWords(
        "dose (multiples of the hook's mean residual norm)",
        _ADDING + "the hook's mean residual norm",
        "length of the added vector, in multiples of the mean residual norm at the hook.",
    ),
    "coefficient": _DoseWords(
        "dose (multiples of the decoder row)",
        _ADDING + "the decoder row",
        "what the decoder row is multiplied by before it is added, the paper's coefficient.",
    ),
    "clamp": _DoseWords(
        "dose (multiples of the feature's maximum activation)",
        "by setting their activation to {dose}its maximum on the text, wherever the model is steered",
        "what the feature's activation is set to, in multiples of its maximum on the text.",
    ),
    "ablate": _DoseWords(
        "dose",
        "by switching them off: their activation is set to 0",
        "none here: an ablation sets the feature's activation to 0.",
    ),
}


def _dose(results: SteeringResults | None) -> _DoseWords:
    results = results or SteeringResults()
    return _DOSES[results.unit if results.operator == "add" else results.operator]


def dose_axis(results: SteeringResults | None) -> str:
    """The label of a dose axis, in the unit of the operator."""
    return _dose(results).axis


def dose_words(results: SteeringResults) -> str:
    """How features were steered, dose included, as the end of a sentence.

    Example:
        >>> dose_words(SteeringResults(operator="clamp", dose=5.0))
        'by setting their activation to 5 × its maximum on the text, wherever the model is steered'
    """
    return _dose(results).method.format(dose="some multiple of " if results.dose is None else f"{results.dose:g} × ")


_AT_LENGTH = "and pushed along it, at each token, as far as the operator pushes along the feature's own"
# By operator: words of the glossary on placebos and on several features.
_OPERATOR_WORDS: Mapping[str, Mapping[str, str]] = {
    "add": {
        "placebo_texts": "texts steered as hard along a placebo",
        "random_push": "and pushed along as hard",
        "raises": "raises",
        "above": "above",
        "together": "as one push along the sum of their directions, as long as the dose says",
    },
    "clamp": {
        "placebo_texts": "texts with a placebo clamped instead",
        "random_push": _AT_LENGTH,
        "raises": "raises",
        "above": "above",
        "together": "each clamped to the dose's multiple of its own maximum",
    },
    "ablate": {
        "placebo_texts": "texts with a placebo switched off instead",
        "random_push": _AT_LENGTH,
        "raises": "lowers",
        "above": "below",
        "together": "all switched off",
    },
}


@dataclass(frozen=True)
class Term:
    """A term and its meaning in a line or two; `terms.yaml` lists the values filled in from the study."""

    name: str
    meaning: str


@cache
def _registry() -> dict[str, Term]:
    text = resources.files("saeffect.report").joinpath("terms.yaml").read_text(encoding="utf-8")
    return {key: Term(entry["term"], entry["means"]) for key, entry in yaml.safe_load(text).items()}


def add_term(key: str, term: Term) -> None:
    """Add a term to the glossary and to the first table that names its key; ConfigError if the key exists."""
    if key in _registry():
        raise ConfigError(f"there is a term {key!r} already.", at="key", fix="give it another key.")
    _registry()[key] = term


def terms(context: ReportContext) -> Mapping[str, Term]:
    """Every term of the report, by key, with the study's settings filled in."""
    steering = context.steering or SteeringResults()
    settings = {
        "k": context.top_k,
        "least": context.min_matches,
        "alpha": context.alpha,
        "domain": context.domain,
        "percent": percent(context.alpha, 0),
        "outcome": OUTCOMES[steering.deciding].label,
        "dose": _dose(steering).meaning,
        **_OPERATOR_WORDS[steering.operator],
    }
    return {key: replace(term, meaning=term.meaning.format(**settings)) for key, term in _registry().items()}


@dataclass
class Explainer:
    """Explains each term once, at its first use."""

    known: Mapping[str, Term]
    explained: set[str] = field(default_factory=set)

    def first(self, keys: Iterable[str]) -> tuple[Term, ...]:
        """The known terms among `keys` that have not been explained yet."""
        new = [key for key in keys if key in self.known and key not in self.explained]
        self.explained.update(new)
        return tuple(self.known[key] for key in new)
