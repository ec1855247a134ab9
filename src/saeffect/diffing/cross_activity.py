"""One SAE on two models and the same text: which features fire more after fine-tuning, which less.

Rows of text are the units, since tokens of a row are not independent. Intervals are over rows of such text, not over
fine-tunes. With enough text every difference is significant: compare sizes with those of a null fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtrit

from saeffect.diffing.pair import ModelPair
from saeffect.errors import BadFile, ShapeMismatch
from saeffect.stats.arguments import LEVEL, FloatArray
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.stats.permutation import sign_flip_many

if TYPE_CHECKING:  # reports read the finished table without torch
    from torch import Tensor

__all__ = [
    "ActivityChanges",
    "CrossActivity",
    "activity_changes",
    "beside_nulls",
    "change_scores",
    "fires_differently",
    "measure",
    "most_changed",
]

_CHUNK = 2048  # features tested at once: bounds the memory of float64 copies


def measure(pair: ModelPair) -> dict[str, pd.DataFrame]:
    """cross_activity: the control's SAE on both models, as `CrossActivity.result` gives it, with `is_domain`."""
    cross = CrossActivity(len(pair.control.W_dec))
    for batch in pair.acts_of_both():
        cross.update(*batch)
    table = cross.result(n_permutations=pair.resampling.n_permutations, seed=pair.resampling.seed)
    return {"cross_activity": table if pair.is_domain is None else table.assign(is_domain=pair.is_domain)}


class CrossActivity:
    """Streaming differences of feature activity between two models, by row of text and feature.

    Holds `n_rows × d_sae` differences twice in float32: 400 MB for 2,000 rows and 24,576 features.

    Example:
        >>> import torch
        >>> cross = CrossActivity(1)
        >>> cross.update(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[3.0], [1.0]]]))
        >>> cross.result()[["difference", "density_difference"]].loc[0].tolist()
        [1.5, 0.5]
    """

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self._sums = np.zeros((2, d_sae))  # of activations: control, treatment
        self._fired = np.zeros((2, d_sae))
        self._tokens: list[int] = []  # of each row
        self._differences: tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]] = ([], [])

    @property
    def n_rows(self) -> int:
        """Rows of text with at least one token that counts."""
        return len(self._tokens)

    def update(self, control: Tensor, treatment: Tensor, mask: Tensor | None = None) -> None:
        """Add rows of text: `feature_acts` [B, S, d_sae] of the SAE on each model, any float dtype, active above 0.

        `mask` is bool [B, S], True at tokens that count (all if None); rows without any are left out. `ShapeMismatch`
        if shapes do not fit, `BadFile` for an activation that is NaN or infinite; no row of the batch is then counted.
        """
        if control.ndim != 3 or control.shape != treatment.shape or control.shape[2] != self.d_sae:
            raise ShapeMismatch(
                f"both activations must be [B, S, {self.d_sae}]. "
                f"Got {list(control.shape)} and {list(treatment.shape)} instead.",
                at="control, treatment",
            )
        if mask is not None and (mask.shape != control.shape[:2] or str(mask.dtype) != "torch.bool"):
            raise ShapeMismatch(f"mask must be bool {list(control.shape[:2])}.", at="mask")
        rows = []
        for row in range(len(control)):
            counted = slice(None) if mask is None else mask[row]
            pair = [acts[row].detach()[counted].float().clamp(min=0) for acts in (control, treatment)]
            if len(pair[0]) == 0:
                continue
            sums = [acts.double().sum(dim=0).cpu().numpy() for acts in pair]
            if not all(np.isfinite(total).all() for total in sums):
                raise BadFile("an activation is NaN or infinite.", at="control, treatment")
            rows.append((len(pair[0]), sums, [(acts > 0).sum(dim=0).cpu().numpy() for acts in pair]))
        for n_tokens, sums, fired in rows:
            self._tokens.append(n_tokens)
            self._sums += sums
            self._fired += fired
            for stored, values in zip(self._differences, (sums, fired), strict=True):
                stored.append((values[1] - values[0]).astype(np.float32))

    def result(self, *, n_permutations: int = 10_000, seed: int = 0) -> pd.DataFrame:
        """One row a feature; `n_permutations` random sign patterns are drawn from `seed` above 14 rows.

        `feature`; `mean_control`, `mean_treatment` (activation per token, inactive ones as 0) and their `difference`
        (treatment minus control, as all) with `low`, `high` (95 %, Student's t over rows), two-sided `p` (sign flips of
        rows) and `q` (Benjamini-Hochberg over features); `density_control`, `density_treatment` (share of tokens on
        which it fires), `density_difference` with `density_low`, `_high`, `_p`, `_q`; `n_rows` on which the activations
        differ; `reason` where something is NaN.
        """
        n_tokens = np.array(self._tokens, dtype=np.float64)
        total = n_tokens.sum() if self.n_rows else np.nan
        silent = self._fired.sum(axis=0) == 0
        rows = [np.stack(by_row) if by_row else np.empty((0, self.d_sae), np.float32) for by_row in self._differences]
        table = pd.DataFrame({"feature": np.arange(self.d_sae)})
        without_interval = np.zeros(self.d_sae, dtype=bool)
        for name, values, prefix, differences in (
            ("mean", self._sums / total, "", rows[0]),
            ("density", self._fired / total, "density_", rows[1]),
        ):
            tested = _test_differences(differences, n_tokens, silent, n_permutations, seed)
            without_interval |= np.isnan(tested["low"])
            columns = {
                f"{name}_control": values[0],
                f"{name}_treatment": values[1],
                f"{prefix}difference": values[1] - values[0],
            }
            table = table.assign(**columns, **{prefix + column: array for column, array in tested.items()})
        reasons = [self._reason(*flags) for flags in zip(silent.tolist(), without_interval.tolist(), strict=True)]
        return table.assign(n_rows=(rows[0] != 0).sum(axis=0), reason=pd.Series(reasons, dtype="str"))

    def _reason(self, silent: bool, without_interval: bool) -> str:
        if self.n_rows == 0:
            return "no token of the text counts"
        if silent:
            return "it fires in neither model on this text"
        if self.n_rows == 1:
            return "one row of text shows no spread"
        return "every row of text differs alike, so there is no interval" if without_interval else ""


