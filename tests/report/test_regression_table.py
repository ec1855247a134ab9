from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from saeffect.report import ReportContext
from saeffect.report.tables.evidence import coherence_sentence, regression_table

NAN = float("nan")


def found(estimate: float = 0.2, low: float = 0.1, high: float = 0.3, reason: str = "", errors: str = "HC3") -> Any:
    rows = [("intercept", 0.05, 0.0, 0.1, 0.5, ""), ("coherence", estimate, low, high, 0.01, reason)]
    table = pd.DataFrame(rows, columns=["term", "estimate", "low", "high", "p", "reason"])
    return SimpleNamespace(regression=table.assign(n=40, errors=errors, n_left_out=2))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.2, 0.1, 0.3), "Yes, here more coherent features have stronger effects: a coherence higher by 0.1 goes with an "
         "effect larger by 0.020 [0.010, 0.030]"),
        ((-0.2, -0.3, -0.1), "more coherent features have weaker effects"),
        ((0.2, -0.1, 0.3), "It cannot be said: a coherence higher by 0.1 goes with a change of the effect of +0.020"),
        ((0.2, NAN, NAN), "has no interval"),
    ],
)  # fmt: skip
def test_the_open_question(numbers: tuple[float, float, float], words: str) -> None:
    assert words in coherence_sentence(found(*numbers))


def test_why_it_cannot_be_said() -> None:
    assert coherence_sentence(found(NAN, NAN, NAN, "coherence is the same in every feature")).endswith(
        "cannot be said: coherence is the same in every feature."
    )
    assert "no feature was steered" in coherence_sentence(SimpleNamespace(regression=pd.DataFrame()))  # type: ignore[arg-type]


def test_terms_and_errors() -> None:
    view = regression_table(found(), ReportContext())
    assert view is not None
    assert [row.label for row in view.rows] == ["Intercept", "Coherence"]
    assert (view.rows[1].cells[0].text, view.rows[1].cells[0].sub) == ("+0.200", "[0.100, 0.300]")
    assert "HC3 errors" in view.note
    assert "2 without a coherence or an activity are left out." in view.note
    clustered = regression_table(found(errors="clustered by SAE"), ReportContext())
    assert clustered is not None
    assert "clustered by SAE" in clustered.note
    flat = regression_table(found(NAN, NAN, NAN, "flat"), ReportContext())
    assert flat is not None
    assert flat.rows[1].cells[0].text == "undefined: flat"
    assert regression_table(SimpleNamespace(regression=pd.DataFrame()), ReportContext()) is None  # type: ignore[arg-type]
