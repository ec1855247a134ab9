"""Calibration, chance, power and regression as tables and sentences."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from saeffect.comparison import Comparison
from saeffect.report import ReportContext
from saeffect.report.tables.evidence import (
    calibration_table,
    chance_table,
    power_table,
    regression_table,
)
from saeffect.report.words.evidence import calibration_verdict, coherence_sentence

NAN = float("nan")


def calibration(**more: Any) -> pd.DataFrame:
    """One declared test that keeps its promise, one that does not, one with few trials, one that nobody could try."""
    rows = [
        ("domain_share", "p at most alpha", 1000, 20, 0.012, 0.031, "within nominal", True, ""),
        ("pass_rate", "the interval excludes zero", 6, 4, 0.30, 0.90, "more alarms than nominal", True, ""),
        ("effect", "the interval excludes zero", 3, 0, 0.0, 0.56, "within nominal", False, ""),
        ("fates", "more than SAE noise", 0, 0, NAN, NAN, "cannot be judged", False, "it needs three SAEs"),
    ]
    columns = ["test", "rule", "tests", "findings", "low", "high", "verdict", "declared", "reason"]
    table = pd.DataFrame(rows, columns=columns)
    table["rate"] = table["findings"] / table["tests"].where(table["tests"] > 0)
    table = table.assign(nominal=0.05, unit="features", treatment_tests=1, treatment_findings=1)
    return table.assign(**more)


def found(table: pd.DataFrame) -> Any:
    return SimpleNamespace(calibration=table)


def texts(view: Any, row: int) -> list[str]:
    return [cell.text for cell in view.rows[row].cells]


def test_verdict_needs_an_interval_within_nominal() -> None:
    view = calibration_table(found(calibration()), ReportContext())
    assert view is not None
    assert [row.label for row in view.rows] == ["Share of domain features", "Pass rate", "Mean effect"]
    kept, broken, few = (row.cells[2] for row in view.rows)
    assert (kept.text, kept.tone) == ("keeps its promise", "good")
    assert (broken.text, broken.tone) == ("too many alarms", "warn")
    assert (few.text, few.tone, few.sub) == ("no excess seen", "", "too few trials to be sure")
    assert texts(view, 1)[0] == "4 of 6"
    assert "[30.0, 90.0]" in view.rows[1].cells[0].sub
    assert [row.strong for row in view.rows] == [True, True, False]
    assert view.rows[0].sub == "p ≤ 0.05"


def test_untried_tests_are_listed_with_a_reason() -> None:
    view = calibration_table(found(calibration()), ReportContext())
    assert view is not None
    assert "Could not be tried: fates, more than SAE noise (it needs three SAEs)." in view.note
    declared = calibration_table(found(calibration(declared=True)), ReportContext())
    assert declared is not None
    assert texts(declared, 3)[0] == "undefined: it needs three SAEs"
    assert texts(declared, 3)[2] == "cannot be judged"


def test_the_verdict_in_a_sentence() -> None:
    assert calibration_verdict(calibration()).startswith("Not to be believed")
    assert "pass rate (the interval excludes zero)" in calibration_verdict(calibration())
    fine = calibration(verdict="within nominal", unit="pairs of SAEs").iloc[[2]]
    assert calibration_verdict(fine).startswith("No test raised more false alarms than it promises. Between")
    assert "it needs three SAEs" in calibration_verdict(calibration().iloc[[3]])
    untried = calibration().assign(declared=[False, False, False, True])
    assert calibration_verdict(untried) == (
        "It cannot be said how often the declared tests raise false alarms: it needs three SAEs."
    )
    assert "was not measured" in calibration_verdict(pd.DataFrame())
    assert calibration_table(found(pd.DataFrame()), ReportContext()) is None


@pytest.mark.parametrize(
    ("numbers", "expected", "reading"),
    [
        ((25, 18, 12, 24, False), ("18", "[12, 24]"), "more than chance"),
        ((20, 18, 12, 24, False), ("18", "[12, 24]"), "what chance gives"),
        ((5, 18, 12, 24, False), ("18", "[12, 24]"), "less than chance"),
        ((24, 1.2, NAN, NAN, True), ("at most 1.2", ""), "more"),
        ((0, 0.0, NAN, NAN, True), ("at most 0", ""), "no more"),
        ((24, 20, NAN, NAN, False), ("20", "one SAE"), "not comparable"),
    ],
)
def test_found_beside_chance(numbers: tuple[float, ...], expected: tuple[str, str], reading: str) -> None:
    columns = ["found", "expected", "low", "high", "bound"]
    reason = "one SAE" if reading == "not comparable" else ""
    row = {**dict(zip(columns, numbers, strict=True)), "finding": "x", "among": 36, "chance": "c", "reason": reason}
    view = chance_table(SimpleNamespace(by_chance=pd.DataFrame([row])), ReportContext())  # type: ignore[arg-type]
    assert view is not None
    cells = view.rows[0].cells
    assert (cells[1].text, cells[1].sub) == expected
    assert cells[2].text == reading
    assert cells[0].sub == "of 36"


def test_power_reads_what_was_seen_against_what_could_be(comparison: Comparison) -> None:
    view = power_table(comparison, ReportContext())
    assert view is not None
    shares = comparison.power.set_index("test").loc["domain_share"]
    cells = view.rows[0].cells
    assert cells[0].text.startswith(f"{100 * shares['detectable']:.1f}")
    seen = (
        "large enough to be found" if shares["observed"] >= shares["detectable"] else "too small to be found reliably"
    )
    assert cells[3].text == seen
    unknown = replace(comparison, power=comparison.power.assign(detectable=NAN, reason="no spread"))
    view = power_table(unknown, ReportContext())
    assert view is not None
    assert texts(view, 0)[0] == "undefined: no spread"
    assert texts(view, 0)[3] == "cannot be said"
    assert power_table(replace(comparison, power=pd.DataFrame()), ReportContext()) is None


def regressed(estimate: float = 0.2, low: float = 0.1, high: float = 0.3, reason: str = "", errors: str = "HC3") -> Any:
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
    assert words in coherence_sentence(regressed(*numbers).regression)


def test_why_it_cannot_be_said() -> None:
    assert coherence_sentence(regressed(NAN, NAN, NAN, "coherence is the same in every feature").regression).endswith(
        "cannot be said: coherence is the same in every feature."
    )
    assert "no feature was steered" in coherence_sentence(pd.DataFrame())


def test_terms_and_errors() -> None:
    view = regression_table(regressed(), ReportContext())
    assert view is not None
    assert [row.label for row in view.rows] == ["Intercept", "Coherence"]
    assert (view.rows[1].cells[0].text, view.rows[1].cells[0].sub) == ("+0.200", "[0.100, 0.300]")
    assert "HC3 errors" in view.note
    assert "2 without a coherence or an activity are left out." in view.note
    clustered = regression_table(regressed(errors="clustered by SAE"), ReportContext())
    assert clustered is not None
    assert "clustered by SAE" in clustered.note
    flat = regression_table(regressed(NAN, NAN, NAN, "flat"), ReportContext())
    assert flat is not None
    assert flat.rows[1].cells[0].text == "undefined: flat"
    assert regression_table(SimpleNamespace(regression=pd.DataFrame()), ReportContext()) is None  # type: ignore[arg-type]
