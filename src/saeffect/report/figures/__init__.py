"""Every figure of the report, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.io import atomic_path
from saeffect.report.context import ReportContext
from saeffect.report.figures.calibration import calibration
from saeffect.report.figures.contrasts import contrasts
from saeffect.report.figures.cross_activity import cross_activity
from saeffect.report.figures.distributions import coherence, density, mean_activation, top_token_weights
from saeffect.report.figures.doses import doses
from saeffect.report.figures.fates import fates_by_activation, fates_by_decoder
from saeffect.report.figures.forest import forests
from saeffect.report.figures.match_counts import match_counts
from saeffect.report.figures.partial_residuals import partial_residuals
from saeffect.report.figures.style import ArmStyle, DrawnFigure, arm_styles, drawing, png_bytes, settle

__all__ = ["DrawnFigure", "draw_figures", "write_figures"]

_Draw = Callable[[Comparison, Mapping[str, ArmStyle], ReportContext], DrawnFigure | tuple[DrawnFigure, ...]]
# In the order of the page, which numbers them.
_FIGURES: Mapping[str, tuple[str, _Draw]] = {
    "calibration": ("False alarms beside findings", calibration),
    "effects": ("Effects of steering", forests),
    "doses": ("What more of a dose does", doses),
    "match_counts": ("Matching words", match_counts),
    "top_token_weights": ("Top-token weights", top_token_weights),
    "mean_activation": ("Mean activations", mean_activation),
    "density": ("Densities", density),
    "coherence": ("Coherence", coherence),
    "contrasts": ("Contrasts", contrasts),
    "fates_by_decoder": ("Which feature became which, by what they write", fates_by_decoder),
    "fates_by_activation": ("Which feature became which, by when they fire", fates_by_activation),
    "cross_activity": ("Which features fire more after fine-tuning", cross_activity),
    "partial_residuals": ("What goes with a strong effect", partial_residuals),
}


def draw_figures(comparison: Comparison, context: ReportContext | None = None) -> tuple[DrawnFigure, ...]:
    """Draw every figure, in the report's order; those without data carry the reason instead of a drawing."""
    context = context or ReportContext()
    styles = arm_styles(zip(comparison.table1["arm"], comparison.table1["role"], strict=True))
    drawn: list[DrawnFigure] = []
    with drawing():
        for name, (title, draw) in _FIGURES.items():
            try:
                some = draw(comparison, styles, context)
            except Undefined as error:
                some = DrawnFigure(name, title, "", "", None, reason=error.message)
            drawn += some if isinstance(some, tuple) else (some,)
        for one in drawn:
            if one.figure is not None:
                settle(one.figure)
    return tuple(drawn)


def write_figures(
    comparison: Comparison, folder: Path | str, *, context: ReportContext | None = None
) -> tuple[DrawnFigure, ...]:
    """Write each figure as `<name>.svg` and `<name>.png` (200 dots per inch), atomically.

    Args:
        comparison: What to draw.
        folder: Where to; made if missing.
        context: The study around it; without it effects, coherence and doses have no data.

    Returns:
        The figures, to be passed on to `write_report`. One that could not be drawn has no files, and says why.
    """
    figures = draw_figures(comparison, context)
    for figure in figures:
        if figure.figure is None:
            continue
        with atomic_path(Path(folder) / f"{figure.name}.svg") as temporary:
            temporary.write_text(figure.svg, encoding="utf-8")
        with atomic_path(Path(folder) / f"{figure.name}.png") as temporary:
            temporary.write_bytes(png_bytes(figure))
    return figures
