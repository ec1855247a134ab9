"""Causes of the change: effects of model and SAE, crossed, and the share of fine-tuning that features carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from saeffect.diffing.put_back_shares import OWN_WRITING
from saeffect.diffing.written import clearly_more
from saeffect.report.words.names import capital
from saeffect.report.words.numbers import bracketed, fixed, is_defined, joined, p_text, p_value, percent, plural
from saeffect.stats.estimate import Estimate

__all__ = [
    "crossed_sentences",
    "factorial_estimate",
    "factorial_sentence",
    "factorial_sentences",
    "put_back_row",
    "put_back_sentence",
    "text_name",
    "what_a_push_writes",
    "what_it_causes",
]

# By quantity, the phrase for a rise and for a fall in the fine-tuned model; {x} is the size of the change.
_PHRASES = {
    "direct_effect": ("features push their tokens {x} more", "features push their tokens {x} less"),
    "steering_effect": (
        "steering raises texts' similarity to the features' tokens by {x} more",
        "steering raises texts' similarity to the features' tokens by {x} less",
    ),
    "pass_rate": ("{x} more of the features pass", "{x} fewer of the features pass"),
    "density": ("features fire on {x} more of the tokens", "features fire on {x} fewer of the tokens"),
    "activation": ("features are {x} more active", "features are {x} less active"),
    "coherence": ("features' top tokens are {x} more coherent", "features' top tokens are {x} less coherent"),
    "explained_variance": ("{x} more of the variance is explained", "{x} less of the variance is explained"),
    "ce_loss_score": ("{x} more of the loss is recovered", "{x} less of the loss is recovered"),
}
_GENERIC = ("{q} is {x} higher", "{q} is {x} lower")
_UNIT_NAMES = {
    **dict.fromkeys(("share", "share of tokens"), "percentage points"),
    **dict.fromkeys(("activation", "coherence", "cosine similarity"), ""),
}


def factorial_sentences(table: pd.DataFrame) -> dict[str, str]:
    """By quantity, one sentence on the rows of `saeffect.comparison.factorial`, in their order."""
    return {str(name): factorial_sentence(rows) for name, rows in table.groupby("quantity", sort=False)}


def crossed_sentences(table: pd.DataFrame) -> list[str]:
    """`factorial_sentences`, and what is missing to call an effect of the model one of this fine-tuning."""
    sentences = list(factorial_sentences(table).values())
    if table["estimate"].notna().any() and not (table["n_nulls"] > 0).any():
        sentences.append(
            "Whether any further training does the same is not known: no null fine-tune was crossed. Make nulls with"
            " --keep-adapters, and their models are measured, too."
        )
    return sentences


def factorial_sentence(rows: pd.DataFrame) -> str:
    """The effects of model and SAE, from the four rows of one quantity."""
    by_effect = {str(row["effect"]): row for row in rows.to_dict("records")}
    model, dictionary = by_effect["model"], by_effect["dictionary"]
    name = str(model["label"])
    if not is_defined(model["estimate"]):
        return f"{name}: model and SAE cannot be told apart ({model['reason'] or 'no reason was recorded'})."
    clause = _model_clause(model)
    if is_defined(model["null_p"]):
        nulls = plural(int(model["n_nulls"]), "null fine-tune")
        clause += f"; with the control's SAE, p = {p_value(model['null_p'])} among {nulls}"
    return f"With one and the same SAE, {clause}; which SAE is used makes a difference of {_effect_size(dictionary)}."


def factorial_estimate(row: Mapping[Any, Any]) -> Estimate:
    """A row as an `Estimate`."""
    value, low, high, p = (float(row[name]) for name in ("estimate", "low", "high", "p"))
    return Estimate(value, low, high, p=p)


def _model_clause(row: Mapping[Any, Any]) -> str:
    estimate, name = factorial_estimate(row), str(row["label"])
    if not estimate.value and not estimate.defined:
        return f"{name.lower() if name[1:2].islower() else name} is the same in both models"
    more, less = _PHRASES.get(str(row["quantity"]), _GENERIC)
    size = _amount(abs(estimate.value), str(row["unit"]))
    clause = (more if estimate.value > 0 else less).format(x=size, q=name.lower())
    clause += f" in the fine-tuned model{_interval_suffix(row)}"
    return clause if estimate.sign or not estimate.defined else f"{clause}, which may be chance"


def _effect_size(row: Mapping[Any, Any]) -> str:
    estimate, unit = factorial_estimate(row), _number_unit(row)
    if not is_defined(estimate.value):
        return f"an unknown size ({row['reason']})"
    value = bracketed(estimate, unit).partition(" [")[0].removesuffix(", without an interval")
    return value + _unit_suffix(str(row["unit"])) + _interval_suffix(row)


def _interval_suffix(row: Mapping[Any, Any]) -> str:
    """The interval in brackets, in the unit of the preceding number."""
    estimate = factorial_estimate(row)
    if not estimate.defined:
        return " (without an interval)"
    return " [" + bracketed(estimate, _number_unit(row)).partition(" [")[2]


def _number_unit(row: Mapping[Any, Any]) -> str:
    return "share" if str(row["unit"]).startswith("share") else str(row["unit"])


def _unit_suffix(unit: str) -> str:
    unit_name = _UNIT_NAMES.get(unit, unit)
    return f" {unit_name}" if unit_name else ""


def _amount(size: float, unit: str) -> str:
    if unit.startswith("share"):
        return percent(size, 1 if size >= 0.01 else 3).rstrip("%").rstrip() + " percentage points"
    digits = 2 if size >= 0.1 else 3
    return fixed(size, digits) + _unit_suffix(unit)


def what_a_push_writes(words: pd.DataFrame, alpha: float) -> str:
    """What comes up when the base model is pushed along the mean difference, beside the nulls', in one sentence; from
    `steered_words`.
    """
    if words.empty:
        return "Pushed along the mean activation difference, the base model writes no word often enough to be compared."
    doses = joined([f"{dose:g}" for dose in sorted(words["dose"].unique())])
    start = f"Pushed along the mean activation difference by {doses} mean residual norms, the base model writes"
    more, reason = words[words["change"] > 0], str(words["reason"].iloc[0])
    found = clearly_more(words, alpha)
    if len(found):
        p = p_text(float(found["p_search"].max()))
        # A word of some null may come as often and still pass: p allows for a few such nulls if there are many.
        beyond_all = bool((found["rate"] > found["null_high"]).all())
        often = "more often than along any null's" if beyond_all else "clearly more often than along nulls'"
        return f"{start} {often}: {_word_rates(found)} ({p}, which counts the search)."
    if more.empty:
        return f"{start} no word more often than {'without' if words['p'].isna().all() else 'along those of nulls'}."
    if words["p"].isna().all():
        return f"{start} most of all {_word_rates(more)}; whether pushes along nulls do so is not known ({reason})."
    best = more.iloc[0]
    return (
        f"{start} no word clearly more often than along nulls'; the clearest is {_word_rates(more.head(1))}"
        f" ({p_text(float(best['p_search']))}{f'; {reason}' if reason else ''})."
    )


def _word_rates(rows: pd.DataFrame) -> str:
    """The clearest words, each once, the first with its share of texts."""
    first = rows.iloc[0].to_dict()
    words = [f"“{word}”" for word in list(dict.fromkeys(map(str, rows["word"])))[:_N_WORDS]]
    others = f"; without a push {percent(first['base_rate'], 0)}"
    if is_defined(first["null_high"]):
        others += f", along nulls' at most {percent(first['null_high'], 0)}"
    return ", ".join([f"{words[0]} (in {percent(first['rate'], 0)} of texts{others})", *words[1:]])


_N_WORDS = 8  # that come up in a sentence
_N_FEATURES = 20  # of the most changed features, in sentences
_LOSS_PHRASES = {
    "tuned": "what fine-tuning does at this layer to the loss on {text}",
    "base": "what the fine-tuned model's activations at this layer do to the base model's loss on {text}",
}
_PREDICTION_PHRASES = {
    "tuned": "what fine-tuning does at this layer to the predictions there",
    "base": "what they do to its predictions there",
}


def what_it_causes(table: pd.DataFrame, subject: str, source: str = "domain") -> str:
    """`put_back_sentence` of a text; if the loss has no share there, that of the predictions, and of the loss on the
    model's own writing.
    """
    loss, predictions = (put_back_row(table, measure, _N_FEATURES, source=source) for measure in ("loss", "kl"))
    written = put_back_row(table, "loss", _N_FEATURES, source=OWN_WRITING)
    if written is None or loss is None or is_defined(loss["low"]):
        return put_back_sentence(table, subject=subject, source=source)
    if predictions is None or not is_defined(predictions["low"]) or not is_defined(written["low"]):
        return put_back_sentence(table, subject=subject, source=OWN_WRITING)
    text, own = (text_name(where, subject) for where in (source, OWN_WRITING))
    beside, own_beside = (_matched_clause(table, row, {"source": row["source"]}) for row in (predictions, written))
    return (
        f"The {plural(int(written['n_features']), 'feature')} that changed most carry {_share(predictions)} of what"
        f" fine-tuning does at this layer to the predictions on {text} (KL){beside}."
        f" Of what it does to the loss on {own} ({fixed(abs(written['whole']))} nats a token) they carry"
        f" {_share(written)}{own_beside}."
    )


def text_name(source: str, subject: str) -> str:
    """The name of a row's source in a sentence."""
    return "what the fine-tuned model itself writes" if source == OWN_WRITING else f"{subject} text"


