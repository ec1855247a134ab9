"""One sentence a quantity: what the model does with the same SAE, and what the SAE does in the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeffect.report.words.numbers import bracketed, fixed, is_defined, p_value, percent, plural
from saeffect.stats.estimate import Estimate

__all__ = ["factorial_estimate", "factorial_sentence", "factorial_sentences"]

# What is said of the fine-tuned model where it has more, and less: {x} is the size of the change.
_MORE_AND_LESS = {
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
_UNNAMED = ("{q} is {x} higher", "{q} is {x} lower")
_UNITS = {
    **dict.fromkeys(("share", "share of tokens"), "percentage points"),
    **dict.fromkeys(("activation", "coherence", "cosine similarity"), ""),
}


def factorial_sentences(table: pd.DataFrame) -> dict[str, str]:
    """By quantity, one sentence on the rows of `saeffect.comparison.factorial`, in their order."""
    return {str(name): factorial_sentence(rows) for name, rows in table.groupby("quantity", sort=False)}


def factorial_sentence(rows: pd.DataFrame) -> str:
    """What the model does and what the SAE does, for the four rows of one quantity."""
    by_effect = {str(row["effect"]): row for row in rows.to_dict("records")}
    model, dictionary = by_effect["model"], by_effect["dictionary"]
    name = str(model["label"])
    if not is_defined(model["estimate"]):
        return f"{name}: model and SAE cannot be told apart ({model['reason'] or 'no reason was recorded'})."
    said = _of_model(model)
    if is_defined(model["null_p"]):
        nulls = plural(int(model["n_nulls"]), "null fine-tune")
        said += f"; with the control's SAE, p = {p_value(model['null_p'])} among {nulls}"
    return f"With one and the same SAE, {said}; which SAE is used makes a difference of {_size(dictionary)}."


def factorial_estimate(row: Mapping[Any, Any]) -> Estimate:
    """A row as an `Estimate`, shares of tokens as shares are written."""
    value, low, high, p = (float(row[name]) for name in ("estimate", "low", "high", "p"))
    return Estimate(value, low, high, p=p)


def _of_model(row: Mapping[Any, Any]) -> str:
    found, name = factorial_estimate(row), str(row["label"])
    if not found.value and not found.defined:
        return f"{name.lower() if name[1:2].islower() else name} is the same in both models"
    more, less = _MORE_AND_LESS.get(str(row["quantity"]), _UNNAMED)
    size = _amount(abs(found.value), str(row["unit"]))
    said = (more if found.value > 0 else less).format(x=size, q=name.lower())
    said += f" in the fine-tuned model{_ends(row)}"
    return said if found.sign or not found.defined else f"{said}, which may be chance"


def _size(row: Mapping[Any, Any]) -> str:
    found, unit = factorial_estimate(row), _written(row)
    if not is_defined(found.value):
        return f"an unknown size ({row['reason']})"
    value = bracketed(found, unit).partition(" [")[0].removesuffix(", without an interval")
    return value + _unit_after(str(row["unit"])) + _ends(row)


def _ends(row: Mapping[Any, Any]) -> str:
    """The interval in brackets, in the unit of the number before it."""
    found = factorial_estimate(row)
    if not found.defined:
        return " (without an interval)"
    return " [" + bracketed(found, _written(row)).partition(" [")[2]


def _written(row: Mapping[Any, Any]) -> str:
    return "share" if str(row["unit"]).startswith("share") else str(row["unit"])


def _unit_after(unit: str) -> str:
    named = _UNITS.get(unit, unit)
    return f" {named}" if named else ""


def _amount(size: float, unit: str) -> str:
    if unit.startswith("share"):
        return percent(size, 1 if size >= 0.01 else 3).rstrip("%").rstrip() + " percentage points"
    digits = 2 if size >= 0.1 else 3
    return fixed(size, digits) + _unit_after(unit)
