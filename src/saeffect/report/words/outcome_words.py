"""What outcomes, controls and doses are called, in one place: tables, captions, axes and cards all use these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from saeffect.report.steering_results import SteeringResults
from saeffect.report.words.numerals import amount, amount_interval, fixed, is_defined, percent

__all__ = [
    "OutcomeWords",
    "control_words",
    "dose_axis",
    "dose_meaning",
    "dose_words",
    "effect_text",
    "interval_text",
    "level_text",
    "operator_words",
    "outcome_words",
]


@dataclass(frozen=True)
class OutcomeWords:
    """An outcome in words: its name, the unit of effects as people read it, and as `numerals.amount` knows it."""

    title: str
    unit: str
    amount_unit: str = ""


_OUTCOMES: Mapping[str, OutcomeWords] = {
    "similarity": OutcomeWords("similarity", "cosine"),
    "keyword_score": OutcomeWords("keyword score", "percentage points of words", "points"),
    "off_list": OutcomeWords("off-list words", "percentage points of words", "points"),
    "direct_effect": OutcomeWords("direct effect", "nats"),
    "kl": OutcomeWords("KL", "nats"),
    "perplexity": OutcomeWords("perplexity", "nats a token: a difference of logarithms"),
    "distinct2": OutcomeWords("distinct-2", "percentage points of pairs", "points"),
}

_CONTROLS: Mapping[str, str] = {
    "matched": "matched placebo",
    "random": "random direction",
    "shuffled": "shuffled reference",
    "prompt": "prompt that names it",
    "mean_difference": "difference of means",
}


def outcome_words(name: str) -> OutcomeWords:
    """The words of an outcome; of one that nobody knows, its name.

    Example:
        >>> outcome_words("off_list").title, outcome_words("my_score").title
        ('off-list words', 'my score')
    """
    return _OUTCOMES.get(name, OutcomeWords(name.replace("_", " "), "in its own unit"))


def control_words(name: str) -> str:
    """What a control or baseline is called.

    Example:
        >>> control_words("mean_difference")
        'difference of means'
    """
    return _CONTROLS.get(name, name.replace("_", " "))


def effect_text(value: object, outcome: str) -> str:
    """An effect with its sign, in the outcome's unit.

    Example:
        >>> effect_text(0.012, "off_list").split(), effect_text(0.0514, "similarity")
        (['+1.2', 'pp'], '+0.051')
    """
    unit = outcome_words(outcome).amount_unit
    if not is_defined(value):
        return "undefined"
    return amount(value, unit, sign=True)


def interval_text(low: object, high: object, outcome: str) -> str:
    """Both ends of an effect's interval in brackets, or that there is none."""
    if not (is_defined(low) and is_defined(high)):
        return "no interval"
    return amount_interval(low, high, outcome_words(outcome).amount_unit)


def level_text(value: object, outcome: str) -> str:
    """An outcome's own level (not a difference), shares as percentages.

    Example:
        >>> level_text(0.012, "off_list").split(), level_text(0.4, "similarity")
        (['1.2', '%'], '0.400')
    """
    if not is_defined(value):
        return "undefined"
    return percent(value) if outcome_words(outcome).amount_unit == "points" else fixed(value, 3)


def dose_axis(results: SteeringResults | None) -> str:
    """The label of a dose axis, in the unit of the operator.

    Example:
        >>> dose_axis(SteeringResults(operator="clamp"))
        "dose (multiples of the feature's maximum activation)"
    """
    unit = _dose_unit(results)
    return f"dose ({unit})" if unit else "dose"


def _dose_unit(results: SteeringResults | None) -> str:
    if results is None or (results.operator == "add" and results.unit == "residual_norm"):
        return "multiples of the hook's mean residual norm"
    if results.operator == "add":
        return "multiples of the decoder row"
    return "multiples of the feature's maximum activation" if results.operator == "clamp" else ""


def dose_words(results: SteeringResults) -> str:
    """What was done to the features, dose included, as the end of a sentence.

    Example:
        >>> dose_words(SteeringResults(operator="clamp", dose=5.0))
        'by setting their activation to 5 × its maximum on the text, wherever the model is steered'
    """
    if results.operator == "ablate":
        return "by switching them off: their activation is set to 0"
    dose = f"{results.dose:g} × " if results.dose is not None else "some multiple of "
    if results.operator == "clamp":
        return f"by setting their activation to {dose}its maximum on the text, wherever the model is steered"
    length = "the hook's mean residual norm" if results.unit == "residual_norm" else "the decoder row"
    return f"by adding their direction to the residual stream, as long as {dose}{length}"


def dose_meaning(results: SteeringResults | None) -> str:
    """The glossary's line on doses."""
    if results is not None and results.operator == "ablate":
        return "none here: an ablation sets the feature's activation to 0."
    if results is not None and results.operator == "clamp":
        return "what the feature's activation is set to, in multiples of its maximum on the text."
    if results is not None and results.unit == "coefficient":
        return "what the decoder row is multiplied by before it is added, the paper's coefficient."
    return "length of the added vector, in multiples of the mean residual norm at the hook."


_PUSHED = "and pushed along it, at each token, as far as the operator pushes along the feature's own"
_OPERATORS: Mapping[str, Mapping[str, str]] = {
    "add": {
        "placebo_texts": "texts steered as hard along a placebo",
        "random_push": "and pushed along as hard",
        "raises": "raises",
        "above": "above",
        "together": "as one push along the sum of their directions, as long as the dose says",
    },
    "clamp": {
        "placebo_texts": "texts with a placebo clamped instead",
        "random_push": _PUSHED,
        "raises": "raises",
        "above": "above",
        "together": "each clamped to the dose's multiple of its own maximum",
    },
    "ablate": {
        "placebo_texts": "texts with a placebo switched off instead",
        "random_push": _PUSHED,
        "raises": "lowers",
        "above": "below",
        "together": "all switched off",
    },
}


def operator_words(results: SteeringResults | None) -> Mapping[str, str]:
    """What an operator does to placebos, to random directions and to several features, for the glossary.

    Example:
        >>> operator_words(SteeringResults(operator="ablate"))["placebo_texts"]
        'texts with a placebo switched off instead'
    """
    return _OPERATORS.get(results.operator if results is not None else "add", _OPERATORS["add"])
