"""How far raters agree, how often each says yes to a decoy, and on which features they disagree."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from saeffect.review.verdicts import VERDICTS
from saeffect.stats.agreement import cohens_kappa, fleiss_kappa, krippendorff_alpha, percent_agreement
from saeffect.stats.estimate import Estimate
from saeffect.stats.proportions import wilson

__all__ = ["agreement", "disagreements", "rater_summary"]

_MAX_PAIRS = 45  # ten raters
_ALL_RATERS = (("percentage", percent_agreement), ("Fleiss' kappa", fleiss_kappa), ("alpha", krippendorff_alpha))

Feature = tuple[str, int]


def agreement(verdicts: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Agreement of the raters on the candidates: yes, no and unsure are three labels.

    `verdicts` has arm, feature, rater, verdict, without adjudications; those not given blind (column `blind`, if it is
    there) are left out. First over all raters, then for each pair (for up to ten raters): measure ("percentage",
    "Fleiss' kappa", "alpha" (Krippendorff's), for pairs "percentage" and "Cohen's kappa"), a, b (raters; "" for all),
    n_raters, value, low, high (95 %, resampling features), n (features that count), reason. No rows for fewer than two
    raters.
    """
    table = _by_rater(verdicts[_blind(verdicts)])
    n_raters = table.shape[1]
    rows = []
    for name, measure in _ALL_RATERS if n_raters > 1 else ():
        rows.append(_row(name, "", "", n_raters, measure(table, n_boot=n_boot, seed=seed)))
    pairs = list(combinations(table.columns, 2))
    for a, b in pairs if len(pairs) <= _MAX_PAIRS else ():
        pair = table[[a, b]].dropna()
        if n_raters > 2:  # for two raters the first rows have it
            rows.append(_row("percentage", a, b, 2, percent_agreement(pair, n_boot=n_boot, seed=seed)))
        kappa = cohens_kappa(pair[a].tolist(), pair[b].tolist(), n_boot=n_boot, seed=seed)
        rows.append(_row("Cohen's kappa", a, b, 2, kappa))
    columns = ["measure", "a", "b", "n_raters", "value", "low", "high", "n", "reason"]
    return pd.DataFrame(rows, columns=columns)


def rater_summary(verdicts: pd.DataFrame, candidates: Collection[Feature]) -> pd.DataFrame:
    """Verdicts of each rater, and the rate of yes to decoys: features outside `candidates` (arm, number), and shuffled
    ones.

    `verdicts` as in `agreement`, with decoys and a column kind. One row a rater, by name: rater; judged (candidates),
    n_yes, n_no, n_unsure, n_not_blind (saw those of others); and for each kind of decoy, `other` and `shuffled`:
    <kind>_judged, <kind>_yes, <kind>_rate (share of yes) with its 95 % interval (Wilson's) <kind>_low, <kind>_high; NaN
    without a decoy judged.
    """
    candidate_set = set(candidates)
    kinds = np.array(
        [
            kind if kind == "shuffled" else "candidate" if (arm, feature) in candidate_set else "other"
            for kind, arm, feature in zip(verdicts["kind"], verdicts["arm"], verdicts["feature"], strict=True)
        ],
        dtype=object,
    )
    rows = []
    for rater in sorted(verdicts["rater"].unique()):
        by_rater = verdicts["rater"] == rater
        answers = verdicts.loc[by_rater & (kinds == "candidate"), "verdict"]
        row: dict[str, Any] = {"rater": rater, "judged": len(answers)}
        row |= {f"n_{verdict}": int((answers == verdict).sum()) for verdict in VERDICTS}
        row["n_not_blind"] = int((by_rater & (kinds == "candidate") & ~_blind(verdicts)).sum())
        for kind in ("other", "shuffled"):
            decoys = verdicts.loc[by_rater & (kinds == kind), "verdict"]
            rate = wilson(int((decoys == "yes").sum()), len(decoys))
            row |= {f"{kind}_judged": len(decoys), f"{kind}_yes": int((decoys == "yes").sum())}
            row |= {f"{kind}_rate": rate.value, f"{kind}_low": rate.low, f"{kind}_high": rate.high}
        rows.append(row)
    numbers = [f"{kind}_{what}" for kind in ("other", "shuffled") for what in ("judged", "yes", "rate", "low", "high")]
    counts = [f"n_{verdict}" for verdict in (*VERDICTS, "not_blind")]
    return pd.DataFrame(rows, columns=["rater", "judged", *counts, *numbers])


def disagreements(verdicts: pd.DataFrame, adjudications: pd.DataFrame) -> pd.DataFrame:
    """Features that need an adjudication: some raters say yes and some no, or all are unsure.

    One row a feature, ties first, then by arm and number: arm, feature, n_yes, n_no, n_unsure, decided (yes, no,
    unsure, or "" for open, from the `adjudications` that stand: arm, feature, verdict).
    """
    counts = verdicts.groupby(["arm", "feature"])["verdict"].value_counts().unstack(fill_value=0)
    counts = counts.reindex(columns=list(VERDICTS), fill_value=0)
    split = counts[((counts["yes"] > 0) & (counts["no"] > 0)) | ((counts["yes"] == 0) & (counts["no"] == 0))]
    rows = split.rename(columns={verdict: f"n_{verdict}" for verdict in VERDICTS}).reset_index()
    rows.columns.name = None
    decided = dict(
        zip(zip(adjudications["arm"], adjudications["feature"], strict=True), adjudications["verdict"], strict=True)
    )
    keys = zip(rows["arm"], rows["feature"], strict=True)
    rows["decided"] = pd.Series([decided.get(key, "") for key in keys], dtype=object)
    tied = (rows["n_yes"] - rows["n_no"]).abs()
    return rows.assign(tied=tied).sort_values(["tied", "arm", "feature"]).drop(columns="tied").reset_index(drop=True)


def _blind(verdicts: pd.DataFrame) -> pd.Series[bool]:
    """Which verdicts were given blind: all of them without a column `blind`."""
    blind = verdicts["blind"] if "blind" in verdicts else pd.Series(True, index=verdicts.index)
    return blind.astype(bool)


def _by_rater(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row a feature, one column a rater (by name); None where a rater did not judge it."""
    table = verdicts.pivot_table(index=["arm", "feature"], columns="rater", values="verdict", aggfunc="last")
    return table.astype(object).where(table.notna(), None)


def _row(measure: str, a: str, b: str, n_raters: int, estimate: Estimate) -> dict[str, Any]:
    return {
        "measure": measure,
        "a": a,
        "b": b,
        "n_raters": n_raters,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
        "reason": estimate.reason,
    }
