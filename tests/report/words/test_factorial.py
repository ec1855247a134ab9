"""One sentence a quantity on model and SAE, and their picture."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from saeffect.comparison.factorial import CROSSED, EFFECTS, FACTORIAL_COLUMNS, no_factorial
from saeffect.errors import Undefined
from saeffect.report import ReportContext
from saeffect.report.figures.learned import crossed
from saeffect.report.words.causes import crossed_sentences, factorial_sentences
from synthetic_where import with_tables


def rows(quantity: str, **effects: tuple[float, float, float]) -> pd.DataFrame:
    """A table with these estimates and intervals; the other effects are 0 [−0.1, 0.1]."""
    known, found = CROSSED[quantity], []
    for effect in EFFECTS:
        value, low, high = effects.get(effect, (0.0, -0.1, 0.1))
        row: dict[str, Any] = dict.fromkeys(FACTORIAL_COLUMNS, math.nan)
        row |= {"quantity": quantity, "label": known.label, "unit": known.unit, "effect": effect, "reason": ""}
        found.append(row | {"estimate": value, "low": low, "high": high, "n_nulls": 0})
    return pd.DataFrame(found)


def said(table: pd.DataFrame) -> str:
    (sentence,) = factorial_sentences(table).values()
    return sentence


def test_a_clear_effect_of_the_model() -> None:
    table = rows("direct_effect", model=(-0.82, -0.9, -0.74), dictionary=(0.01, -0.2, 0.22))
    assert said(table) == (
        "With one and the same SAE, features push their tokens 0.82 nats less in the fine-tuned model"
        " [−0.900, −0.740]; which SAE is used makes a difference of +0.010 nats [−0.200, 0.220]."
    )
    table.loc[0, ["null_p", "n_nulls"]] = [1 / 3, 2]
    assert "with the control's SAE, p = 0.333 among 2 null fine-tunes;" in said(table)


def test_effects_without_nulls_are_not_credited() -> None:
    table = rows("direct_effect", model=(-0.82, -0.9, -0.74))
    assert "any further training does the same is not known" in crossed_sentences(table)[-1]
    table.loc[0, "n_nulls"] = 2
    assert len(crossed_sentences(table)) == 1
    assert len(crossed_sentences(no_factorial(["coherence"], "the models differ in width"))) == 1


def test_what_may_be_chance_is_said_to_be() -> None:
    sentence = said(rows("density", model=(0.0004, -0.001, 0.0018), dictionary=(0.02, 0.01, 0.03)))
    assert "features fire on 0.040 percentage points more of the tokens in the fine-tuned model" in sentence
    assert ", which may be chance;" in sentence
    assert "makes a difference of +2.0 percentage points [1.0, 3.0]" in sentence


def test_no_difference_and_no_measurement() -> None:
    same = said(rows("coherence", model=(0.0, math.nan, math.nan)))
    assert same.startswith("With one and the same SAE, coherence is the same in both models;")
    missing = factorial_sentences(no_factorial(["coherence"], "the models differ in width"))
    assert missing["coherence"] == "Coherence: model and SAE cannot be told apart (the models differ in width)."


@pytest.mark.parametrize("quantity", list(CROSSED))
def test_every_quantity_has_its_words(quantity: str) -> None:
    more, less = (said(rows(quantity, model=(sign * 0.5, -2.0, 2.0))) for sign in (1, -1))
    assert "more" in more
    assert "less" in less or "fewer" in less
    assert "{" not in more + less


def test_the_picture_has_a_mark_for_each_estimate() -> None:
    table = pd.concat(
        [rows("direct_effect", model=(-0.8, -0.9, -0.7)), rows("coherence", rest=(0.0, math.nan, math.nan))]
    )
    drawn = crossed(with_tables({"factorial": table}), ReportContext())
    panels = drawn.figure.axes
    assert [ax.get_title(loc="left") for ax in panels] == [
        CROSSED[name].label for name in ("direct_effect", "coherence")
    ]
    squares = [line for line in panels[0].lines if line.get_marker() == "s"]
    assert [float(line.get_xdata()[0]) for line in squares] == [-0.8]
    ends = [tuple(line.get_xdata()) for line in panels[0].lines if len(line.get_xdata()) == 2]
    assert (-0.9, -0.7) in ends
    hollow = [line for line in panels[1].lines if line.get_marker() == "|"]
    assert hollow[0].get_markerfacecolor() == "none"
    assert "features push their tokens 0.80 nats less" in drawn.alt
    unknown = no_factorial(["coherence"], "the models differ in width")
    with pytest.raises(Undefined, match="differ in width"):
        crossed(with_tables({"factorial": unknown}), ReportContext())


def test_thousands_are_written_whole() -> None:
    clear, large = (-0.82, -0.91, -0.71), (1234.5, 1100.0, 1400.0)
    assert "makes a difference of +1,234.500 nats [1,100.000, 1,400.000]" in said(
        rows("direct_effect", model=clear, dictionary=large)
    )
