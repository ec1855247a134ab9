"""Figure 6: the search for the dose."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.ticker import MaxNLocator

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    INK,
    MUTED,
    ArmStyle,
    DrawnFigure,
    arm_styles,
    clean_axes,
    new_figure,
    safe_text,
)

__all__ = ["doses"]

_LABELS = {
    "similarity": "similarity",
    "effect": "effect: steered − placebo",
    "gain": "gain: steered − unsteered similarity",
    "fluency": "fluency, 1 is that of the unsteered text",
    "score": "score: gain × fluency",
    "distinct2": "distinct word pairs",
    "perplexity": "perplexity under the unsteered model",
    "kl": "KL from unsteered (nats)",
    "direct_effect": "direct effect (nats)",
    "delta_logprob": "direct effect (nats)",
}
_FIRST = ("gain", "effect", "fluency", "score")  # what the choice was made of
_NOT_DRAWN = {"dose", "chosen", "n", "n_pairs", "n_trials", "n_features", "coefficient"}


def doses(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Every number of the dose search against the dose, one panel each; the chosen dose is marked."""
    del comparison
    table = context.doses
    if table is None or table.empty or "dose" not in table.columns:
        raise Undefined("no dose search was recorded.")
    measures = [
        column
        for column in table.columns
        if column not in _NOT_DRAWN
        and not column.endswith(("_low", "_high"))
        and pd.api.types.is_numeric_dtype(table[column])
        and not pd.api.types.is_bool_dtype(table[column])
        and table[column].notna().any()
    ]
    measures = [name for name in _FIRST if name in measures] or measures[:4]
    if not measures:
        raise Undefined("the dose search has no numbers to draw.")
    figure = new_figure(0.5 + 1.45 * len(measures))
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    names = list(dict.fromkeys(table["arm"])) if "arm" in table.columns else [""]
    looks = arm_styles([(str(name), styles[name].role if name in styles else "") for name in names])
    chosen = sorted(set(table.loc[table["chosen"].astype(bool), "dose"])) if "chosen" in table.columns else []
    for ax, measure in zip(panels, measures, strict=True):
        for dose in chosen:
            ax.axvline(dose, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for name in names:
            rows = (table[table["arm"] == name] if name else table).sort_values("dose")
            style = looks[str(name)]
            colour = style.colour if name else INK
            ax.plot(rows["dose"], rows[measure], marker=style.marker, color=colour, linestyle=style.line,
                    markersize=4.5, linewidth=1.5, label=safe_text(name, 24))  # fmt: skip
        ax.set_title(_LABELS.get(measure, safe_text(measure.replace("_", " "))), size=8.8)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        clean_axes(ax, grid="y")
    for dose in chosen:
        panels[0].annotate(f"chosen: {dose:g}", (dose, 1.0), xycoords=("data", "axes fraction"), xytext=(5, -2),
                           textcoords="offset points", va="top", color=MUTED, size=8)  # fmt: skip
    panels[-1].set_xlabel("dose (multiples of the hook's mean residual norm)")
    if names != [""]:
        panels[-1].legend(loc="best")
    return DrawnFigure(
        name="figure_6_doses",
        number="Figure 6",
        title="How the dose was chosen",
        caption="The dose search, on prompts that the test does not use. The dashed line is the dose that was chosen.",
        alt="Dose search; chosen dose: " + (", ".join(f"{dose:g}" for dose in chosen) or "none") + ".",
        figure=figure,
    )
