"""Style of all figures: colours for colour-blind readers, marks that work in grey, reproducible bytes."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.lm.tokens import printable_token
from saeffect.report.context import ReportContext

__all__ = [
    "DASHED",
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "ROLE_STYLES",
    "ArmStyle",
    "DrawnFigure",
    "Drawing",
    "FigureKind",
    "arm_styles",
    "clean_axes",
    "drawn_into",
    "inline_svg",
    "new_figure",
    "safe_text",
]

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"
DASHED: Mapping[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3))}
"""The line of no effect, and the chosen dose."""

_WIDTH = 4.4  # inches: at 9 pt, still legible when scaled to a phone's 350 px
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
    "text.parse_math": False,  # a dollar sign in an arm's name is no formula
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


@dataclass(frozen=True)
class ArmStyle:
    """Colour, marker and line style of one arm; each alone is enough to tell arms apart."""

    name: str
    role: str
    colour: str
    marker: str
    line: Any


# Okabe & Ito's palette. Control and treatment are its blue and vermilion (far apart in lightness too);
# the placebo is grey because it is the reference, not a finding.
ROLE_STYLES: Mapping[str, ArmStyle] = {
    "control": ArmStyle("control", "control", "#0072b2", "o", "-"),
    "treatment": ArmStyle("treatment", "treatment", "#d55e00", "s", (0, (6, 1.5))),
    "placebo": ArmStyle("placebo", "placebo", "#6e7781", "D", (0, (1.5, 1.5))),
}
_SPARE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SPARE_MARKS = (("^", (0, (4, 1, 1, 1))), ("v", (0, (8, 2))), ("P", (0, (3, 3))))

# In the report the colours of figures follow the page, which may be dark.
_CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PAPER: "var(--paper)",
    **{style.colour: f"var(--{role})" for role, style in ROLE_STYLES.items()},
}


class Drawing(NamedTuple):
    """A figure, its caption with the main numbers, and its text alternative."""

    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True, eq=False)
class DrawnFigure:
    """A figure with its texts.

    Attributes:
        name: File name without ending; `[[figure:name]]` in a caption refers to another figure.
        figure: None without data; then `reason` says why.
        source: Files of the run folder, and their columns, behind the figure.
        group: Neighbours of one group share a number on the page; "" for none.
        paper: Its number in the paper, if it reproduces a figure of the paper.
    """

    name: str
    title: str
    caption: str = ""
    alt: str = ""
    figure: Figure | None = None
    reason: str = ""
    source: str = ""
    group: str = ""
    paper: str = ""

    @functools.cached_property
    def svg(self) -> str:
        """The figure as a standalone SVG with selectable text, drawn once for file and page; "" without a drawing."""
        return self._render("svg", {"Date": None, "Creator": None, "Format": None, "Type": None}).decode()

    @functools.cached_property
    def png(self) -> bytes:
        """The figure as a PNG of 200 dots per inch, without dates or program names; empty without a drawing."""
        return self._render("png", {"Software": None})

    def _render(self, kind: str, metadata: Mapping[str, None]) -> bytes:
        """The bytes of the figure; equal figures give equal bytes."""
        if self.figure is None:
            return b""
        buffer = io.BytesIO()
        with _rc_context():
            if self.figure.get_layout_engine() is not None:
                # Lay out once: a new layout at each saving would differ slightly.
                self.figure.draw_without_rendering()
                self.figure.set_layout_engine(None)
                for axes in self.figure.axes:  # the layout's solver differs in its last digits from call to call
                    left, bottom, width, height = (round(end, 5) for end in axes.get_position().bounds)
                    axes.set_position((left, bottom, width, height))
            self.figure.savefig(buffer, format=kind, metadata=metadata)
        return buffer.getvalue()


@dataclass(frozen=True)
class FigureKind:
    """A figure of every report; `{domain}` in `title` is replaced by the study's domain.

    `draw` returns a `Drawing` or several finished figures; without data it raises `Undefined` with the reason.
    """

    name: str
    title: str
    draw: Callable[[Comparison, ReportContext], Drawing | tuple[DrawnFigure, ...]]
    source: str = ""
    group: str = ""
    paper: str = ""

    def drawn(self, comparison: Comparison, context: ReportContext) -> tuple[DrawnFigure, ...]:
        """The figures of a study, or one without a drawing that carries the reason."""
        title = self.title.replace("{domain}", context.domain)
        blank = DrawnFigure(self.name, title, source=self.source, group=self.group, paper=self.paper)
        try:
            with _rc_context():
                result = self.draw(comparison, context)
        except Undefined as error:
            return (replace(blank, reason=error.message),)
        return (replace(blank, **result._asdict()),) if isinstance(result, Drawing) else result


def _rc_context() -> AbstractContextManager[None]:
    return matplotlib.rc_context(dict(_RC))


def arm_styles(comparison: Comparison) -> dict[str, ArmStyle]:
    """The style of each arm, in the order of the tables: that of its role; further placebos get spare ones."""
    styles: dict[str, ArmStyle] = {}
    for name, role in zip(comparison.table1["arm"], comparison.table1["role"], strict=True):
        if role in {style.role for style in styles.values()}:
            marker, line = _SPARE_MARKS[len(styles) % len(_SPARE_MARKS)]
            styles[name] = ArmStyle(name, role, _SPARE_COLOURS[len(styles) % len(_SPARE_COLOURS)], marker, line)
        else:
            styles[name] = replace(ROLE_STYLES[role], name=name)
    return styles


_TARGET: ContextVar[Axes | None] = ContextVar("_TARGET", default=None)


@contextlib.contextmanager
def drawn_into(ax: Axes | None) -> Iterator[None]:
    """Within the block, `new_figure` gives a subfigure in place of `ax`; with None, a separate figure."""
    token = _TARGET.set(ax)
    try:
        yield
    finally:
        _TARGET.reset(token)


def new_figure(height: float, *, layout: bool = True) -> Figure:
    """An empty figure of column width, `height` in inches, without pyplot's global state; see `drawn_into`."""
    target = _TARGET.get()
    if target is not None:
        parent, spec = target.figure, target.get_subplotspec()
        target.remove()
        subfigure: Any = parent.add_subfigure(spec)  # type: ignore[union-attr, arg-type]
        return subfigure  # type: ignore[no-any-return]
    engine = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07) if layout else None
    figure = Figure(figsize=(_WIDTH, height), layout=engine)
    FigureCanvasAgg(figure)
    return figure


