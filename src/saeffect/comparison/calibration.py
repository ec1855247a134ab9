"""False alarms when an SAE of the control's model, which differs by its seed alone, takes the treatment's place; and
how many findings chance alone would give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit
from scipy.stats import binom

from saeffect.comparison.arms import ArmTables, Roles, pass_counts
from saeffect.comparison.contrasts import Contrast, as_table, compared_pairs, pair_contrasts
from saeffect.comparison.findings import MatchTables
from saeffect.comparison.judgement import ALPHA, add_noise_p, judge
from saeffect.comparison.quantities import QUANTITIES, sae_value
from saeffect.comparison.seeds import all_saes_contrast, control_saes
from saeffect.diffing.cross_activity import activity_changes
from saeffect.stats.arguments import LEVEL, Resampling
from saeffect.stats.proportions import wilson

__all__ = ["CALIBRATED", "WITHIN", "calibration_table", "chance_table"]

CALIBRATED = ("effect",)
"""Quantities that are calibrated whether declared or not."""

WITHIN = "within nominal"
_INTERVAL, _BEYOND = "the interval excludes zero", "more than SAE noise"
_Pairs = dict[tuple[str, str], dict[str, Contrast]]  # by the names of both SAEs, and by quantity
_Count = tuple[int, int]  # tests, and findings among them


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
    """Alarms of every test where an SAE of the control's model takes the treatment's place.

    `tables` are those of the study itself: "contrasts" with the rows over seeds, "judgements" made of these,
    "regression" and, where they exist, "fates_null" and "cross_activity". Quantities of `CALIBRATED` are added to
    `tests`.

    One row a test and rule: `test`; `rule`, what counts as a finding; `unit` of which there are `tests`; `declared`;
    `nominal`, the rate that the test promises not to exceed; `findings` among the tests of the null; their `rate` with
    Wilson's interval `low`, `high`; `treatment_tests`, `treatment_findings` for the real one; `verdict`: "within
    nominal" unless `low` is above `nominal`; `reason` where it cannot be judged. Pairs of SAEs share SAEs, so the
    interval is a little too narrow. Two SAEs count once for an interval, which is the same in either direction; the
    headline rule counts each SAE in the treatment's place once, and fates every ordered pair. The test "any declared
    quantity" is the headline itself.
    """
    comparable = {row for quantity in QUANTITIES.values() for row in quantity.rows}
    names = [name for name in dict.fromkeys((*tests, *CALIBRATED)) if name in comparable]
    saes = control_saes(arms, roles)
    pairs = _contrasts_by_pair(saes, names, min_matches, resampling)
    rows = list(_quantity_rows(names, tests, saes, pairs, tables, min_matches))
    if len(tables.get("fates_null", ())):
        rows += _fate_rows(tables["fates_null"], alpha, "fates" in tests)
    if len(tables.get("cross_activity", ())):
        rows.append(_cross_activity_row(tables["cross_activity"], alpha, "cross_activity" in tests))
    if len(tables.get("regression", ())):
        rows.append(_regression_row(tables["regression"], roles))
    return pd.DataFrame(rows)


def _contrasts_by_pair(
    saes: Sequence[ArmTables], names: Sequence[str], min_matches: int, resampling: Resampling
) -> _Pairs:
    """Contrasts of every ordered pair of SAEs; each pair is computed once and swapped for the other order."""
    quantities = [quantity for quantity in QUANTITIES.values() if set(quantity.rows) & set(names)]
    contrasts: _Pairs = {}
    for a, b in itertools.combinations(sorted(saes, key=lambda sae: sae.name), 2):
        rows = pair_contrasts("", a, b, quantities, min_matches=min_matches, resampling=resampling)
        contrasts[a.name, b.name] = {row.quantity: row for row in rows}
        contrasts[b.name, a.name] = {row.quantity: _swap_arms(row) for row in rows}
    return contrasts


def _swap_arms(row: Contrast) -> Contrast:
    """The contrast with its arms swapped. Ratios are never tested, and of a change in % only the sign is used."""
    swapped = replace(row, a=row.b, b=row.a, value_a=row.value_b, value_b=row.value_a)
    return replace(swapped, estimate=-row.estimate, low=-row.high, high=-row.low)


def _quantity_rows(
    names: Sequence[str],
    tests: Sequence[str],
    saes: Sequence[ArmTables],
    pairs: _Pairs,
    tables: Mapping[str, pd.DataFrame],
    min_matches: int,
) -> Iterator[dict[str, Any]]:
    """Every quantity by its interval and by the rule of the headline; then all declared ones together."""
    unit = "SAEs, each in the treatment's place"
    contrasts, judgements = tables["contrasts"], tables["judgements"].set_index("quantity")["status"]
    alarms, joint_alarms = _headline_alarms(names, tests, saes, pairs, min_matches)
    treatment = {name: _count_beyond(judgements[judgements.index == name]) for name in names}
    reasons = {name: "" if alarms[name] else _too_few_saes(name, saes) for name in names}
    for name in names:
        null = [pairs[a.name, b.name].get(name) for a, b in itertools.combinations(saes, 2)]
        tuned = contrasts[(contrasts["quantity"] == name) & (contrasts["comparison"] == "fine-tuning")]
        null_count = _count_excluding_zero((row.low, row.high) for row in null if row is not None)
        tuned_count = _count_excluding_zero(zip(tuned["low"], tuned["high"], strict=True))
        reason = "" if null_count[0] else _no_pair(saes)
        yield _row(name, _INTERVAL, "pairs of SAEs", name in tests, 1 - LEVEL, null_count, tuned_count, reason)
        yield _row(name, _BEYOND, unit, name in tests, ALPHA, _count(alarms[name]), treatment[name], reasons[name])
    declared = [name for name in names if name in tests]
    if declared:
        judged = int(any(treatment[name][0] for name in declared)), int(any(treatment[name][1] for name in declared))
        yield _row("any declared quantity", f"{_BEYOND}, after Holm", unit, True, ALPHA, _count(joint_alarms), judged,
                   "" if joint_alarms else reasons[declared[0]])  # fmt: skip


def _headline_alarms(
    names: Sequence[str], tests: Sequence[str], saes: Sequence[ArmTables], pairs: _Pairs, min_matches: int
) -> tuple[dict[str, list[bool]], list[bool]]:
    """Alarms of the headline rule with each SAE in turn as the treatment's: per quantity, and for any declared one."""
    usable = {name: _saes_with(name, saes, min_matches) for name in names}
    alarms: dict[str, list[bool]] = {name: [] for name in names}
    together = []
    for held_out in saes:
        rows = [row for name in names if held_out in usable[name]
                for row in _held_out_contrasts(name, held_out, usable[name], pairs, min_matches)]  # fmt: skip
        if not rows:
            continue
        alone, corrected = as_table(rows, ()), add_noise_p(as_table(rows, tests))
        tried = [name for name in names if name in set(alone["quantity"])]
        for name in tried:
            alarms[name].append(judge(alone, name).status == "beyond")
        if declared := [name for name in tried if name in tests]:
            together.append(any(judge(corrected, name).status == "beyond" for name in declared))
    return alarms, together


