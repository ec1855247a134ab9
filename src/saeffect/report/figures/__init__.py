"""The report's figures. In: a comparison and the study around it. Out: each figure with its caption, as SVG and PNG.

A figure is a function that gives a `Drawing`, and an entry in `FIGURES`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from saeffect.comparison import Comparison
from saeffect.io import atomic_path
from saeffect.report.context import ReportContext
from saeffect.report.figures.distributions import coherence, density, match_counts, mean_activation, top_token_weights
from saeffect.report.figures.evidence import calibration, contrasts, partial_residuals
from saeffect.report.figures.learned import crossed, learned, put_back
from saeffect.report.figures.matching import cross_activity, fates
from saeffect.report.figures.steering import doses, forests
from saeffect.report.figures.style import DrawnFigure, FigureKind, drawn_into
from saeffect.report.figures.where import where, written

__all__ = ["FIGURES", "DrawnFigure", "draw_figures", "drawn_into", "write_figures"]

FIGURES = [
    FigureKind(
        "learned",
        "What changed beyond null fine-tunes",
        learned,
        "comparison/change_groups.parquet, columns tokens, score, claimed; comparison/null_groups.parquet: highest",
    ),
    FigureKind(
        "where",
        "Where the model changed",
        where,
        "comparison/change_by_layer.parquet, change_by_word.parquet",
    ),
    FigureKind("written", "What it writes more often", written, "comparison/written_words.parquet"),
    FigureKind("put_back", "What the changed features cause", put_back, "comparison/put_back.parquet"),
    FigureKind("crossed", "What the model does, and what the SAE does", crossed, "comparison/factorial.parquet"),
    FigureKind(
        "calibration",
        "False alarms beside findings",
        calibration,
        "comparison/calibration.parquet, columns rate, low, high, nominal, treatment_findings, treatment_tests",
    ),
    FigureKind("effects", "Effects of steering", forests, group="effects"),
    FigureKind(
        "doses",
        "What more of a dose does",
        doses,
        "steering/dose_response.parquet, means by arm, condition and dose of gain, direct_effect, perplexity, "
        "distinct2, score",
    ),
    FigureKind(
        "match_counts",
        "How many {domain} words the features promote",
        match_counts,
        "comparison/match_counts.parquet, columns arm, matches, n",
        paper="Figure 1",
    ),
    FigureKind(
        "top_token_weights",
        "How strongly domain features promote their top tokens",
        top_token_weights,
        "comparison/weights.parquet, columns arm, weight",
        group="distributions",
        paper="Figure 2",
    ),
    FigureKind(
        "mean_activation",
        "How strongly domain features fire",
        mean_activation,
        "comparison/activity.parquet, columns arm, mean_activation",
        group="distributions",
    ),
    FigureKind(
        "density",
        "How often domain features fire",
        density,
        "comparison/activity.parquet, columns arm, density",
        group="distributions",
    ),
    FigureKind(
        "coherence",
        "How coherent domain features are",
        coherence,
        "arms/*/coherence.parquet, column coherence, features with is_domain in selection.parquet",
    ),
    FigureKind(
        "contrasts",
        "Is it more than SAE noise?",
        contrasts,
        "comparison/contrasts.parquet, columns estimate, low, high",
    ),
    FigureKind(
        "fates_by_decoder",
        "Which feature became which, by what they write",
        partial(fates, measure="decoder cosine"),
        "comparison/fate_counts.parquet, rows of the decoder cosine: n_treatment, n_placebo, excess, called",
        group="fates",
    ),
    FigureKind(
        "fates_by_activation",
        "Which feature became which, by when they fire",
        partial(fates, measure="activation correlation"),
        "comparison/fate_counts.parquet, rows of the activation correlation: n_treatment, n_placebo, excess, called",
        group="fates",
    ),
    FigureKind(
        "cross_activity",
        "Which features fire more after fine-tuning",
        cross_activity,
        "comparison/cross_activity.parquet, columns mean_control, mean_treatment, q, is_domain",
    ),
    FigureKind(
        "partial_residuals",
        "What goes with a strong effect",
        partial_residuals,
        "comparison/partial_residuals.parquet, columns term, x, residual, arm; regression.parquet: estimate",
    ),
]
"""In the order of the page, which numbers them; one that no section of the page names comes last, under "Further"."""


def draw_figures(
    comparison: Comparison, context: ReportContext | None = None, *, only: Collection[str] | None = None
) -> tuple[DrawnFigure, ...]:
    """Draw every figure, or those named in `only`, in the report's order.

    A figure without data carries the reason instead of a drawing.
    """
    context = context or ReportContext()
    kinds = [kind for kind in FIGURES if only is None or kind.name in only]
    return tuple(figure for kind in kinds for figure in kind.drawn(comparison, context))


def write_figures(
    comparison: Comparison, folder: Path | str, *, context: ReportContext | None = None
) -> tuple[DrawnFigure, ...]:
    """Write each figure as `<name>.svg` and `<name>.png` (200 dots per inch), atomically; `folder` is made if missing.

    Returns the figures for `write_report`; one without data has no files and carries the reason.
    """
    figures = draw_figures(comparison, context)
    for figure in figures:
        if figure.figure is not None:
            with atomic_path(Path(folder) / f"{figure.name}.svg") as temporary:
                temporary.write_text(figure.svg, encoding="utf-8")
            with atomic_path(Path(folder) / f"{figure.name}.png") as temporary:
                temporary.write_bytes(figure.png)
    return figures
