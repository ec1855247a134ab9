"""What features, quantities, outcomes, controls and doses are called: tables, captions, axes and cards use these."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from saeffect.lm.tokens import printable_token
from saeffect.report.context import ReportContext, SteeringResults
from saeffect.report.words.numbers import amount, amount_interval, fixed, is_defined, percent

__all__ = [
    "OutcomeWords",
    "capital",
    "control_words",
    "dose_axis",
    "dose_meaning",
    "dose_words",
    "effect_text",
    "feature_names",
    "feature_words",
    "first_tokens",
    "interval_text",
    "level_text",
    "operator_words",
    "outcome_words",
    "short_name",
]


def capital(text: str) -> str:
    """The same with a capital at its beginning, and the rest as it is."""
    return text[:1].upper() + text[1:]


def first_tokens(tokens: Sequence[str], limit: int = 2, longest: int | None = 16) -> str:
    """A feature's first top tokens, each visible and cut to length; whole without one.

    Tokens that differ in capitals or a leading space only are one word here.

    Example:
        >>> first_tokens([" insulin", " Insulin", " dose", " drug"]), first_tokens(["\\n", " "])
        ('insulin, dose', '\\\\n, ␣')
    """
    shown: dict[str, str] = {}
    for token in tokens:
        text = printable_token(str(token)).strip() or "␣"
        shown.setdefault(text.lower(), text)
        if len(shown) == limit:
            break
    return ", ".join(
        text if longest is None or len(text) <= longest else text[: longest - 1] + "…" for text in shown.values()
    )


def feature_names(context: ReportContext, arm: str, limit: int = 3) -> Mapping[int, str]:
    """By feature of an arm, its first top tokens; empty for an arm that the report does not know."""
    if arm not in context.arms:
        return {}
    features = context.arms[arm].features
    return {
        int(feature): first_tokens(list(tokens), limit)
        for feature, tokens in zip(features["feature"], features["top_tokens"], strict=True)
    }


def feature_words(context: ReportContext, role: str, wanted: Container[int], limit: int = 5) -> Mapping[int, str]:
    """By number, the first top tokens, whole, of those features of a role's arm that are wanted."""
    arm = context.arm_of(role)
    if arm is None:
        return {}
    return {
        int(feature): first_tokens(list(tokens), limit, longest=None)
        for feature, tokens in zip(arm.features["feature"], arm.features["top_tokens"], strict=True)
        if int(feature) in wanted
    }


def short_name(quantity: str) -> str:
    """A quantity as it is spoken of in a sentence, without an article.

    Example:
        >>> short_name("pass_rate"), short_name("coherence_mean_seeds")
        ('pass rate', 'mean coherence (SAEs as units)')
    """
    words = {
        "domain_share": "share of domain features",
        "pass_rate": "pass rate",
        "coherence_mean": "mean coherence",
        "effect": "mean effect",
    }
    name = quantity.removesuffix("_seeds")
    spoken = words.get(name, name.replace("_", " "))
    return f"{spoken} (SAEs as units)" if quantity.endswith("_seeds") else spoken


@dataclass(frozen=True)
class OutcomeWords:
    """An outcome in words: its name, the unit of effects as people read it, and as `numbers.amount` knows it."""

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
    return amount(value, outcome_words(outcome).amount_unit, sign=True) if is_defined(value) else "undefined"


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


def _dose(results: SteeringResults | None) -> str:
    """Which kind of dose it is."""
    if results is None:
        return "residual_norm"
    return results.unit if results.operator == "add" else results.operator


_DOSE_UNITS = {
    "residual_norm": "multiples of the hook's mean residual norm",
    "coefficient": "multiples of the decoder row",
    "clamp": "multiples of the feature's maximum activation",
}


def dose_axis(results: SteeringResults | None) -> str:
    """The label of a dose axis, in the unit of the operator.

    Example:
        >>> dose_axis(SteeringResults(operator="clamp"))
        "dose (multiples of the feature's maximum activation)"
    """
    unit = _DOSE_UNITS.get(_dose(results), "")
    return f"dose ({unit})" if unit else "dose"


def dose_words(results: SteeringResults) -> str:
    """What was done to the features, dose included, as the end of a sentence.

    Example:
        >>> dose_words(SteeringResults(operator="clamp", dose=5.0))
        'by setting their activation to 5 × its maximum on the text, wherever the model is steered'
    """
    dose = f"{results.dose:g} × " if results.dose is not None else "some multiple of "
    added = "by adding their direction to the residual stream, as long as "
    return {
        "ablate": "by switching them off: their activation is set to 0",
        "clamp": f"by setting their activation to {dose}its maximum on the text, wherever the model is steered",
        "residual_norm": f"{added}{dose}the hook's mean residual norm",
    }.get(_dose(results), f"{added}{dose}the decoder row")


def dose_meaning(results: SteeringResults | None) -> str:
    """The glossary's line on doses."""
    return {
        "ablate": "none here: an ablation sets the feature's activation to 0.",
        "clamp": "what the feature's activation is set to, in multiples of its maximum on the text.",
        "coefficient": "what the decoder row is multiplied by before it is added, the paper's coefficient.",
    }.get(_dose(results), "length of the added vector, in multiples of the mean residual norm at the hook.")


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
    return _OPERATORS[results.operator if results is not None else "add"]