def _saes_with(quantity: str, saes: Sequence[ArmTables], min_matches: int) -> list[ArmTables]:
    """SAEs in which the quantity is defined (all of them if it is defined for pairs); [] if fewer than three."""
    pairwise = quantity in QUANTITIES and QUANTITIES[quantity].pairwise
    defined = [sae for sae in saes if pairwise or math.isfinite(sae_value(quantity, sae, min_matches))]
    return defined if len(defined) > 2 else []


def _held_out_contrasts(
    quantity: str, held_out: ArmTables, saes: Sequence[ArmTables], pairs: _Pairs, min_matches: int
) -> list[Contrast]:
    """Contrasts of a study with the held-out SAE as treatment and the others as control and placebos, or []."""
    control, *placebos = [sae for sae in saes if sae is not held_out]
    compared = compared_pairs(control, held_out, placebos)
    rows = [(comparison, pairs[a.name, b.name].get(quantity)) for comparison, a, b in compared]
    defined = [replace(row, comparison=comparison) for comparison, row in rows if row and math.isfinite(row.low)]
    if len(defined) < len(rows):
        return []
    all_saes = all_saes_contrast(quantity, [control, *placebos], [held_out], min_matches=min_matches)
    return [*defined, all_saes] if all_saes.saes_b else defined


def _too_few_saes(quantity: str, saes: Sequence[ArmTables]) -> str:
    reason = "it needs three SAEs of the control's model: control, stand-in and placebo"
    if len(saes) > 2 and quantity in QUANTITIES and QUANTITIES[quantity].steered:
        reason += ", all of them steered"
    return reason


def _no_pair(saes: Sequence[ArmTables]) -> str:
    if len(saes) < 2:
        return "there is one SAE of the control's model, so nothing can stand in for the treatment"
    return "no two SAEs of the control's model have an interval for it"


