from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd

from saeffect.report import ReportContext
from saeffect.report.tables.evidence import threat_table
from saeffect.report.threat_view import gravest, threat_summary


def found(*severities: str) -> Any:
    rows = [(one, f"threat {i}", f"remedy {i}", f"source {i}") for i, one in enumerate(severities)]
    return SimpleNamespace(threats=pd.DataFrame(rows, columns=["severity", "threat", "remedy", "source"]))


def test_what_how_serious_and_what_to_do() -> None:
    view = threat_table(found("serious", "minor"), ReportContext())
    assert view is not None
    first = view.rows[0]
    assert (first.label, first.strong, first.cells[0].text, first.cells[1].text) == (
        "Serious",
        True,
        "threat 0",
        "remedy 0",
    )
    assert first.cells[1].sub == "seen in source 0"
    assert not view.rows[1].strong


def test_the_summary_counts() -> None:
    assert threat_summary(found("serious", "moderate", "minor", "minor")).text.startswith(
        "1 serious, 1 moderate and 2 minor"
    )
    assert "overturn" in threat_summary(found("minor")).text
    assert "overturn" not in threat_summary(found("serious")).text
    assert threat_summary(SimpleNamespace(threats=pd.DataFrame())).total == 0  # type: ignore[arg-type]


def test_the_gravest_are_quoted() -> None:
    assert gravest(found("serious", "moderate", "minor"), []) == ["threat 0"]
    assert gravest(found(*["minor"] * 5), []) == ["threat 0", "threat 1", "threat 2"]
    assert gravest(SimpleNamespace(threats=pd.DataFrame()), ["a", "b"], 1) == ["a"]  # type: ignore[arg-type]
