from __future__ import annotations

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report import ReportContext, render_report, write_tables
from saeffect.report.tables import TABLES
from saeffect.report.tables.review import review_tables
from saeffect.review.verdicts import ADJUDICATION


def said(arms: dict) -> pd.DataFrame:
    """Two raters on every candidate of the control; both say yes to one of two decoys; one decision."""
    selection = arms["control"].selection
    chosen = selection.loc[selection["in_vocabulary"], "feature"].tolist()
    other = int(selection.loc[~selection["in_vocabulary"], "feature"].iloc[0])
    rows = [("control", int(f), who, "yes" if f % 2 else "no", "feature") for f in chosen for who in ("ann", "ben")]
    rows += [("control", other, who, "yes", "feature") for who in ("ann", "ben")]
    rows += [("control", 0, who, "no", "shuffled") for who in ("ann", "ben")]
    rows.append(("control", int(chosen[0]), f"{ADJUDICATION} cy", "yes", "feature"))
    table = pd.DataFrame(rows, columns=["arm", "feature", "rater", "verdict", "kind"])
    return table.assign(label="", note="")


def test_a_study_without_verdicts_has_no_such_tables(comparison: Comparison, arms: dict) -> None:
    context = ReportContext(arms=arms)
    assert review_tables(context) == {}
    assert TABLES["raters"](comparison, context) is None and TABLES["agreement"](comparison, context) is None


def test_raters_their_false_positives_and_agreement(comparison: Comparison, arms: dict, tmp_path) -> None:
    context = ReportContext(arms=arms, verdicts=said(arms))
    raters = TABLES["raters"](comparison, context)
    assert [row.label for row in raters.rows] == ["ann", "ben"]
    shown = [cell.text for cell in raters.rows[0].cells]
    assert shown[-2].startswith("100") and shown[-1].startswith("0")
    assert "1 of 1" in raters.rows[0].cells[-2].sub
    agreed = TABLES["agreement"](comparison, context)
    assert [row.cells[0].text.strip() for row in agreed.rows][-1] == "1.000"
    assert "agree on everything" in agreed.rows[-1].cells[0].sub
    page = render_report(comparison, context=context, figures=[])
    assert page.index('id="table-contrasts"') < page.index('id="table-raters"') < page.index('id="table-agreement"')
    assert page.index('id="features"') < page.index('id="table-raters"')
    names = {path.name for path in write_tables(comparison, tmp_path, context=context)}
    assert {"raters.csv", "agreement.csv", "raters.json", "agreement.json"} <= names
