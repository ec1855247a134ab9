"""How many findings chance alone would give, beside how many there are.

"Chance" is not one thing: each row says which. For what is counted in whole SAEs it is another SAE of the control's
model; for tests of single features it is a feature that does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit
from scipy.stats import binom

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.findings import MatchTables
from saeffect.comparison.measures import pass_counts
from saeffect.comparison.seeds import control_saes
from saeffect.diffing.cross_activity import activity_changes
from saeffect.stats.arguments import LEVEL

__all__ = ["chance_table"]

_ABSENT = {  # by side: the fate, and how it is called
    "control": ("gone", "control's features without a counterpart"),
    "treatment": ("new", "treatment's features that match nothing of the control's"),
}


def chance_table(arms: Mapping[str, ArmTables], roles: Roles, matches: MatchTables, *, alpha: float) -> pd.DataFrame:
    """What was found in the treatment, and how many such findings chance would give.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        matches: Which feature became which.
        alpha: Highest q of a finding about a single feature.

    Returns:
        One row a kind of finding: `finding`; `found` of them `among` so many; `expected` by chance, 95 % of the time
        from `low` to `high` (NaN where that is unknown, and `reason` says why); `bound`, whether `expected` is the
        most that chance gives rather than its mean; `chance`, what chance is here; `source`, the table.
    """
    treatment = arms[roles.treatment]
    rows = [_domain(treatment, control_saes(arms, roles)), *_steered(treatment, alpha), *_fates(matches.fate_counts)]
    return pd.DataFrame(rows + _cross(matches.cross_activity, alpha))


def _domain(treatment: ArmTables, saes: Sequence[ArmTables]) -> dict[str, Any]:
    """Domain features of one more SAE of the control's model, as its SAEs so far predict."""
    shares = np.array([len(sae.domain) / sae.n_features for sae in saes if sae.n_features])
    n, source = treatment.n_features, "arms/*/selection.parquet: is_domain"
    middle = float(shares.mean()) if len(shares) else math.nan
    row = _row("domain features", len(treatment.domain), n, n * middle, source,
               f"one more SAE of the control's model, as its {len(shares)} SAEs predict")  # fmt: skip
    if len(shares) < 2:
        reason = "one SAE of the control's model does not show how much seeds differ"
        return row | {"chance": "another SAE of the control's model", "reason": reason}
    # A prediction for one SAE more: its own spread and that of the mean.
    half = float(stdtrit(len(shares) - 1, (1 + LEVEL) / 2)) * float(shares.std(ddof=1)) * math.sqrt(1 + 1 / len(shares))
    return row | {"low": n * max(0.0, middle - half), "high": n * min(1.0, middle + half)}


def _steered(treatment: ArmTables, alpha: float) -> list[dict[str, Any]]:
    counts, effects = pass_counts(treatment), treatment.effects
    if effects is None or not counts.tested:
        return []
    tested, passed = counts.tested, counts.passed
    n_low = int((pd.to_numeric(effects["p"], errors="coerce") <= alpha).sum())
    source = f"arms/{treatment.name}/effects.parquet"
    rows = [
        _row(f"steered features with p ≤ {alpha:g}", n_low, tested, alpha * tested, f"{source}: p",
             "steering that does nothing") | _binomial(tested, alpha),
        _row(f"steered features that pass (q ≤ {alpha:g})", passed, tested, alpha * passed, f"{source}: q, passed",
             "false ones among those that pass, as Benjamini-Hochberg allows") | {"bound": True},
    ]  # fmt: skip
    if n := counts.paper_tested:
        rows.append(
            _row("steered features that pass by the paper's rule", counts.paper_passed, n, n / 2,
                 f"{source}: paper_pass", "one text against another of the same kind: heads or tails")
            | _binomial(n, 0.5)
        )  # fmt: skip
    return rows


def _fates(counts: pd.DataFrame) -> list[dict[str, Any]]:
    """Features without a counterpart, beside an SAE of another seed."""
    rows = []
    for count in counts.to_dict("records"):
        fate, name = _ABSENT[str(count["side"])]
        if count["fate"] != fate or math.isnan(float(count["n_placebo"])):
            continue
        found = float(count["n_treatment"])
        row = _row(f"{name}, {count['measure']}", found, int(count["n_features"]), float(count["n_placebo"]),
                   "comparison/fate_counts.parquet: n_treatment, n_placebo, excess",
                   "an SAE of another seed in the treatment's place")  # fmt: skip
        ends = {"low": found - float(count["high"]), "high": found - float(count["low"])}
        rows.append(row | ends | {"reason": str(count["reason"])})
    return rows


def _cross(cross: pd.DataFrame, alpha: float) -> list[dict[str, Any]]:
    if cross.empty or cross["q"].notna().sum() == 0:
        return []
    n_tested, n_found = int(cross["q"].notna().sum()), int((cross["q"] <= alpha).sum())
    source = "comparison/cross_activity.parquet: q, difference, is_domain"
    changed = _row(f"features that fire differently (q ≤ {alpha:g})", n_found, n_tested, alpha * n_found, source,
                   "false ones among those found, as Benjamini-Hochberg allows") | {"bound": True}  # fmt: skip
    changes = activity_changes(cross, alpha=alpha)
    more, domain = changes.more, changes.domain
    if not domain.any() or domain.all():
        return [changed]
    n, share = int(domain.sum()), float(more[~domain].mean())
    chance = f"as often as features outside the domain, {100 * share:.0f} % of which fire more"
    name = f"domain features that fire more (q ≤ {alpha:g})"
    return [changed, _row(name, int(more[domain].sum()), n, n * share, source, chance) | _binomial(n, share)]


def _row(finding: str, found: float, among: int, expected: float, source: str, chance: str) -> dict[str, Any]:
    row = {"finding": finding, "found": float(found), "among": among, "expected": expected}
    return row | {"low": math.nan, "high": math.nan, "bound": False, "chance": chance, "source": source, "reason": ""}


def _binomial(n: int, share: float) -> dict[str, float]:
    tail = (1 - LEVEL) / 2
    return {"low": float(binom.ppf(tail, n, share)), "high": float(binom.ppf(1 - tail, n, share))}
