"""What the model does and what the SAE does, one panel a quantity, each in its own unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from saeffect.errors import Undefined
from saeffect.report.figures.style import DASHED, INK, MUTED, ROLE_STYLES, Drawing, clean_axes, new_figure, safe_text
from saeffect.report.words.factorial import factorial_estimate, factorial_sentences

__all__ = ["factorial"]

# By effect: what is written beside it, colour, marker, size of the marker.
_MARKS: Mapping[str, tuple[str, str, str, float]] = {
    "model": ("model", ROLE_STYLES["treatment"].colour, "s", 6.5),
    "dictionary": ("SAE", ROLE_STYLES["control"].colour, "o", 6.5),
    "both": ("both", INK, "D", 5.0),
    "rest": ("rest", ROLE_STYLES["placebo"].colour, "|", 8.0),
}
_NOUNS = {"share": "percentage points", "share of tokens": "percentage points of tokens", "coherence": ""}


def factorial(table: pd.DataFrame) -> Drawing:
    """Dots with 95 % intervals: the effects of model, SAE, both together, and the rest; `Undefined` without any.

    `table` is that of `saeffect.comparison.factorial`.
    """
    rows = table[table["estimate"].notna()]
    names = list(dict.fromkeys(rows["quantity"]))
    if not names:
        reason = next((f": {reason}" for reason in table["reason"] if reason), "")
        raise Undefined(f"no quantity was measured with each SAE on both models{reason}.")
    figure = new_figure(0.3 + 1.16 * len(names))
    for ax, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        _panel(ax, rows[rows["quantity"] == name].set_index("effect"))
    return Drawing(
        figure,
        "Each arm's SAE, read and steered on both models; every quantity on its own scale, with 95 % intervals "
        "and, at the right, the value of the control's SAE on its own model. "
        "Model: the fine-tuned model minus the base model, with the same SAE. SAE: the treatment's SAE minus the "
        "control's, on the same model. Both: their sum, the difference between the arms. Rest: half of how much the "
        "model's part depends on the SAE. Intervals of the SAE's part hold for these two SAEs, not for other seeds.",
        " ".join(factorial_sentences(table).values()),
    )


def _panel(ax: Axes, rows: pd.DataFrame) -> None:
    first = rows.iloc[0]
    unit = str(first["unit"])
    factor = 100.0 if unit.startswith("share") else 1.0
    ends = factor * np.abs(rows[["low", "high", "estimate"]].to_numpy(dtype=float))
    reach = 1.08 * max(float(np.nanmax(ends)), 1e-12)
    ax.axvline(0, **DASHED)
    for line, (effect, (label, colour, marker, size)) in enumerate(_MARKS.items()):
        y = len(_MARKS) - 1 - line
        ax.text(-0.015, y, label, transform=ax.get_yaxis_transform(), color=colour, ha="right", va="center", size=8.2)
        if effect in rows.index:
            _mark(ax, y, rows.loc[effect], factor, (colour, marker, size))
    ax.set_title(safe_text(first["label"], 44), loc="left", size=8.8, pad=5)
    noun, start = _NOUNS.get(unit, unit), factor * float(first["mean_cc"])
    noun = f"{noun}, from {start:.3g}".removeprefix(", ").replace("-", "−") if np.isfinite(start) else noun
    ax.text(1.0, 1.04, noun, transform=ax.transAxes, size=7.8, color=MUTED, ha="right", va="bottom")
    ax.set(xlim=(-reach, reach), ylim=(-0.6, len(_MARKS) - 0.4), yticks=[])
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "−"))
    ax.tick_params(labelsize=8)
    clean_axes(ax, grid="x")


def _mark(ax: Axes, y: int, row: Mapping[Any, Any], factor: float, mark: tuple[str, str, float]) -> None:
    """An interval and its dot; a dot without an interval is hollow."""
    found, (colour, marker, size) = factorial_estimate(row), mark
    if found.defined:
        low, high = factor * found.low, factor * found.high
        ax.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
    face = colour if found.defined else "none"
    value = factor * found.value
    ax.plot([value], [y], marker, color=colour, markerfacecolor=face, markersize=size, markeredgewidth=1.4)