def _test_differences(
    differences: npt.NDArray[np.float32],
    n_tokens: FloatArray,
    silent: npt.NDArray[np.bool_],
    n_permutations: int,
    seed: int,
) -> dict[str, FloatArray]:
    """Interval, p and q of each feature from differences of row sums [n_rows, d_sae]."""
    n_rows, d_sae = differences.shape
    low, high, p = np.full((3, d_sae), np.nan)
    if n_rows >= 2:
        features = np.flatnonzero(~silent)
        for start in range(0, len(features), _CHUNK):
            chunk = features[start : start + _CHUNK]
            sums = differences[:, chunk].astype(np.float64)
            low[chunk], high[chunk] = _interval(sums, n_tokens)
            p[chunk] = sign_flip_many(sums.T, alternative="two-sided", n_permutations=n_permutations, seed=seed)
    return {"low": low, "high": high, "p": p, "q": benjamini_hochberg(p)}


def _interval(sums: FloatArray, n_tokens: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Ends [n_features] for the mean per token, from row sums [n_rows, n_features] and row lengths [n_rows]."""
    n_rows, total = len(sums), n_tokens.sum()
    mean = sums.sum(axis=0) / total
    # The mean per token is a ratio when rows differ in length: its error is that of the residuals.
    residual = sums - n_tokens[:, None] * mean
    error = np.sqrt(n_rows / (n_rows - 1) * (residual**2).sum(axis=0)) / total
    half_width = float(stdtrit(n_rows - 1, (1 + LEVEL) / 2)) * error
    flat = np.ptp(sums / n_tokens[:, None], axis=0) == 0
    return np.where(flat, np.nan, mean - half_width), np.where(flat, np.nan, mean + half_width)


@dataclass(frozen=True, eq=False)
class ActivityChanges:
    """Tested features, one entry each: fires `more` or `less` (q at most alpha), is of the `domain`."""

    more: pd.Series[Any]
    less: pd.Series[Any]
    domain: pd.Series[Any]


def beside_nulls(cross: pd.DataFrame, changes: pd.DataFrame) -> pd.DataFrame:
    """`CrossActivity.result` with the columns `q_nulls` and `n_nulls`: of each feature's change of activity against
    null fine-tunes, from the table `changes` of the stage of that name. Unchanged where there are too few nulls.
    """
    if cross.empty or "n_nulls" not in changes:
        return cross
    read = changes[(changes["basis"] == "read") & changes["z"].notna()].set_index("feature")  # no z with too few nulls
    if read.empty:
        return cross
    return cross.assign(q_nulls=cross["feature"].map(read["q"]), n_nulls=int(read["n_nulls"].iloc[0]))


def fires_differently(cross: pd.DataFrame, alpha: float) -> pd.Series[Any]:
    """Whether each feature's q is at most `alpha`, over rows of text and, where there are nulls, against them."""
    found = cross["q"] <= alpha
    return found & (cross["q_nulls"] <= alpha) if "q_nulls" in cross else found


def activity_changes(cross: pd.DataFrame, *, alpha: float) -> ActivityChanges:
    """Features that fire more, less, and are of the domain, from a non-empty table of `CrossActivity.result`, with
    nulls (`beside_nulls`) or without.
    """
    tested = cross[cross["q"].notna() & (cross["q_nulls"].notna() if "q_nulls" in cross else True)]
    significant = fires_differently(tested, alpha)
    no_domain = pd.Series(False, index=tested.index)
    domain = tested["is_domain"].astype(bool) if "is_domain" in tested else no_domain
    return ActivityChanges(significant & (tested["difference"] > 0), significant & (tested["difference"] < 0), domain)


def change_scores(cross: pd.DataFrame) -> FloatArray:
    """How much each feature changed, float64 [n]; NaN where it fires in neither model.

    The change of the mean activation, divided by the square root of the mean over both models (the scale of the noise
    of rare events), so that neither features that are always on nor those that fired once rank first.

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
    """Rows of `CrossActivity.result` that fire differently at `alpha`, most changed first, with their `score`."""
    if cross.empty:
        return cross.assign(score=pd.Series(dtype="float64"))
    rows = cross.assign(score=change_scores(cross))
    rows = rows[fires_differently(rows, alpha) & rows["score"].notna()]
    if domain_only:
        rows = rows[rows["is_domain"].astype(bool)] if "is_domain" in rows else rows.head(0)
    order = np.argsort(-rows["score"].abs().to_numpy(), kind="stable")
    return rows.iloc[order].reset_index(drop=True)