def _fate_rows(table: pd.DataFrame, alpha: float, declared: bool) -> Iterator[dict[str, Any]]:
    names = {"control": "lost or moved features", "treatment": "new features"}
    for (measure, side), rows in table.groupby(["measure", "side"], sort=False):
        tested = rows[rows["tested"] > 0]
        sides = tested[tested["is_null"]], tested[~tested["is_null"]]
        reason = "" if len(sides[0]) else "it needs three SAEs of the control's model with what it takes"
        name = f"{names[str(side)]}, {measure}"
        called = [(len(pairs), int((pairs["called"] > 0).sum())) for pairs in sides]
        low_p = [(int(pairs["tested"].sum()), int(pairs["low_p"].sum())) for pairs in sides]
        for rule, unit, (null, treatment) in (
            ("a feature is called at q at most alpha", "ordered pairs of SAEs", called),
            ("p at most alpha", "features", low_p),
        ):
            yield _row(name, rule, unit, declared, alpha, null, treatment, reason)


def _cross_activity_row(table: pd.DataFrame, alpha: float, declared: bool) -> dict[str, Any]:
    treatment = int(table["q"].notna().sum()), int((table["q"] <= alpha).sum())
    reason = (
        "one SAE on one model twice gives equal activations, so only a further fine-tune on general text could show "
        "how often it raises a false alarm"
    )
    return _row("cross-activity", "q at most alpha", "features", declared, alpha, (0, 0), treatment, reason)


def _regression_row(terms: pd.DataFrame, roles: Roles) -> dict[str, Any]:
    """Whether the effect of steering depends on the arm, properties of features held fixed (null: it does not)."""
    null, treatment = (
        _count_excluding_zero(terms.loc[terms["term"].isin([f"arm {name}" for name in names]), ["low", "high"]].values)
        for names in (roles.placebos, (roles.treatment,))
    )
    reason = "" if null[0] else "no placebo arm has an interval in the regression"
    return _row("arm term of the regression", _INTERVAL, "placebo arms", False, 1 - LEVEL, null, treatment, reason)


def _count(findings: Iterable[bool]) -> _Count:
    outcomes = list(findings)
    return len(outcomes), sum(outcomes)


def _count_excluding_zero(intervals: Iterable[tuple[float, float]]) -> _Count:
    """Intervals that exclude zero, among those that are defined."""
    return _count(low > 0 or high < 0 for low, high in intervals if math.isfinite(low))


def _count_beyond(statuses: Iterable[str]) -> _Count:
    return _count(status == "beyond" for status in statuses if status not in ("undefined", "unseparated"))


def _row(
    test: str, rule: str, unit: str, declared: bool, nominal: float, null: _Count, treatment: _Count, reason: str
) -> dict[str, Any]:
    rate = wilson(null[1], null[0])
    verdict = "cannot be judged" if not null[0] else "more alarms than nominal" if rate.low > nominal else WITHIN
    return {
        "test": test,
        "rule": rule,
        "unit": unit,
        "declared": declared,
        "nominal": round(nominal, 12),
        "tests": null[0],
        "findings": null[1],
        "rate": rate.value,
        "low": rate.low,
        "high": rate.high,
        "treatment_tests": treatment[0],
        "treatment_findings": treatment[1],
        "verdict": verdict,
        "reason": reason,
    }


_UNMATCHED = {  # by side: the fate, and its name in the table
    "control": ("gone", "control's features without a counterpart"),
    "treatment": ("new", "treatment's features that match nothing of the control's"),
}


def chance_table(arms: Mapping[str, ArmTables], roles: Roles, matches: MatchTables, *, alpha: float) -> pd.DataFrame:
    """How many findings the treatment has, and how many chance would give: chance is another SAE of the control's model
    for counts per SAE, and a feature without effect for tests of single features.

    One row a kind of finding: `finding`; `found`, their number, `among` how many; `expected` by chance, and its 95 %
    interval `low`, `high` (NaN where unknown, with the `reason`); `bound`, whether `expected` is an upper bound rather
    than a mean; `chance`, what chance is here; `source`, the table.
    """
    treatment, saes = arms[roles.treatment], control_saes(arms, roles)
    rows = [_domain_row(treatment, saes), *_steering_rows(treatment, alpha), *_unmatched_rows(matches.fate_counts)]
    return pd.DataFrame([*rows, *_activity_rows(matches.cross_activity, alpha)])