def put_back_row(
    table: pd.DataFrame, measure: str, n_features: int | None, kind: str = "own", **where: str
) -> dict[str, Any] | None:
    """The row of `put_back_table` of this measure, set (None: of any number) and kind; None if there is none. `where`
    are further columns: edited ("tuned"), source ("domain"), features ("changed").
    """
    wanted: dict[str, Any] = {"measure": measure, "kind": kind, "edited": "tuned", "source": "domain"}
    wanted |= {"features": "changed"} | where | ({} if n_features is None else {"n_features": n_features})
    fits = np.logical_and.reduce([table[column] == value for column, value in wanted.items()])
    return table.iloc[int(fits.argmax())].to_dict() if fits.any() else None


def put_back_sentence(
    table: pd.DataFrame,
    n_features: int | None = _N_FEATURES,
    *,
    subject: str = "medical",
    called: str = "",
    **where: str,
) -> str:
    """The share of fine-tuning's effect at the hook that features carry, with intervals, beside matched features.

    `n_features` of the most changed (None for a named group) of a `put_back_table`; `subject` names the text, `called`
    the features; `where` as in `put_back_row`. "" if nothing was measured for these features. The sentence says if the
    share is undefined, not clear of zero, or not clearly more than that of matched features.
    """
    rows = {measure: put_back_row(table, measure, n_features, **where) for measure in ("loss", "kl")}
    loss, predictions = rows["loss"], rows["kl"]
    if loss is None or predictions is None:
        return ""
    edited = str(loss["edited"])
    features = called or f"the {plural(int(loss['n_features']), 'feature')} that changed most"
    effect = _LOSS_PHRASES[edited].format(text=text_name(loss["source"], subject))
    verb = "carries" if loss["n_features"] == 1 and not called else "carry"
    features = features.replace("the 1 feature", "the feature")
    if is_defined(loss["low"]):
        text = f"{capital(features)} {verb} {_share(loss)} of {effect} ({fixed(abs(loss['whole']))} nats a token)"
    else:
        text = f"What share {features} {verb} of {effect} cannot be said: {loss['reason']}"
    text += f"{_matched_clause(table, loss, where)}."
    if is_defined(predictions["low"]):
        text += f" Of {_PREDICTION_PHRASES[edited]} (KL) they carry {_share(predictions)}"
        text += f"{_matched_clause(table, predictions, where)}."
    return text


def _matched_clause(table: pd.DataFrame, row: dict[str, Any], where: dict[str, str]) -> str:
    """The share of matched features, and the limits of the comparison; "" if the share itself is undefined."""
    if not is_defined(row["low"]):
        return ""
    n = int(row["n_features"])
    matched, difference = (
        put_back_row(table, str(row["measure"]), n, kind, **where) for kind in ("matched", "difference")
    )
    doubt = "" if row["low"] > 0 else ", so it is not shown that they carry any of it"
    if row["high"] < 0:
        doubt = ": put back, they move it the other way"
    if matched is None or not is_defined(matched["low"]):
        reason = "" if matched is None else f" ({matched['reason']})"
        return doubt + (f"; nothing matched stands beside them{reason}" if matched is not None else "")
    clause = f"; {plural(n, 'matched feature')} {'carries' if n == 1 else 'carry'} {_share(matched)}"
    if not doubt and not (difference is not None and difference["low"] > 0):
        doubt = ", which is not clearly less"
        return clause + doubt
    return doubt + clause


def _share(row: dict[str, Any]) -> str:
    return f"{percent(row['share'], 0)} [{fixed(100 * row['low'], 0)}, {fixed(100 * row['high'], 0)}]"
