"""How often does this very comparison find something where there is nothing to find?

SAEs of the control's model differ by their seed alone. Each of them is put in the treatment's place, and everything
is compared again. What is found then is a false alarm. A test whose alarms are more frequent than its nominal rate
cannot be believed when it finds something in the treatment.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.contrasts import Contrast, as_table, pair_contrasts
from saeffect.comparison.judgement import ALPHA, judge, settled
from saeffect.comparison.quantities import QUANTITIES, sae_value
from saeffect.comparison.seeds import all_saes_contrast, control_saes
from saeffect.stats.proportions import wilson
from saeffect.stats.resampling import LEVEL, Resampling

__all__ = ["CALIBRATED", "WITHIN", "calibration_table"]

CALIBRATED = ("effect",)
"""Quantities that are calibrated whether declared or not."""

WITHIN = "within nominal"
_TOO_MANY = "more alarms than nominal"
_UNKNOWN = "cannot be judged"
_COLUMNS = ("test", "rule", "unit", "declared", "nominal", "tests", "findings", "rate", "low", "high")
_INTERVAL, _BEYOND = "the interval excludes zero", "more than SAE noise"
_ANY, _CORRECTED = "any declared quantity", "more than SAE noise, after Holm"
_LOW_P, _CALLED = "p at most alpha", "a feature is called at q at most alpha"


@dataclass(frozen=True)
class _Count:
    """Findings among tests."""

    tests: int = 0
    findings: int = 0

    def plus(self, found: bool) -> _Count:
        return _Count(self.tests + 1, self.findings + int(found))


def calibration_table(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    tables: Mapping[str, pd.DataFrame],
    *,
    tests: Sequence[str],
    alpha: float,
    min_matches: int,
    resampling: Resampling,
) -> pd.DataFrame:
    """Alarms of every test where a SAE of the control's model stands in for the treatment.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        tables: What was found in the study itself: "contrasts" with the rows over seeds, "judgements" made of these,
            "regression", and "fates_null" and "cross_activity" where there are such.
        tests: Declared quantities; those of `CALIBRATED` are added.
        alpha: Highest q of a finding about a feature.
        min_matches: As of the contrasts.
        resampling: As of the contrasts.

    Returns:
        One row a test and rule: `test`; `rule`, what counts as a finding; `unit` of which there are `tests`;
        `declared`; `nominal`, the rate that the test promises not to exceed; `findings` among the tests of the null;
        their `rate` with Wilson's interval `low`, `high`; `treatment_tests`, `treatment_findings` for the real one;
        `verdict`: "within nominal" unless `low` is above `nominal`; `reason` where it cannot be judged. Pairs of SAEs
        share SAEs, so they are not quite independent and the interval is a little too narrow. An interval is the same
        in either direction, so it counts once for two SAEs; the rule of the headline counts every SAE that takes the
        treatment's place once, and fates every ordered pair. The test "any declared quantity" is the headline itself.
    """
    saes = control_saes(arms, roles)
    pairs = _pairs(saes, min_matches, resampling)
    rows = []
    beyond = _beyond_rows(tests, pairs, saes, tables["judgements"], min_matches)
    for quantity in (name for name in beyond if name != _ANY):
        rows += [_interval_row(quantity, quantity in tests, pairs, saes, tables["contrasts"]), beyond[quantity]]
    rows += [beyond[_ANY]] if _ANY in beyond else []
    if "fates_null" in tables and len(tables["fates_null"]):
        rows += _fate_rows(tables["fates_null"], alpha, "fates" in tests)
    if "cross_activity" in tables and len(tables["cross_activity"]):
        rows.append(_cross_row(tables["cross_activity"], alpha, "cross_activity" in tests))
    if "regression" in tables and len(tables["regression"]):
        rows.append(_regression_row(tables["regression"], roles))
    columns = [*_COLUMNS, "treatment_tests", "treatment_findings", "verdict", "reason"]
    return pd.DataFrame(rows, columns=columns)


_Rows = dict[tuple[str, str], dict[str, Contrast]]


def _pairs(saes: Sequence[ArmTables], min_matches: int, resampling: Resampling) -> _Rows:
    """Contrasts of every ordered pair of SAEs, by quantity."""
    found: _Rows = {}
    for a, b in itertools.permutations(saes, 2):
        if a.name > b.name:
            continue  # made below, from the same numbers
        rows = pair_contrasts("", a, b, min_matches=min_matches, resampling=resampling)
        found[a.name, b.name] = {row.quantity: row for row in rows}
        found[b.name, a.name] = {row.quantity: _reversed(row) for row in rows}
    return found


def _reversed(row: Contrast) -> Contrast:
    """The same contrast seen from the other arm. Ratios are never tested; of a change in % the sign matters."""
    return replace(
        row,
        a=row.b,
        b=row.a,
        value_a=row.value_b,
        value_b=row.value_a,
        estimate=-row.estimate,
        low=-row.high,
        high=-row.low,
    )


def _interval_row(
    quantity: str, declared: bool, pairs: _Rows, saes: Sequence[ArmTables], contrasts: pd.DataFrame
) -> dict[str, Any]:
    null = _Count()
    for a, b in itertools.combinations(saes, 2):
        row = pairs[a.name, b.name].get(quantity)
        if row is not None and math.isfinite(row.low):
            null = null.plus(row.low > 0 or row.high < 0)
    real = contrasts[(contrasts["quantity"] == quantity) & (contrasts["comparison"] == "fine-tuning")]
    treatment = _Count()
    for one in real.itertuples():
        if math.isfinite(one.low):
            treatment = treatment.plus(one.low > 0 or one.high < 0)
    reason = "" if null.tests else _no_pair(saes)
    return _row(quantity, _INTERVAL, "pairs of SAEs", declared, 1 - LEVEL, null, treatment, reason)


def _beyond_rows(
    tests: Sequence[str], pairs: _Rows, saes: Sequence[ArmTables], judgements: pd.DataFrame, min_matches: int
) -> dict[str, dict[str, Any]]:
    """The rule of the headline, quantity by quantity and for all that were declared together.

    Each SAE in turn is the treatment's, and all others are the control's and its placebos'.
    """
    compared = {row for quantity in QUANTITIES.values() for row in quantity.rows}
    quantities = [name for name in dict.fromkeys((*tests, *CALIBRATED)) if name in compared]
    usable = {name: _usable(name, saes, min_matches) for name in quantities}
    found = {name: _Count() for name in quantities}
    together = _Count()
    for b in saes:
        rows = [row for name in quantities if b in usable[name]
                for row in _stand_in(name, b, usable[name], pairs, min_matches)]  # fmt: skip
        if not rows:
            continue
        alone, corrected = as_table(rows, ()), settled(as_table(rows, tests))
        tried = [name for name in quantities if name in set(alone["quantity"])]
        for name in tried:
            found[name] = found[name].plus(judge(alone, name).status == "beyond")
        declared = [name for name in tried if name in tests]
        if declared:
            together = together.plus(any(judge(corrected, name).status == "beyond" for name in declared))
    unit = "SAEs, each in the treatment's place"
    reasons = {name: "" if found[name].tests else _too_few_saes(name, saes) for name in quantities}
    real = {name: _real(judgements, name) for name in quantities}
    table = {
        name: _row(name, _BEYOND, unit, name in tests, ALPHA, found[name], real[name], reasons[name])
        for name in quantities
    }
    declared = [name for name in quantities if name in tests]
    if declared:
        any_real = sum(real[name].findings for name in declared) > 0
        judged = _Count(int(any(real[name].tests for name in declared)), int(any_real))
        reason = "" if together.tests else reasons[declared[0]]
        table[_ANY] = _row(_ANY, _CORRECTED, unit, True, ALPHA, together, judged, reason)
    return table


def _usable(quantity: str, saes: Sequence[ArmTables], min_matches: int) -> list[ArmTables]:
    """SAEs that have the quantity; all for what only a pair has. None if they are fewer than three."""
    of_a_pair = quantity in QUANTITIES and QUANTITIES[quantity].of_a_pair
    having = [sae for sae in saes if of_a_pair or math.isfinite(sae_value(quantity, sae, min_matches))]
    return having if len(having) > 2 else []


def _stand_in(quantity: str, b: ArmTables, saes: Sequence[ArmTables], pairs: _Rows, min_matches: int) -> list[Contrast]:
    """The contrasts of a study in which `b` is the treatment's SAE and the others the control's; none if undefined."""
    a, *others = [one for one in saes if one is not b]
    rows = [_named(pairs, quantity, "fine-tuning", a, b)]
    for other in others:
        rows += [
            _named(pairs, quantity, "retraining", a, other),
            _named(pairs, quantity, "beyond retraining", other, b),
        ]
    known = [row for row in rows if row is not None and math.isfinite(row.low)]
    if len(known) < len(rows):
        return []
    over = all_saes_contrast(quantity, [a, *others], [b], min_matches=min_matches)
    return [*known, over] if over.saes_b else known


def _real(judgements: pd.DataFrame, quantity: str) -> _Count:
    status = judgements.loc[judgements["quantity"] == quantity, "status"]
    judged = status[~status.isin(["undefined", "unseparated"])]
    return _Count(len(judged), int((judged == "beyond").sum()))


def _too_few_saes(quantity: str, saes: Sequence[ArmTables]) -> str:
    reason = "it needs three SAEs of the control's model: control, stand-in and placebo"
    if len(saes) > 2 and quantity in QUANTITIES and QUANTITIES[quantity].steered:
        reason += ", all of them steered"
    return reason


def _named(pairs: _Rows, quantity: str, comparison: str, a: ArmTables, b: ArmTables) -> Contrast | None:
    row = pairs[a.name, b.name].get(quantity)
    return None if row is None else replace(row, comparison=comparison)


def _fate_rows(table: pd.DataFrame, alpha: float, declared: bool) -> Iterable[dict[str, Any]]:
    names = {"control": "lost or moved features", "treatment": "new features"}
    for (measure, side), rows in table.groupby(["measure", "side"], sort=False):
        name = f"{names[str(side)]}, {measure}"
        null, real = rows[rows["is_null"] & (rows["tested"] > 0)], rows[~rows["is_null"] & (rows["tested"] > 0)]
        reason = "" if len(null) else "it needs three SAEs of the control's model with what it takes"
        for rule, unit, of in (
            (_CALLED, "ordered pairs of SAEs", lambda some: _Count(len(some), int((some["called"] > 0).sum()))),
            (_LOW_P, "features", lambda some: _Count(int(some["tested"].sum()), int(some["low_p"].sum()))),
        ):
            yield _row(name, rule, unit, declared, alpha, of(null), of(real), reason)


def _cross_row(table: pd.DataFrame, alpha: float, declared: bool) -> dict[str, Any]:
    tested = table["q"].notna()
    treatment = _Count(int(tested.sum()), int((table["q"] <= alpha).sum()))
    reason = (
        "one SAE on one model twice gives equal activations, so only a further fine-tune on general text could show "
        "how often it raises a false alarm"
    )
    return _row("cross-activity", "q at most alpha", "features", declared, alpha, _Count(), treatment, reason)


def _regression_row(terms: pd.DataFrame, roles: Roles) -> dict[str, Any]:
    """Does the effect of steering depend on the arm, like features compared? In a placebo it should not."""
    known = terms[terms["low"].notna()].set_index("term")
    counts = []
    for names in (roles.placebos, (roles.treatment,)):
        count = _Count()
        for name in names:
            if f"arm {name}" in known.index:
                row = known.loc[f"arm {name}"]
                count = count.plus(bool(row["low"] > 0 or row["high"] < 0))
        counts.append(count)
    reason = "" if counts[0].tests else "no placebo arm has an interval in the regression"
    name = "arm term of the regression"
    return _row(name, _INTERVAL, "placebo arms", False, 1 - LEVEL, counts[0], counts[1], reason)


def _row(
    test: str,
    rule: str,
    unit: str,
    declared: bool,
    nominal: float,
    null: _Count,
    treatment: _Count,
    reason: str,
) -> dict[str, Any]:
    rate = wilson(null.findings, null.tests, level=LEVEL) if null.tests else None
    low, high = (rate.low, rate.high) if rate is not None else (math.nan, math.nan)
    return {
        "test": test,
        "rule": rule,
        "unit": unit,
        "declared": declared,
        "nominal": round(nominal, 12),
        "tests": null.tests,
        "findings": null.findings,
        "rate": rate.value if rate is not None else math.nan,
        "low": low,
        "high": high,
        "treatment_tests": treatment.tests,
        "treatment_findings": treatment.findings,
        "verdict": _UNKNOWN if rate is None else _TOO_MANY if low > nominal else WITHIN,
        "reason": reason,
    }


def _no_pair(saes: Sequence[ArmTables]) -> str:
    if len(saes) < 2:
        return "there is one SAE of the control's model, so nothing can stand in for the treatment"
    return "no two SAEs of the control's model have an interval for it"
