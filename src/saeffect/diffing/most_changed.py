"""Which features fire more in the fine-tuned model, which less: the most changed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saeffect.stats.arguments import FloatArray

__all__ = ["ActivityChanges", "activity_changes", "change_scores", "most_changed"]


@dataclass(frozen=True, eq=False)
class ActivityChanges:
    """Features that could be tested, one entry each.

    Attributes:
        more: Fires more in the fine-tuned model, with q at most alpha.
        less: Fires less.
        domain: Belongs to the domain; False for all where the table does not say.
    """

    more: pd.Series[Any]
    less: pd.Series[Any]
    domain: pd.Series[Any]


def activity_changes(cross: pd.DataFrame, *, alpha: float) -> ActivityChanges:
    """Which of the features that could be tested fire more, which less, and which are of the domain.

    Args:
        cross: The table of `CrossActivity.result`, not empty.
        alpha: Highest q of a finding.
    """
    tested = cross[cross["q"].notna()]
    found = tested["q"] <= alpha
    no_domain = pd.Series(False, index=tested.index)
    domain = tested["is_domain"].astype(bool) if "is_domain" in tested else no_domain
    return ActivityChanges(found & (tested["difference"] > 0), found & (tested["difference"] < 0), domain)


def change_scores(cross: pd.DataFrame) -> FloatArray:
    """How much each feature changed, float64 [n]; NaN where it fires in neither model.

    The change of the mean activation per token, divided by the square root of the mean activation per token of both
    models together. Plain changes are led by features that are always on, relative ones by those that fired once;
    the root lies between them, and is the scale on which a sum of rare events varies.

    Args:
        cross: The table of `CrossActivity.result`.

    Example:
        >>> table = pd.DataFrame({"mean_control": [1.0, 0.0], "mean_treatment": [7.0, 0.0], "difference": [6.0, 0.0]})
        >>> change_scores(table).tolist()
        [3.0, nan]
    """
    level = (cross["mean_control"] + cross["mean_treatment"]).to_numpy(dtype=np.float64) / 2
    difference = cross["difference"].to_numpy(dtype=np.float64)
    scores = np.full(len(cross), np.nan)
    np.divide(difference, np.sqrt(level, where=level > 0, out=np.ones_like(level)), out=scores, where=level > 0)
    return scores


def most_changed(cross: pd.DataFrame, *, alpha: float, domain_only: bool = False) -> pd.DataFrame:
    """Features whose activations differ with q at most `alpha`, most changed first, with their `score`.

    Args:
        cross: The table of `CrossActivity.result`.
        alpha: Highest q of a finding.
        domain_only: Only those with `is_domain`.
    """
    if cross.empty:
        return cross.assign(score=pd.Series(dtype="float64"))
    rows = cross.assign(score=change_scores(cross))
    rows = rows[(rows["q"] <= alpha) & rows["score"].notna()]
    if domain_only:
        rows = rows[rows["is_domain"].astype(bool)] if "is_domain" in rows else rows.head(0)
    order = np.argsort(-rows["score"].abs().to_numpy(), kind="stable")
    return rows.iloc[order].reset_index(drop=True)
