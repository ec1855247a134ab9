"""How many findings chance alone would give, beside how many there are.

"Chance" is not one thing: each row says which. For what is counted in whole SAEs it is another SAE of the control's
model; for tests of single features it is a feature that does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from saeffect.stats.resampling import LEVEL

__all__ = ["chance_table"]

_COLUMNS = ("finding", "found", "among", "expected", "low", "high", "bound", "chance", "source", "reason")
_ABSENT = {"control": ("gone", "control's features without a counterpart"), "treatment": ("new", "treatment's features "
           "that match nothing of the control's")}  # fmt: skip


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
    rows = [_domain(arms, roles), *_steered(treatment, alpha), *_fates(matches.fate_counts)]
    rows += _cross(matches.cross_activity, alpha)
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype({"bound": "bool"})


def _domain(arms: Mapping[str, ArmTables], roles: Roles) -> dict[str, Any]:
    """Domain features of one more SAE of the control's model, as its SAEs so far predict."""
    treatment, saes = arms[roles.treatment], control_saes(arms, roles)
    shares = np.array([len(sae.domain) / sae.n_features for sae in saes if sae.n_features])
    n = treatment.n_features
    row = _row("domain features", len(treatment.domain), n, float(n * shares.mean()) if len(shares) else math.nan)
    row["source"] = "arms/*/selection.parquet: is_domain"
    row["chance"] = f"one more SAE of the control's model, as its {len(shares)} SAEs predict"
    if len(shares) < 2:
        return row | {
            "chance": "another SAE of the control's model",
            "reason": "one SAE of the control's model does not show how much seeds differ",
        }
    # A prediction for one SAE more: its own spread and that of the mean.
    half = float(stdtrit(len(shares) - 1, (1 + LEVEL) / 2)) * float(shares.std(ddof=1)) * math.sqrt(1 + 1 / len(shares))
    middle = float(shares.mean())
    return row | {"low": n * max(0.0, middle - half), "high": n * min(1.0, middle + half)}


def _steered(treatment: ArmTables, alpha: float) -> list[dict[str, Any]]:
    counts = pass_counts(treatment)
    if not counts.tested:
        return []
    effects = treatment.effects
    assert effects is not None  # what was counted
    p = pd.to_numeric(effects["p"], errors="coerce")
    source = f"arms/{treatment.name}/effects.parquet"
    low_p = _row(f"steered features with p ≤ {alpha:g}", int((p <= alpha).sum()), counts.tested, alpha * counts.tested)
    passing = _row(f"steered features that pass (q ≤ {alpha:g})", counts.passed, counts.tested, alpha * counts.passed)
    rows = [
        low_p | _binomial(counts.tested, alpha) | {"chance": "steering that does nothing", "source": f"{source}: p"},
        passing
        | {
            "bound": True,
            "chance": "false ones among those that pass, as Benjamini-Hochberg allows",
            "source": f"{source}: q, passed",
        },
    ]
    if counts.paper_tested:
        n = counts.paper_tested
        paper = _row("steered features that pass by the paper's rule", counts.paper_passed, n, n / 2)
        chance = "one text against another of the same kind: heads or tails"
        rows.append(paper | _binomial(n, 0.5) | {"chance": chance, "source": f"{source}: paper_pass"})
    return rows


def _fates(counts: pd.DataFrame) -> list[dict[str, Any]]:
    """Features without a counterpart, beside an SAE of another seed."""
    rows = []
    for one in counts.to_dict("records"):
        fate, name = _ABSENT[str(one["side"])]
        if one["fate"] != fate or math.isnan(float(one["n_placebo"])):
            continue
        found = float(one["n_treatment"])
        row = _row(f"{name}, {one['measure']}", found, int(one["n_features"]), float(one["n_placebo"]))
        row |= {"low": found - float(one["high"]), "high": found - float(one["low"])}
        row |= {"chance": "an SAE of another seed in the treatment's place", "reason": str(one["reason"])}
        rows.append(row | {"source": "comparison/fate_counts.parquet: n_treatment, n_placebo, excess"})
    return rows


def _cross(cross: pd.DataFrame, alpha: float) -> list[dict[str, Any]]:
    if cross.empty or cross["q"].notna().sum() == 0:
        return []
    tested = cross[cross["q"].notna()]
    found = tested["q"] <= alpha
    changed = _row(f"features that fire differently (q ≤ {alpha:g})", int(found.sum()), len(tested),
                   alpha * int(found.sum()))  # fmt: skip
    source = "comparison/cross_activity.parquet: q, difference, is_domain"
    chance = "false ones among those found, as Benjamini-Hochberg allows"
    rows = [changed | {"bound": True, "chance": chance, "source": source}]
    changes = activity_changes(cross, alpha=alpha)
    more, domain = changes.more, changes.domain
    if not domain.any() or domain.all():
        return rows
    n, share = int(domain.sum()), float(more[~domain].mean())
    row = _row(f"domain features that fire more (q ≤ {alpha:g})", int(more[domain].sum()), n, n * share)
    chance = f"as often as features outside the domain, {100 * share:.0f} % of which fire more"
    return [*rows, row | _binomial(n, share) | {"chance": chance, "source": source}]


def _row(finding: str, found: float, among: int, expected: float) -> dict[str, Any]:
    nothing = {"low": math.nan, "high": math.nan, "bound": False, "chance": "", "source": "", "reason": ""}
    return {"finding": finding, "found": float(found), "among": among, "expected": expected, **nothing}


def _binomial(n: int, share: float) -> dict[str, float]:
    tail = (1 - LEVEL) / 2
    return {"low": float(binom.ppf(tail, n, share)), "high": float(binom.ppf(1 - tail, n, share))}
