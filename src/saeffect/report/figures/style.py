"""How every figure looks: colours that colour-blind readers tell apart, marks that survive grey, stable bytes."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from saeffect.lm.tokens import printable_token

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "WIDTH",
    "ArmStyle",
    "DrawnFigure",
    "arm_styles",
    "clean_axes",
    "drawing",
    "inline_svg",
    "new_figure",
    "png_bytes",
    "safe_text",
    "settle",
    "svg_text",
]

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"
WIDTH = 4.4  # inches: at 9 pt, still legible when scaled to a phone's 350 px

_FONT = "DejaVu Sans"  # ships with matplotlib, so that the layout is the same on every machine
_RC: Mapping[str, Any] = {
    "font.family": [_FONT],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "text.color": INK,
    "text.parse_math": False,  # names of arms are other people's strings: a dollar sign is a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "saeffect",
    "savefig.dpi": 200,
}

# Okabe & Ito's palette. Control and treatment are its blue and vermilion (far apart in lightness too);
# the placebo is grey because it is the yardstick, not a finding.
_CONTROL, _TREATMENT, _PLACEBO = "#0072b2", "#d55e00", "#6e7781"
_OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LOOKS: Mapping[str, tuple[str, str, str, str]] = {
    "control": (_CONTROL, "o", "-", ""),
    "treatment": (_TREATMENT, "s", (0, (6, 1.5)), "////"),  # type: ignore[dict-item]
    "placebo": (_PLACEBO, "D", (0, (1.5, 1.5)), "...."),  # type: ignore[dict-item]
}
_SPARE_LOOKS = (("^", (0, (4, 1, 1, 1)), "xxxx"), ("v", (0, (8, 2)), "----"), ("P", (0, (3, 3)), "++++"))

# In the report a figure's colours follow the page, which may be dark.
_CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PAPER: "var(--paper)",
    _CONTROL: "var(--control)",
    _TREATMENT: "var(--treatment)",
    _PLACEBO: "var(--placebo)",
}


@dataclass(frozen=True)
class ArmStyle:
    """How one arm is drawn in every figure: colour, marker, line style and hatch, each telling it apart alone."""

    name: str
    role: str
    colour: str
    marker: str
    line: Any
    hatch: str


@dataclass(frozen=True, eq=False)
class DrawnFigure:
    """A figure and what is said about it.

    Attributes:
        name: File name without ending.
        title: One line.
        caption: How to read it, and the numbers that matter; `[[figure:name]]` refers to another.
        alt: What a reader who cannot see it should know.
        figure: The drawing; None where there was nothing to draw.
        reason: Why there is no drawing; "" when there is one.
        source: Which files of the run folder, and which of their columns, it was made from.
        group: Neighbours of one group share a number on the page; "" for none.
        paper: Its number in the paper, where it reproduces a figure of it.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure | None
    reason: str = ""
    source: str = ""
    group: str = ""
    paper: str = ""

    @functools.cached_property
    def svg(self) -> str:
        """As a standalone SVG, "" without a drawing: drawn once, for the file and for the page."""
        return svg_text(self)


def arm_styles(arms: Iterable[tuple[str, str]]) -> dict[str, ArmStyle]:
    """The look of each arm.

    Args:
        arms: Name and role of each arm, in the order of the tables.

    Example:
        >>> arm_styles([("base", "control"), ("tuned", "treatment")])["tuned"].colour
        '#d55e00'
    """
    styles: dict[str, ArmStyle] = {}
    taken: set[str] = set()
    for name, role in arms:
        if role in _LOOKS and role not in taken:
            colour, marker, line, hatch = _LOOKS[role]
        else:
            spare = len(styles)
            marker, line, hatch = _SPARE_LOOKS[spare % len(_SPARE_LOOKS)]  # type: ignore[assignment]
            colour = _OTHERS[spare % len(_OTHERS)]
        taken.add(role)
        styles[name] = ArmStyle(name, role, colour, marker, line, hatch)
    return styles


def drawing() -> AbstractContextManager[None]:
    """The settings in force while a figure is drawn or saved; nothing stays changed afterwards."""
    return matplotlib.rc_context(dict(_RC))


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, `width` × `height` inches, with no global state behind it."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07))
    FigureCanvasAgg(figure)
    return figure


def settle(figure: Figure) -> None:
    """Lay the figure out once and for all; left to itself it does so at each saving, a little differently."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # "none" would leave one in place that has each saving draw twice


def clean_axes(ax: Axes, *, grid: str | None = None) -> None:
    """Take the box away, and draw grid lines along one axis only ("x" or "y") behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=3, width=0.8)
    if grid == "x":
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    if grid == "y":
        ax.spines["bottom"].set_color(MUTED)
    if grid:
        ax.grid(True, axis=grid)  # type: ignore[arg-type]
        ax.set_axisbelow(True)


def safe_text(text: object, limit: int = 40) -> str:
    """A name as it can be drawn: control and bidirectional marks visible, characters the font lacks as □.

    Example:
        >>> safe_text("tuned 漢")
        'tuned □'
    """
    shown = printable_token(str(text))
    known = font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
    drawn = "".join(letter if ord(letter) in known else "□" for letter in shown)
    return drawn if len(drawn) <= limit else drawn[: limit - 1] + "…"


def svg_text(drawn: DrawnFigure) -> str:
    """The figure as a standalone SVG; its text stays text, and equal figures give equal bytes."""
    if drawn.figure is None:
        return ""
    buffer = io.StringIO()
    with drawing():
        drawn.figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return buffer.getvalue()


def png_bytes(drawn: DrawnFigure) -> bytes:
    """The figure as a PNG of 200 dots per inch, without dates or program names."""
    if drawn.figure is None:
        return b""
    buffer = io.BytesIO()
    with drawing():
        drawn.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def inline_svg(drawn: DrawnFigure) -> str:
    """The figure as an `<svg>` element for the report: unique ids, the page's colours, no metadata.

    What the figure holds of other people's strings was escaped when the SVG was written and stays so.
    """
    text = drawn.svg
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r'\bid="([^"]*)"', rf'id="figure-{drawn.name}-\1"', text)
    text = re.sub(r'(xlink:href|href)="#([^"]*)"', rf'href="#figure-{drawn.name}-\2"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#figure-{drawn.name}-\1)", text)
    text = re.sub(r"font: ([^;']*?)[\d.]+px '[^;\"]*", lambda m: m.group(0).split(" '")[0] + " inherit", text)
    for colour, variable in _CSS_VARIABLES.items():
        text = text.replace(colour, variable)
    head, rest = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    start = f'<svg {view_box.group(0) if view_box else ""} role="img" aria-labelledby="figure-{drawn.name}-alt">'
    return start + rest.strip()
