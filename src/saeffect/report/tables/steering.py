"""Results of steering: outcomes against controls, baselines, features steered at once, and the dose search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison
from saeffect.report.context import ReportContext, SteeringResults, baseline_summary, outcome_summary
from saeffect.report.tables.view import Cell, Column, Row, TableView, arm_columns
from saeffect.report.words.names import capital, dose_axis, effect_text, feature_names, interval_text, level_text
from saeffect.report.words.numbers import amount_interval, count, is_defined, is_true, p_value, percent
from saeffect.steering.outcomes import OUTCOMES
from saeffect.steering.placebos import BASELINES, PLACEBOS, SHUFFLED, STEERED, control_label

__all__ = ["baseline_sentences", "baseline_table", "dose_table", "outcome_pairs", "outcome_table", "together_table"]


def outcome_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """Every outcome and control, one column per arm; None if no outcome was recorded."""
    results, arms = context.steering, comparison.table1
    if results is None:
        return None
    table = outcome_summary(results, list(comparison.table1["arm"]), alpha=context.alpha)
    if table.empty:
        return None
    controls = set(table["control"])
    rows = list(_pass_rows(arms, table))
    by_outcome: dict[str, dict[str, dict[str, Mapping[Any, Any]]]] = {}
    for row in table.to_dict("records"):
        by_outcome.setdefault(str(row["outcome"]), {}).setdefault(str(row["control"]), {})[row["arm"]] = row
    deciding = set(zip(table.loc[table["decides"], "outcome"], table.loc[table["decides"], "control"], strict=True))
    for outcome, by_control in by_outcome.items():
        definition, decides = OUTCOMES[outcome], any(name == outcome for name, _ in deciding)
        declared = "declared" if results.declared(outcome) else "exploratory"
        for control, by_arm in by_control.items():
            rows.append(
                Row(
                    f"… {control_label(control)}",
                    tuple(_outcome_cell(by_arm.get(arm), outcome) for arm in arms["arm"]),
                    strong=(outcome, control) in deciding,
                    group=f"{capital(definition.label)} ({definition.effect_unit})",
                    tag="declared, decides" if decides else declared,
                )
            )
    return TableView(
        name="outcomes",
        caption=(
            "Every outcome of steering against every control: mean effect [95 % interval], and features with "
            f"q\u00a0≤\u00a0{context.alpha:g}"
        ),
        columns=arm_columns(arms),
        rows=tuple(rows),
        corner="Steered minus …",
        stacks=False,
        note=_no_interval_note(table)
        + (
            "Means over an arm's features; intervals are Student's t over features, where [[table:table1]] has the "
            "bootstrap's. Outcomes without a direction (KL, perplexity, distinct-2) are tested two-sided: there, q "
            "counts features that changed them, either way. Only the control in bold under the deciding outcome "
            "decides what passes."
        ),
        source=(
            "arms/*/outcome_effects.parquet, rows by outcome and placebo, columns effect and q; the first two rows "
            "arms/*/effects.parquet, columns passed and paper_pass. Summed up in tables/steering_outcomes.csv"
        ),
        terms=(
            *("declared", "exploratory"),
            *(name for name in (*PLACEBOS, SHUFFLED) if name in controls),
            *("reversed", "paper_rule"),
            *(name for name in dict.fromkeys(table["outcome"]) if name != "similarity"),
        ),
    )


def _no_interval_note(table: pd.DataFrame) -> str:
    no_interval = table[table["mean"].notna() & table["low"].isna()]
    if no_interval.empty:
        return ""
    if (no_interval["n_defined"] == 1).all():
        return "No interval: one feature alone shows no spread. "
    return "No interval: every feature of the arm has the same effect. "


def _pass_rows(arms: pd.DataFrame, table: pd.DataFrame) -> Sequence[Row]:
    reversed_share = table[table["decides"]].drop_duplicates("arm").set_index("arm")["reversed_share"]
    our_test, paper_rule, reversals = [], [], []
    for row in arms.to_dict("records"):
        our_test.append(_rate(row["passed"], row["tested"], row["pass_low"], row["pass_high"]))
        paper_rule.append(_rate(row["paper_passed"], row["tested"]))
        reversals.append(Cell.value(reversed_share.get(row["arm"]), "share", reason="no feature was tested"))
    group, tag = "Features that pass", "declared"
    return (
        Row("Our test", tuple(our_test), sub="against the placebo, q corrected", strong=True, group=group, tag=tag),
        Row("The paper's rule", tuple(paper_rule), sub="a coin passes half", group=group, tag=tag),
        Row("Prompts where the effect reverses", tuple(reversals), sub="mean over features", group=group, tag=tag),
    )


def _rate(passed: int, tested: int, low: object = None, high: object = None) -> Cell:
    if not tested:
        return Cell.undefined("no feature was tested")
    ends = f" {amount_interval(low, high, 'share')}" if is_defined(low) and is_defined(high) else ""
    return Cell(percent(passed / tested) + ends, sub=f"{count(passed)} of {count(tested)}")


def _outcome_cell(row: Mapping[Any, Any] | None, outcome: str) -> Cell:
    if row is None:
        return Cell.undefined("no feature of this arm was tested")
    if not is_defined(row["mean"]):
        return Cell.undefined(row["reason"])
    text = f"{effect_text(row['mean'], outcome)} {interval_text(row['low'], row['high'], outcome)}"
    passed = f"{count(row['n_passed'])} of {count(row['n_tested'])}" if row["n_tested"] else "none tested"
    return Cell(text, sub=passed)


def outcome_pairs(
    context: ReportContext, arm: str, features: Sequence[int]
) -> Mapping[int, tuple[tuple[str, str], ...]]:
    """By feature, pairs for its card: deciding outcome minus every control, other outcomes minus the deciding one."""
    results = context.steering
    if results is None or arm not in results.outcome_effects:
        return {}
    difference = f"steered − {control_label(results.placebo)}"
    effects = results.outcome_effects[arm]
    pairs_by_feature: dict[int, tuple[tuple[str, str], ...]] = {}
    for feature, rows in _rows_by_feature(effects[effects["feature"].isin(features)]).items():
        deciding: list[str] = []
        declared: list[str] = []
        exploratory: list[str] = []
        for row in rows:
            outcome, definition = str(row["outcome"]), OUTCOMES[str(row["outcome"])]
            text = effect_text(row["effect"], outcome)
            if outcome == results.deciding:
                ends = f" {interval_text(row['low'], row['high'], outcome)}" if is_defined(row["low"]) else ""
                deciding.append(f"{control_label(row['placebo'])} {text}{ends}")
            elif row["placebo"] == results.placebo:
                unit = " nats" if "nats" in definition.effect_unit and is_defined(row["effect"]) else ""
                (declared if results.declared(outcome) else exploratory).append(f"{definition.label} {text}{unit}")
        pairs = (
            (f"{capital(OUTCOMES[results.deciding].label)}: steered minus …", "; ".join(deciding)),
            (f"Other declared outcomes: {difference}", ", ".join(declared)),
            (f"Exploratory outcomes: {difference}", ", ".join(exploratory)),
        )
        pairs_by_feature[feature] = tuple(pair for pair in pairs if pair[1])
    return pairs_by_feature


def _rows_by_feature(table: pd.DataFrame) -> dict[int, list[Mapping[Any, Any]]]:
    rows: dict[int, list[Mapping[Any, Any]]] = {}
    for row in table.to_dict("records"):
        rows.setdefault(int(row["feature"]), []).append(row)
    return rows


_BASELINE_PHRASES = {
    "prompt": "simply asking (a prompt that names the concept)",
    "mean_difference": "an equal push along a plain difference of means",
}


def _baseline_outcome(results: SteeringResults) -> str:
    """The first declared outcome that the baselines have too (they give texts only)."""
    outcomes = dict.fromkeys(str(name) for table in results.baseline_effects.values() for name in table["outcome"])
    return next(iter(results.in_order(list(outcomes))), "")


def baseline_sentences(comparison: Comparison, context: ReportContext) -> tuple[str, ...]:
    """One sentence per baseline, over the features of all arms; none if no baseline was run."""
    results = context.steering
    outcome = _baseline_outcome(results) if results is not None else ""
    if results is None or not outcome:
        return ()
    if results.operator == "ablate":
        return (
            "An ablation takes a concept away and these baselines bring it up, so they are no yardstick for it; "
            "they show how much of the concept there could be.",
        )
    table = baseline_summary(results, list(comparison.table1["arm"]))
    groups = table[table["outcome"] == outcome].groupby("baseline", sort=False)
    return tuple(_baseline_sentence(str(baseline), rows, outcome) for baseline, rows in groups)


def _baseline_sentence(baseline: str, rows: pd.DataFrame, outcome: str) -> str:
    n, above, below = (int(rows[name].sum()) for name in ("n_defined", "n_above", "n_below"))
    clear_above, clear_below = (int(rows[name].sum()) for name in ("n_clearly_above", "n_clearly_below"))
    phrase = _BASELINE_PHRASES.get(baseline, control_label(baseline))
    if not n:
        reason = next((str(reason) for reason in rows["reason"] if reason), "no reason was recorded")
        return f"Whether steering does more than {phrase} cannot be said: {reason}."
    if above > below and clear_above > clear_below:
        verdict = f"Steering is stronger than {phrase}"
    elif below > above and clear_below > clear_above:
        verdict = f"Steering is weaker than {phrase}"
    else:
        verdict = f"Steering is neither clearly stronger nor clearly weaker than {phrase}"
    sample = "the one feature compared" if n == 1 else f"{count(n)} features"
    return (
        f"{verdict}: by {OUTCOMES[outcome].label}, of {sample} it is stronger on {count(above)} (clearly on "
        f"{count(clear_above)}) and weaker on {count(below)} (clearly on {count(clear_below)}). Clearly: the 95 % "
        "interval excludes zero."
    )


def baseline_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """One row per arm and feature: unsteered, steered, each baseline and the difference; None without baselines."""
    results = context.steering
    outcome = _baseline_outcome(results) if results is not None else ""
    if results is None or not outcome:
        return None
    effects = results.baseline_effects
    tables = {
        arm: effects[arm][effects[arm]["outcome"] == outcome] for arm in comparison.table1["arm"] if arm in effects
    }
    baselines = [str(name) for name in dict.fromkeys(pd.concat(list(tables.values()))["baseline"])]
    columns = [Column("Unsteered"), Column("Steered")]
    for baseline in baselines:
        short = "means" if baseline == "mean_difference" else baseline
        columns += [Column(capital(control_label(baseline))), Column(f"Steered − {short}", "95 % interval")]
    rows = []
    for arm, table in tables.items():
        by_feature = _rows_by_feature(table)
        names = feature_names(context.arms.get(arm), wanted=by_feature)
        for feature, records in sorted(by_feature.items()):
            cells = _baseline_cells(records, baselines, outcome)
            rows.append(Row(f"{feature}", cells, sub=names.get(feature, ""), group=arm))
    title, tag = capital(OUTCOMES[outcome].label), "declared" if results.declared(outcome) else "exploratory"
    return TableView(
        name="baselines",
        caption=f"Does steering beat simpler means? {title} of the texts ({tag})",
        columns=tuple(columns),
        rows=tuple(rows),
        corner="Feature",
        note=(
            "A random sample of the tested features, drawn before the test. A negative difference: the simpler means "
            "brought the texts nearer to the concept than steering with the feature did."
        ),
        source=(
            f"arms/*/baseline_effects.parquet, rows with outcome = {outcome}, columns unsteered_mean, steered_mean, "
            "baseline_mean, effect, low, high; the other outcomes are in tables/steering_baselines.csv"
        ),
        terms=tuple(name for name in BASELINES if name in baselines),
    )


def _baseline_cells(records: Sequence[Mapping[Any, Any]], baselines: Sequence[str], outcome: str) -> tuple[Cell, ...]:
    first = next((row for row in records if is_defined(row["steered_mean"])), records[0])
    cells = [_mean_cell(first, name, outcome) for name in ("unsteered_mean", "steered_mean")]
    by_baseline = {row["baseline"]: row for row in records}
    for baseline in baselines:
        row = by_baseline.get(baseline)
        if row is None:
            cells += [Cell.words("not run", tone="muted")] * 2
        elif not is_defined(row["effect"]):
            cells += [Cell("undefined", tone="muted"), Cell.undefined(row["reason"])]
        else:
            ends = interval_text(row["low"], row["high"], outcome)
            cells += [_mean_cell(row, "baseline_mean", outcome), Cell(effect_text(row["effect"], outcome), sub=ends)]
    return tuple(cells)


def _mean_cell(row: Mapping[Any, Any], name: str, outcome: str) -> Cell:
    return Cell(level_text(row[name], outcome), tone="" if is_defined(row[name]) else "muted")


def together_table(comparison: Comparison, context: ReportContext) -> TableView | None:
    """One row per set of features steered at once, beside its members alone; None without sets."""
    results = context.steering
    if results is None:
        return None
    rows = []
    for arm in comparison.table1["arm"]:
        if arm in results.together_effects:
            effects, sets = context.arms[arm].effects, results.together_effects[arm]
            names = feature_names(context.arms.get(arm), 2, wanted=set(sets["members"].explode()))
            alone = {} if effects is None else dict(zip(effects["feature"], effects["effect"], strict=True))
            rows += [_set_row(arm, row, alone, names) for row in sets.to_dict("records")]
    if not rows:
        return None
    return TableView(
        name="together",
        caption=f"Features steered at once: {OUTCOMES[results.deciding].label}",
        columns=(
            Column("Unsteered"),
            Column("Steered"),
            Column(capital(control_label(results.placebo))),
            Column("Effect", "95 % interval"),
            Column("q"),
            Column("Members alone", is_text=True),
        ),
        rows=tuple(rows),
        corner="Set",
        note=(
            "The texts of a set are compared with the top tokens of all its members, those of a member alone with its "
            "own: the two effects are not on the same footing."
        ),
        source=(
            "arms/*/together_effects.parquet, columns set, members, unsteered_mean, steered_mean, placebo_mean, "
            "effect, effect_low, effect_high, q; members alone: arms/*/effects.parquet, column effect"
        ),
        terms=("together",),
    )


def _set_row(arm: str, row: Mapping[Any, Any], alone: Mapping[int, float], names: Mapping[int, str]) -> Row:
    outcome, members = str(row["outcome"]), [int(member) for member in row["members"]]
    effect = Cell.undefined(row["reason"])
    if is_defined(row["effect"]):
        ends = interval_text(row["effect_low"], row["effect_high"], outcome)
        effect = Cell(effect_text(row["effect"], outcome), sub=ends)
    q = p_value(row["q"]) + (" ✓" if is_true(row["passed"]) else "") if is_defined(row["q"]) else "undefined"
    tested = {member: effect_text(alone[member], outcome) for member in members if is_defined(alone.get(member))}
    effects_text = ", ".join(f"{member}: {tested.get(member, 'not tested')}" for member in members)
    cells = (
        *(_mean_cell(row, name, outcome) for name in ("unsteered_mean", "steered_mean", "placebo_mean")),
        effect,
        Cell(q),
        Cell.words(effects_text) if tested else Cell.words("none was tested alone", tone="muted"),
    )
    label = f"Set {int(row['set']) + 1}: {' + '.join(map(str, members))}"
    return Row(label, cells, sub="; ".join(names[member] for member in members if member in names), group=arm)


_DOSE_COLUMNS = {
    "n": "Texts",
    "gain": "Gain",
    "placebo_gain": "Gain, placebo",
    "distinct2": "Distinct-2",
    "perplexity": "Perplexity",
    "fluency": "Fluency",
    "score": "Score",
}


def dose_table(_comparison: Comparison, context: ReportContext) -> TableView | None:
    """The dose search, one row per dose and arm; None without one."""
    if context.doses is None:
        return None
    table = context.doses[context.doses["condition"] == STEERED]
    placebo = context.doses[context.doses["condition"] != STEERED]
    if len(placebo):
        gains = placebo.rename(columns={"gain": "placebo_gain"})[["arm", "dose", "placebo_gain"]]
        table = table.merge(gains, on=["arm", "dose"], how="left")
    columns = [name for name in _DOSE_COLUMNS if name in table.columns]
    rows = []
    for row in table.to_dict("records"):
        cells = (Cell.value(row[name], "count" if name == "n" else "", reason="not measured") for name in columns)
        label = f"{row['dose']:g}" + (" (chosen)" if row["chosen"] else "")
        rows.append(Row(label, tuple(cells), strong=bool(row["chosen"]), group=row["arm"]))
    return TableView(
        name="doses",
        caption="The dose search",
        columns=tuple(Column(_DOSE_COLUMNS[name]) for name in columns),
        rows=tuple(rows),
        corner="Dose",
        note=(
            f"{dose_axis(context.steering).capitalize()}. Every number is a mean over texts; [[figure:doses]] shows "
            "them."
        ),
        source="steering/dose_search.parquet, one row per arm, condition and dose",
        terms=("dose", "gain", "fluency", "dose_score", "perplexity", "distinct2"),
    )