def clean_axes(ax: Axes, *, grid: str) -> None:
    """Remove the frame, and draw grid lines along one axis only ("x" or "y"), behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=3, width=0.8)
    if grid == "x":
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    else:
        ax.spines["bottom"].set_color(MUTED)
    ax.grid(True, axis=grid)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def safe_text(text: object, limit: int = 40) -> str:
    """Text that the font can draw: control and bidirectional characters visible, missing glyphs as □.

    Example:
        >>> safe_text("tuned 漢")
        'tuned □'
    """
    visible = printable_token(str(text))
    glyphs = font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
    drawn = "".join(letter if ord(letter) in glyphs else "□" for letter in visible)
    return drawn if len(drawn) <= limit else drawn[: limit - 1] + "…"


def inline_svg(drawn: DrawnFigure) -> str:
    """The figure as an `<svg>` element for the report: unique ids, page colours, no metadata; strings stay escaped."""
    text = drawn.svg
    text = text[text.index("<svg") :]
    for pattern in (r"<!--.*?-->\s*", r"<metadata>.*?</metadata>\s*", r"<style[^>]*>.*?</style>"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)  # a style would apply to the whole page
    text = re.sub(r'\bid="([^"]*)"', rf'id="figure-{drawn.name}-\1"', text)
    text = re.sub(r'(xlink:href|href)="#([^"]*)"', rf'href="#figure-{drawn.name}-\2"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#figure-{drawn.name}-\1)", text)
    text = re.sub(r"font: ([^;']*?)[\d.]+px '[^;\"]*", lambda m: m.group(0).split(" '")[0] + " inherit", text)
    for colour, variable in _CSS_VARIABLES.items():
        text = text.replace(colour, variable)
    # As attributes, since a page may forbid styles in its elements.
    text = re.sub(r'\bstyle="([^"]*)"', _style_to_attributes, text)
    head, rest = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    start = f'<svg {view_box.group(0) if view_box else ""} role="img" aria-labelledby="figure-{drawn.name}-alt">'
    return start + rest.strip()


def _style_to_attributes(style: re.Match[str]) -> str:
    """The declarations of a `style` as presentation attributes.

    Example:
        >>> _style_to_attributes(re.match('style="(.*)"', 'style="fill: none; stroke-width: 0.8"'))
        'fill="none" stroke-width="0.8"'
    """
    pairs = (declaration.partition(":") for declaration in style[1].split(";") if ":" in declaration)
    return " ".join(f'{name.strip()}="{value.strip()}"' for name, _, value in pairs)