def _domain_row(treatment: ArmTables, saes: Sequence[ArmTables]) -> dict[str, Any]:
    """Domain features, beside the number predicted for one more SAE of the control's model."""
    shares = np.array([len(sae.domain) / sae.n_features for sae in saes if sae.n_features])
    n, source = treatment.n_features, "arms/*/selection.parquet: is_domain"
    mean = float(shares.mean()) if len(shares) else math.nan
    row = _finding("domain features", len(treatment.domain), n, n * mean, source)
    if len(shares) < 2:
        reason = "one SAE of the control's model does not show how much seeds differ"
        return row | {"chance": "another SAE of the control's model", "reason": reason}
    # Prediction interval: the spread of one more SAE and the error of the mean.
    half = float(stdtrit(len(shares) - 1, (1 + LEVEL) / 2)) * float(shares.std(ddof=1)) * math.sqrt(1 + 1 / len(shares))
    chance = f"one more SAE of the control's model, as its {len(shares)} SAEs predict"
    return row | {"low": n * max(0.0, mean - half), "high": n * min(1.0, mean + half), "chance": chance}


def _steering_rows(treatment: ArmTables, alpha: float) -> Iterator[dict[str, Any]]:
    counts, effects = pass_counts(treatment), treatment.effects
    if effects is None or not counts.tested:
        return
    source = f"arms/{treatment.name}/effects.parquet"
    n, n_low = counts.tested, int((pd.to_numeric(effects["p"], errors="coerce") <= alpha).sum())
    row = _finding(f"steered features with p ≤ {alpha:g}", n_low, n, alpha * n, f"{source}: p")
    yield row | _binomial(n, alpha) | {"chance": "steering that does nothing"}
    name = f"steered features that pass (q ≤ {alpha:g})"
    row = _finding(name, counts.passed, n, alpha * counts.passed, f"{source}: q, passed")
    yield row | {"bound": True, "chance": "false ones among those that pass, as Benjamini-Hochberg allows"}
    if n := counts.paper_tested:
        name = "steered features that pass by the paper's rule"
        row = _finding(name, counts.paper_passed, n, n / 2, f"{source}: paper_pass")
        yield row | _binomial(n, 0.5) | {"chance": "one text against another of the same kind: heads or tails"}


def _unmatched_rows(fate_counts: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Features without a counterpart, beside those of an SAE of another seed."""
    source = "comparison/fate_counts.parquet: n_treatment, n_placebo, excess"
    for count in fate_counts.to_dict("records"):
        fate, name = _UNMATCHED[str(count["side"])]
        if count["fate"] != fate or math.isnan(float(count["n_placebo"])):
            continue
        n, expected = float(count["n_treatment"]), float(count["n_placebo"])
        row = _finding(f"{name}, {count['measure']}", n, int(count["n_features"]), expected, source)
        row |= {"low": n - float(count["high"]), "high": n - float(count["low"])}
        yield row | {"chance": "an SAE of another seed in the treatment's place", "reason": str(count["reason"])}


def _activity_rows(cross: pd.DataFrame, alpha: float) -> Iterator[dict[str, Any]]:
    if cross.empty or cross["q"].notna().sum() == 0:
        return
    n_tested, n_called = int(cross["q"].notna().sum()), int((cross["q"] <= alpha).sum())
    source = "comparison/cross_activity.parquet: q, difference, is_domain"
    row = _finding(f"features that fire differently (q ≤ {alpha:g})", n_called, n_tested, alpha * n_called, source)
    yield row | {"bound": True, "chance": "false ones among those found, as Benjamini-Hochberg allows"}
    changes = activity_changes(cross, alpha=alpha)
    more, domain = changes.more, changes.domain
    if not domain.any() or domain.all():
        return
    n, share = int(domain.sum()), float(more[~domain].mean())
    nulls = ", also against null fine-tunes" if "q_nulls" in cross else ""
    name = f"domain features that fire more (q ≤ {alpha:g}{nulls})"
    row = _finding(name, int(more[domain].sum()), n, n * share, source)
    chance = f"as often as features outside the domain, {100 * share:.0f} % of which fire more"
    yield row | _binomial(n, share) | {"chance": chance}


def _finding(finding: str, found: float, among: int, expected: float, source: str) -> dict[str, Any]:
    row = {"finding": finding, "found": float(found), "among": among, "expected": expected}
    return row | {"low": math.nan, "high": math.nan, "bound": False, "chance": "", "source": source, "reason": ""}


def _binomial(n: int, share: float) -> dict[str, float]:
    tail = (1 - LEVEL) / 2
    return {"low": float(binom.ppf(tail, n, share)), "high": float(binom.ppf(1 - tail, n, share))}
