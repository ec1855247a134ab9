"""Does steering beat a prompt that names the concept, and a plain difference of means?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext, SteeringResults
from saeffect.report.outcome_summary import baseline_summary
from saeffect.report.tables.view import Cell, Column, Row, TableView
from saeffect.report.words.names import (
    control_words,
    effect_text,
    feature_names,
    interval_text,
    level_text,
    outcome_words,
)
from saeffect.report.words.numbers import count, is_defined, undefined

__all__ = ["baseline_sentences", "baseline_table", "yardstick"]

_SIMPLER: Mapping[str, str] = {
    "prompt": "simply asking (a prompt that names the concept)",
    "mean_difference": "an equal push along a plain difference of means",
}


def yardstick(results: SteeringResults) -> str:
    """The outcome that steering and baselines are compared on: the first declared one that both have.

    The direct effect is none: a baseline has texts only.
    """
    found = [str(name) for table in results.baseline_effects.values() for name in dict.fromkeys(table["outcome"])]
    return next(iter(results.in_order(list(dict.fromkeys(found)))), "")


def baseline_sentences(comparison: Comparison, context: ReportContext) -> tuple[str, ...]:
    """One plain sentence a baseline, over the features of all arms; none where no baseline was run."""
    results = context.steering
    if results is None or not yardstick(results):
        return ()
    if results.operator == "ablate":
        return (
            "An ablation takes a concept away and these baselines bring it up, so they are no yardstick for it; "
            "they show how much of the concept there could be.",
        )
    table = baseline_summary(results, [str(name) for name in comparison.table1["arm"]])
    table = table[table["outcome"] == yardstick(results)]
    return tuple(
        _sentence(str(baseline), table[table["baseline"] == baseline], yardstick(results))
        for baseline in dict.fromkeys(table["baseline"])
    )


def _sentence(baseline: str, rows: pd.DataFrame, outcome: str) -> str:
    """The verdict first, then the counts on both sides: nobody sees only the flattering one."""
    n, above, below = (int(rows[name].sum()) for name in ("n_defined", "n_above", "n_below"))
    clear_above, clear_below = (int(rows[name].sum()) for name in ("n_clearly_above", "n_clearly_below"))
    what = _SIMPLER.get(baseline, control_words(baseline))
    title = outcome_words(outcome).title
    if not n:
        reason = next((str(r) for r in rows["reason"] if r), "no reason was recorded")
        return f"Whether steering does more than {what} cannot be said: {reason}."
    if above > below and clear_above > clear_below:
        verdict = f"Steering is stronger than {what}"
    elif below > above and clear_below > clear_above:
        verdict = f"Steering is weaker than {what}"
    else:
        verdict = f"Steering is neither clearly stronger nor clearly weaker than {what}"
    of = "the one feature compared" if n == 1 else f"{count(n)} features"
    return (
        f"{verdict}: by {title}, of {of} it is stronger on {count(above)} (clearly on {count(clear_above)}) and "
        f"weaker on {count(below)} (clearly on {count(clear_below)}). Clearly: the 95 % interval excludes zero."
    )


def baseline_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """One row per arm and feature: unsteered, steered, each baseline and the difference; None without baselines."""
    results = context.steering
    outcome = yardstick(results) if results is not None else ""
    if results is None or not outcome:
        return None
    tables = {str(arm): results.baseline_effects.get(str(arm)) for arm in comparison.table1["arm"]}
    shown = {arm: table[table["outcome"] == outcome] for arm, table in tables.items() if table is not None}
    baselines = [str(b) for b in dict.fromkeys(pd.concat(list(shown.values()))["baseline"])]
    columns = [Column("Unsteered"), Column("Steered")]
    for baseline in baselines:
        title = control_words(baseline)
        columns += [Column(f"{title[0].upper()}{title[1:]}"), Column(f"Steered − {_short(baseline)}", "95 % interval")]
    rows = []
    for arm, table in shown.items():
        names = feature_names(context, arm)
        for feature, some in table.groupby("feature"):
            cells = _cells(some, baselines, outcome)
            rows.append(Row(f"{feature}", cells, sub=names.get(int(feature), ""), group=arm))  # type: ignore[call-overload]
    title = outcome_words(outcome).title
    tag = "declared" if results.declared(outcome) else "exploratory"
    return TableView(
        name="baselines",
        caption=f"Does steering beat simpler means? {title[0].upper()}{title[1:]} of the texts ({tag})",
        columns=tuple(columns),
        rows=tuple(rows),
        corner="Feature",
        stacks=True,
        note=(
            "A random sample of the tested features, drawn before the test. A negative difference: the simpler means "
            "brought the texts nearer to the concept than steering with the feature did."
        ),
        source=(
            f"arms/*/baseline_effects.parquet, rows with outcome = {outcome}, columns unsteered_mean, steered_mean, "
            "baseline_mean, effect, low, high; the other outcomes are in tables/steering_baselines.csv"
        ),
    )


def _short(baseline: str) -> str:
    return {"prompt": "prompt", "mean_difference": "means"}.get(baseline, control_words(baseline))


def _cells(some: pd.DataFrame, baselines: Sequence[str], outcome: str) -> tuple[Cell, ...]:
    by_baseline = some.set_index("baseline")
    first: Mapping[Any, Any] = next(
        (row for row in some.to_dict("records") if is_defined(row["steered_mean"])), some.iloc[0].to_dict()
    )
    cells = [_mean(first, name, outcome) for name in ("unsteered_mean", "steered_mean")]
    for baseline in baselines:
        if baseline not in by_baseline.index:
            cells += [Cell("not run", tone="muted", is_text=True)] * 2
            continue
        row = by_baseline.loc[baseline]
        if not is_defined(row["effect"]):
            cells += [Cell("undefined", tone="muted"), Cell(undefined(str(row["reason"])), tone="muted", is_text=True)]
            continue
        cells.append(_mean(row, "baseline_mean", outcome))
        cells.append(Cell(effect_text(row["effect"], outcome), sub=interval_text(row["low"], row["high"], outcome)))
    return tuple(cells)


def _mean(row: Mapping[Any, Any] | pd.Series[Any], name: str, outcome: str) -> Cell:
    return Cell(level_text(row[name], outcome), tone="" if is_defined(row[name]) else "muted")
