"""Verdicts of raters: their agreement, and how often each says yes to a decoy."""

from __future__ import annotations

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.words.numbers import amount_interval, count, percent
from saeffect.review.agreement import agreement, rater_summary
from saeffect.review.verdicts import ADJUDICATION

__all__ = ["agreement_table", "agreement_view", "model_label_view", "rater_table", "rater_view", "review_tables"]

_MEASURES = {
    "percentage": ("Same answer", "pairs of raters, over features"),
    "alpha": ("Krippendorff's alpha", "beyond chance; also where not all judged"),
    "Fleiss' kappa": ("Fleiss' kappa", "beyond chance; features that all judged"),
    "Cohen's kappa": ("Cohen's kappa", "beyond chance; features that both judged"),
}
_SOURCE = "comparison/verdicts.parquet, one row a verdict"


def review_tables(context: ReportContext) -> dict[str, pd.DataFrame]:
    """`raters` and `agreement` (`saeffect.review.agreement`) of a study with verdicts; else empty."""
    if context.verdicts is None:
        return {}
    candidate_features = {
        (name, int(feature))
        for name, arm in context.arms.items()
        for feature in arm.selection.loc[arm.selection["in_vocabulary"], "feature"]
    }
    verdicts = context.verdicts[~context.verdicts["rater"].str.startswith(ADJUDICATION).astype(bool)]
    is_candidate = [key in candidate_features for key in zip(verdicts["arm"], verdicts["feature"], strict=True)]
    judged = verdicts[(verdicts["kind"] == "feature") & pd.Series(is_candidate, index=verdicts.index, dtype=bool)]
    return {"raters": rater_summary(verdicts, candidate_features), "agreement": agreement(judged)}


def rater_table(_comparison: Comparison, context: ReportContext) -> TableView | None:
    """Verdicts of each rater; None for a study without verdicts."""
    tables = review_tables(context)
    return rater_view(tables["raters"]) if tables else None


def agreement_table(_comparison: Comparison, context: ReportContext) -> TableView | None:
    """Agreement over all raters and by pairs; None with fewer than two."""
    tables = review_tables(context)
    return agreement_view(tables["agreement"]) if tables else None


def agreement_view(table: pd.DataFrame, source: str = _SOURCE) -> TableView | None:
    """`saeffect.review.agreement.agreement` as a table."""
    if table.empty:
        return None
    rows = []
    for row in table.to_dict("records"):
        label, sub = _MEASURES[row["measure"]]
        unit = "share" if row["measure"] == "percentage" else ""
        cell = Cell.estimate(row["value"], row["low"], row["high"], unit, reason=row["reason"], sign=False)
        group = f"{row['a']} and {row['b']}" if row["a"] else f"All {row['n_raters']} raters"
        rows.append(Row(label, (cell, Cell(count(row["n"]))), sub=sub, group=group, strong=row["measure"] == "alpha"))
    return TableView(
        name="agreement",
        caption="How far raters agree on the candidates",
        columns=(Column("Agreement", "95 % interval"), Column("Features")),
        rows=tuple(rows),
        corner="Measure",
        stacks=False,
        source=source,
        note=(
            "1 is perfect agreement, 0 what chance gives. Intervals resample features. By Krippendorff's rule of "
            "thumb, alpha from 0.8 is reliable, and below 0.667 nothing should rest on it. Yes, no and unsure are "
            "three answers; decisions by an adjudicator, and verdicts that were not given blind, do not count."
        ),
    )


def rater_view(table: pd.DataFrame, source: str = _SOURCE) -> TableView:
    """`saeffect.review.agreement.rater_summary` as a table."""
    rows = []
    for row in table.to_dict("records"):
        not_blind = f"{count(row['n_not_blind'])} not blind" if row["n_not_blind"] else ""
        cells = [
            Cell(count(row["judged"]), sub=not_blind),
            *(Cell(count(row[f"n_{name}"])) for name in ("yes", "no", "unsure")),
        ]
        for kind in ("other", "shuffled"):
            n, low, high = row[f"{kind}_judged"], row[f"{kind}_low"], row[f"{kind}_high"]
            if not n:
                cells.append(Cell.dash())
                continue
            ends = f"{count(row[f'{kind}_yes'])} of {count(n)} · {amount_interval(low, high, 'share')}"
            cells.append(Cell(percent(row[f"{kind}_rate"]), sub=ends))
        rows.append(Row(str(row["rater"]), tuple(cells)))
    return TableView(
        name="raters",
        caption="What each rater said, and how often to a decoy",
        columns=(
            *(Column(name) for name in ("Candidates", "Yes", "No", "Unsure")),
            Column("Yes to other features", "false positives"),
            Column("Yes to shuffled tokens", "false positives"),
        ),
        rows=tuple(rows),
        corner="Rater",
        source=source,
        note=(
            "Decoys looked like candidates and came among them: features without a word of the vocabulary, and top "
            "tokens drawn from ten different candidates. A rater who says yes to many of them says little by a yes."
        ),
    )


def model_label_view(table: pd.DataFrame, source: str) -> TableView | None:
    """A language model's labels (as `saeffect.study.label`) beside one rater's: also tokens, verdict, own."""
    rows = [
        Row(
            row["label"],
            (
                Cell.words(row["verdict"], sub=row["own"]),
                Cell.estimate(row["accuracy"], row["low"], row["high"], reason=row["reason"], sign=False),
            ),
            sub=row["tokens"],
        )
        for row in table.to_dict("records")
        if row["label"]
    ]
    if not rows:
        return None
    return TableView(
        name="model_labels",
        caption="Your verdicts beside a language model's labels",
        columns=(Column("You said", is_text=True), Column("Detection", "95 % interval")),
        rows=tuple(rows),
        corner="Label by a language model",
        source=source,
        note=(
            "Detection: told only the label, the model says which of some contexts activate the feature; balanced "
            "accuracy, 0.5 is chance. These labels count for no verdict, and nobody sees them before judging."
        ),
    )
