"""The registry of terms: what tables name is known, and one more is one entry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from saeffect.comparison import Comparison
from saeffect.errors import ConfigError
from saeffect.report import ReportContext, render_report
from saeffect.report.tables import TABLES
from saeffect.report.words.names import Term, _registry, add_term, terms


def test_every_term_of_a_table_is_known(comparison: Comparison, context: ReportContext) -> None:
    views = [make(comparison, context) for make in TABLES.values()]
    used = {key for view in views if view is not None for key in view.terms}
    assert used <= set(terms(context))
    assert all("{" not in term.meaning for term in terms(context).values())


def test_a_term_from_outside_stands_in_the_glossary(
    comparison: Comparison, context: ReportContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_registry(), "ghost", Term("", ""))  # so that what is added here is gone after the test
    del _registry()["ghost"]
    add_term("ghost", Term("ghost feature", "a {domain} feature at q ≤ {alpha:g} that nobody trained."))
    page = render_report(comparison, context=replace(context, alpha=0.1), figures=())
    glossary = page[page.index('id="methods"') :]
    assert "<dt>ghost feature</dt><dd>a medical feature at q ≤ 0.1 that nobody trained.</dd>" in glossary
    with pytest.raises(ConfigError, match="a term 'ghost' already"):
        add_term("ghost", Term("", ""))
