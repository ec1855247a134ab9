"""One SAE applied to two models on the same text: which features fire more after fine-tuning, which less.

Tokens of one row of text are not independent, so rows are the units: each gives one difference a feature.
Intervals are about other rows of such text. They know nothing of other fine-tunes, and any fine-tune changes a
little everywhere: with enough text everything is significant, so read the sizes, beside those of a null fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, ShapeMismatch, unknown_name
from saeffect.stats.arguments import FloatArray, check_level, check_resamples
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.stats.permutation import sign_flip_many

__all__ = ["CrossActivity", "PairedOptions"]

_FEATURES = 2048  # features tested at once: bounds the memory of float64 copies
_INTERVALS = ("t", "bootstrap")


@dataclass(frozen=True)
class PairedOptions:
    """How differences are tested.

    Attributes:
        interval: "t" (Student's, rows as units) or "bootstrap" (rows resampled, percentile).
        level: Confidence, between 0 and 1.
        n_boot: Resamples of rows.
        n_permutations: Random sign patterns, above 14 rows.
        seed: Seed of both.
    """

    interval: str = "t"
    level: float = 0.95
    n_boot: int = 2_000
    n_permutations: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.interval not in _INTERVALS:
            raise unknown_name("interval", self.interval, _INTERVALS, at="interval")
        check_level(self.level)
        check_resamples(self.n_boot, self.level)
        if self.n_permutations < 1:
            raise ConfigError(f"n_permutations must be at least 1. Got {self.n_permutations} instead.")


class CrossActivity:
    """Streaming differences of feature activity between two models, one a row of text and feature.

    Holds `n_rows × d_sae` differences twice in float32: 400 MB for 2,000 rows and 24,576 features.

    Args:
        d_sae: Number of features.

    Raises:
        ConfigError: `d_sae` is below 1.

    Example:
        >>> cross = CrossActivity(1)
        >>> cross.update(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[3.0], [1.0]]]))
        >>> cross.result()[["difference", "density_difference"]].loc[0].tolist()
        [1.5, 0.5]
    """

    def __init__(self, d_sae: int) -> None:
        if d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1. Got {d_sae} instead.", at="d_sae")
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
        """Add rows of text.

        Args:
            control: `feature_acts` [B, S, d_sae] of the SAE on the control model, any float dtype; active
                above 0.
            treatment: The same SAE, the same tokens, the treatment model.
            mask: bool [B, S], True at tokens that count; all if None. Rows without any are left out.

        Raises:
            ShapeMismatch: Shapes do not fit.
            BadFile: An activation that counts is NaN or infinite. No row of the batch is then counted.
        """
        if control.ndim != 3 or control.shape != treatment.shape or control.shape[2] != self.d_sae:
            raise ShapeMismatch(
                f"both activations must be [B, S, {self.d_sae}]. "
                f"Got {list(control.shape)} and {list(treatment.shape)} instead.",
                at="control, treatment",
            )
        if mask is not None and (mask.shape != control.shape[:2] or mask.dtype != torch.bool):
            raise ShapeMismatch(f"mask must be bool {list(control.shape[:2])}.", at="mask")
        rows = []
        for row in range(len(control)):
            counts = slice(None) if mask is None else mask[row]
            pair = [torch.clamp(one[row].detach()[counts].float(), min=0) for one in (control, treatment)]
            if len(pair[0]) == 0:
                continue
            sums = [one.sum(dim=0, dtype=torch.float64).cpu().numpy() for one in pair]
            if not all(np.isfinite(one).all() for one in sums):
                raise BadFile("an activation is NaN or infinite.", at="control, treatment")
            rows.append((len(pair[0]), sums, [(one > 0).sum(dim=0).cpu().numpy() for one in pair]))
        for n_tokens, sums, fired in rows:
            self._tokens.append(n_tokens)
            self._sums += sums
            self._fired += fired
            for kept, numbers in zip(self._differences, (sums, fired), strict=True):
                kept.append((numbers[1] - numbers[0]).astype(np.float32))

    def result(self, options: PairedOptions | None = None) -> pd.DataFrame:
        """One row a feature.

        Args:
            options: The defaults if None.

        Returns:
            `feature`; `mean_control`, `mean_treatment` (activation per token, off tokens as 0) and their
            `difference` with `low`, `high`, two-sided `p` (signs of rows flipped) and `q`
            (Benjamini-Hochberg over features); `density_control`, `density_treatment` (share of tokens on
            which it fires), `density_difference` with `density_low`, `_high`, `_p`, `_q`; `n_rows` on which
            the activations differ; `reason` where something is NaN. Differences are treatment minus control.
        """
        options = options or PairedOptions()
        n_tokens = np.array(self._tokens, dtype=np.float64)
        total = n_tokens.sum() if self.n_rows else np.nan
        means, densities = self._sums / total, self._fired / total
        silent = self._fired.sum(axis=0) == 0
        kept = [np.stack(one) if one else np.empty((0, self.d_sae), dtype=np.float32) for one in self._differences]
        tested = [_tested(one, n_tokens, silent, options) for one in kept]
        columns: dict[str, npt.NDArray[np.generic]] = {"feature": np.arange(self.d_sae)}
        for name, pair, prefix, found in (
            ("mean", means, "", tested[0]),
            ("density", densities, "density_", tested[1]),
        ):
            columns |= {f"{name}_control": pair[0], f"{name}_treatment": pair[1]}
            columns |= {f"{prefix}difference": pair[1] - pair[0]}
            columns |= {f"{prefix}{column}": values for column, values in found.items()}
        columns["n_rows"] = (kept[0] != 0).sum(axis=0)
        table = pd.DataFrame(columns)
        alike = np.isnan(tested[0]["low"]) | np.isnan(tested[1]["low"])
        reasons = [self._reason(*both) for both in zip(silent.tolist(), alike.tolist(), strict=True)]
        table["reason"] = pd.Series(reasons, dtype="str")
        return table

    def _reason(self, silent: bool, alike: bool) -> str:
        if self.n_rows == 0:
            return "no token of the text counts"
        if silent:
            return "it fires in neither model on this text"
        if self.n_rows == 1:
            return "one row of text shows no spread"
        return "every row of text differs alike, so there is no interval" if alike else ""


def _tested(
    differences: npt.NDArray[np.float32],
    n_tokens: FloatArray,
    silent: npt.NDArray[np.bool_],
    options: PairedOptions,
) -> dict[str, FloatArray]:
    """Interval, p and q of each feature from differences of row sums [n_rows, d_sae]."""
    n_rows, d_sae = differences.shape
    found = {name: np.full(d_sae, np.nan) for name in ("low", "high", "p")}
    if n_rows >= 2:
        features = np.flatnonzero(~silent)
        for start in range(0, len(features), _FEATURES):
            some = features[start : start + _FEATURES]
            sums = differences[:, some].astype(np.float64)
            found["low"][some], found["high"][some] = _interval(sums, n_tokens, options)
            found["p"][some] = sign_flip_many(
                sums.T, alternative="two-sided", n_permutations=options.n_permutations, seed=options.seed
            )
    return {**found, "q": benjamini_hochberg(found["p"])}


def _interval(sums: FloatArray, n_tokens: FloatArray, options: PairedOptions) -> tuple[FloatArray, FloatArray]:
    """Ends [n_features] for the mean per token, from row sums [n_rows, n_features] and row lengths [n_rows]."""
    n_rows = len(sums)
    total = n_tokens.sum()
    ends = (1 - options.level) / 2
    if options.interval == "bootstrap":
        rng = np.random.default_rng(options.seed)
        times = rng.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=options.n_boot).astype(np.float64)
        means = (times @ sums) / (times @ n_tokens)[:, None]
        low, high = np.quantile(means, [ends, 1 - ends], axis=0)
    else:
        # scipy.special rather than scipy.stats, which takes half a second to import.
        from scipy.special import stdtrit

        mean = sums.sum(axis=0) / total
        # The mean per token is a ratio when rows differ in length: its error is that of the residuals.
        residual = sums - n_tokens[:, None] * mean
        error = np.sqrt(n_rows / (n_rows - 1) * (residual**2).sum(axis=0)) / total
        half = float(stdtrit(n_rows - 1, 1 - ends)) * error
        low, high = mean - half, mean + half
    flat = np.ptp(sums / n_tokens[:, None], axis=0) == 0
    return np.where(flat, np.nan, low), np.where(flat, np.nan, high)
