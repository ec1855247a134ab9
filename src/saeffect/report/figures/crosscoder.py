"""Features of a crosscoder between the two models, beside those of crosscoders of null fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saeffect.diffing.latent_scaling import null_cuts
from saeffect.errors import Undefined
from saeffect.report.figures.style import DASHED, MUTED, clean_axes, new_figure

__all__ = ["latent_scaling"]

_CHANGED, _NULL = "#e69f00", "#b6c0ca"
_BINS: list[float] = np.linspace(-1.0, 1.0, 81).tolist()


def latent_scaling(table: pd.DataFrame, nulls: Sequence[pd.DataFrame], *, rate: float = 0.05) -> Figure:
    """Where features lean: to the base model (-1) or to the tuned one (1), with the nulls' features in grey.

    `table` as `against_nulls` gives it, `nulls` as `LatentScaling.result` does. Undefined if no feature fires.
    """
    lean = table["lean"].dropna()
    if lean.empty:
        raise Undefined("no feature of the crosscoder fires on this text.")
    figure = new_figure(2.6)
    axes = figure.subplots()
    axes.hist(lean.clip(-1, 1), _BINS, color=_CHANGED, log=True, label="this fine-tune")
    if nulls:
        pooled = pd.concat([null["lean"] for null in nulls]).dropna().clip(-1, 1)
        weights = np.full(len(pooled), len(lean) / max(len(pooled), 1))
        axes.hist(pooled, _BINS, weights=weights, color=_NULL, log=True, alpha=0.85, label="null fine-tunes, to scale")
        cuts = null_cuts(nulls, rate=rate)
        for cut in (cuts.base, cuts.tuned):
            axes.axvline(cut, **DASHED)
        called = int(((lean < cuts.base) | (lean > cuts.tuned)).sum())
        axes.set_title(
            f"{called:,} of {len(lean):,} features outside, {rate * len(lean):,.0f} expected by chance", size=8.2
        )
    axes.set_xlabel("← in the base model alone     in both alike     in the fine-tuned model alone →", size=8.2)
    axes.set_ylabel("features", size=8.2)
    axes.tick_params(colors=MUTED)
    axes.legend(fontsize=7.5, frameon=False)
    clean_axes(axes, grid="y")
    return figure
