"""A figure of a training's curves, drawn from its metrics.jsonl and saved beside the SAE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saeffect.errors import EmptySelection
from saeffect.io import atomic_path
from saeffect.sae.training.log import METRICS_FILE, loss_parts, read_metrics

__all__ = ["FIGURES", "save_training_figure"]

FIGURES = ("training.svg", "training.png")
_METADATA: tuple[dict[str, Any], ...] = (
    {"Date": None, "Creator": None, "Format": None, "Type": None},
    {"Software": None},
)

# The style of the report's figures (that package may not be imported here).
_INK, _MUTED, _GRID = "#1f2328", "#59636e", "#d8dee4"
_TRAIN, _HELD_OUT, _EVENT = "#0072b2", "#d55e00", "#8c959f"  # Okabe & Ito's blue and vermilion: distinct in grey too
_LINES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (1.5, 1.5)), (0, (4, 1, 1, 1)))
_PART_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_RC: Mapping[str, Any] = {
    "font.family": ["DejaVu Sans"],  # part of matplotlib, so that the layout is the same on every machine
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "figure.facecolor": "#ffffff",
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "saeffect",
    "savefig.dpi": 200,
}


class _Panel(NamedTuple):
    """One metric against tokens. `ideal`: a value to draw a line at; `logarithmic`: if the values span a wide range."""

    metric: str
    title: str
    spec: str
    logarithmic: bool = False
    ideal: float | None = None


_LOSS = _Panel("loss", "loss", ".3g", logarithmic=True)
_PANELS = (
    _LOSS,
    _Panel("explained_variance", "explained variance", ".3f", ideal=1.0),
    _Panel("l0", "active features a token (l0)", ",.1f", logarithmic=True),
    _Panel("dead", "dead features", ",.0f"),
    _Panel("ce_loss_score", "CE loss score", ".3f", ideal=1.0),
    _Panel("l2_ratio", "l2 ratio, out / in", ".3f", ideal=1.0),
    _Panel("mean_log10_density", "mean log10 density", ".2f"),
)


class _Run:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = [row for row in rows if _finite(row.get("tokens"))]
        self.kinds = {row["kind"] for row in rows}
        self.max_tokens = max((float(row["tokens"]) for row in self.rows), default=0.0)
        # The unit of the tokens' axis: lower limit, divisor, label.
        scales = ((1e9, 1e9, " (billions)"), (1e6, 1e6, " (millions)"), (1e4, 1e3, " (thousands)"), (-1, 1.0, ""))
        self.divisor, unit = next((divisor, unit) for least, divisor, unit in scales if self.max_tokens >= least)
        self.axis = f"tokens{unit}"

    def series(self, metric: str, kind: str) -> tuple[list[float], list[float]]:
        """Tokens and values of the rows with this metric, NaN where it is not finite; empty if no value is finite."""
        rows = [row for row in self.rows if row["kind"] == kind and metric in row]
        values = [float(row[metric]) if _finite(row[metric]) else math.nan for row in rows]
        if not any(map(math.isfinite, values)):
            return [], []
        return [row["tokens"] / self.divisor for row in rows], values

    def has(self, panel: _Panel) -> bool:
        measured = any(self.series(panel.metric, kind)[0] for kind in ("train", "evaluation"))
        return measured or (panel is _LOSS and bool(self.parts()))

    def parts(self) -> dict[str, str]:
        """The parts of the loss and their labels, without those that are 0 in nine of ten rows."""
        names = dict.fromkeys(name for row in self.rows if row["kind"] == "train" for name in row)
        values = {name: self.series(name, "train")[1] for name in loss_parts(names)}
        return {
            name: label
            for name, label in loss_parts(names).items()
            if sum(map(bool, values[name])) > len(values[name]) / 10
        }

    def resamplings(self) -> list[tuple[float, int]]:
        rows = [row for row in self.rows if row.get("event") == "resampled"]
        return [(row["tokens"] / self.divisor, int(row["n_features"])) for row in rows]


def save_training_figure(folder: Path) -> Path:
    """Draw a training's curves beside its metrics.jsonl, as training.svg and training.png; returns the latter's path.
    Lines are training batches, dots are held-out text. NotFound without a metrics.jsonl, EmptySelection if nothing has
    been measured, BadFile if it is damaged or the figure cannot be written.
    """
    import matplotlib

    run = _Run(read_metrics(folder / METRICS_FILE))
    if run.kinds <= {"event"}:
        raise EmptySelection(
            "nothing has been measured yet: there is no row of metrics.",
            at=str(folder / METRICS_FILE),
            fix="let the training reach its first report.",
        )
    panels = [panel for panel in _PANELS if run.has(panel)]
    if not panels:
        raise EmptySelection("none of the known metrics has a finite value.", at=str(folder / METRICS_FILE))
    with matplotlib.rc_context(dict(_RC)):
        figure = _draw(run, panels)
        for name, metadata in zip(FIGURES, _METADATA, strict=True):
            with atomic_path(folder / name) as temporary:
                figure.savefig(temporary, format=name.rpartition(".")[2], metadata=metadata)
    return folder / FIGURES[1]


def _draw(run: _Run, panels: list[_Panel]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    n_columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure = Figure(
        figsize=(3.8 * n_columns + 0.2, 1.95 * n_rows + 0.5),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.07, hspace=0.03, wspace=0.04),
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(n_rows, n_columns)
    n_empty = n_rows * n_columns - len(panels)  # of an odd number the first is drawn wide
    for index, panel in enumerate(panels):
        row, column = divmod(index + (n_empty if index else 0), n_columns)
        ax = figure.add_subplot(grid[row, :] if n_empty and not index else grid[row, column])
        _draw_panel(ax, panel, run)
        ax.set_xlim(0, (run.max_tokens or 1) * 1.015 / run.divisor)
        if row + 1 == n_rows:
            ax.set_xlabel(run.axis)
    _legend(figure, run)
    figure.draw_without_rendering()  # lay out once, since each saving would lay out slightly differently
    figure.set_layout_engine("none")
    return figure


def _draw_panel(ax: Any, panel: _Panel, run: _Run) -> None:
    for tokens, _ in run.resamplings():
        ax.axvline(tokens, color=_EVENT, linewidth=0.8, linestyle=(0, (1.5, 2)), zorder=1)
    measured, held_out = run.series(panel.metric, "train"), run.series(panel.metric, "evaluation")
    # The total loss is a broad line at the back, so that a part nearly equal to it stays visible.
    look: dict[str, Any] = {"color": _INK, "linewidth": 2.0} if panel is _LOSS else {"color": _TRAIN}
    drawn = _curve(ax, measured, label="total" if panel is _LOSS else panel.title, **look)
    parts = run.parts() if panel is _LOSS else {}
    for index, (name, label) in enumerate(parts.items()):
        colour, line = _PART_COLOURS[index % len(_PART_COLOURS)], _LINES[(index + 1) % len(_LINES)]
        drawn += _curve(ax, run.series(name, "train"), color=colour, linestyle=line, label=label)
    if held_out[0] and not measured[0]:
        drawn += _curve(ax, held_out, color=_HELD_OUT, alpha=0.5, linewidth=1.0)
    size = 4.2 if len(held_out[0]) <= 30 else 3.4
    drawn += _curve(ax, held_out, color=_HELD_OUT, linestyle="none", marker="o", markersize=size,
                    markeredgecolor="white", markeredgewidth=0.5, zorder=5)  # fmt: skip
    if parts:
        ax.legend(loc="best", ncols=2 if len(parts) > 2 else 1, handlelength=2.6)
    _set_axes(ax, panel, drawn)
    ax.set_title(panel.title, pad=6)
    ax.set_title(_last_value(run, panel), loc="right", color=_MUTED, weight="normal", size=8.5, pad=6)


def _curve(ax: Any, series: tuple[list[float], list[float]], **look: Any) -> list[float]:
    """Draw a curve (a dot for a single value); returns its finite values."""
    finite = [value for value in series[1] if math.isfinite(value)]
    if finite:
        dot = {"marker": "o", "markersize": 3.5} if len(finite) == 1 else {}
        ax.plot(*series, **{"linewidth": 1.4, "zorder": 3, **dot, **look})
    return finite


def _set_axes(ax: Any, panel: _Panel, values: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    positive = sorted(v for v in values if v > 0)
    low = positive[len(positive) // 50] if positive else 0.0  # a few values near 0 must not stretch the axis
    if panel.logarithmic and positive and positive[-1] > 8 * low:
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(bottom=low / 1.5, top=positive[-1] * 1.5)
        wide = positive[-1] > 300 * low
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=6))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=panel.metric == "dead"))
    if panel.metric == "dead":
        ax.set_ylim(bottom=0, top=max(1, *values) * 1.08 if values else 1)
    if panel.ideal is not None and values:
        bottom, top = min(values), max(*values, panel.ideal)
        late = sorted(values)[len(values) // 4]
        if bottom < 0 < late:  # cut off the first steps, which can be far below the rest
            bottom = max(bottom, late - 1.0) if late < 0.2 else 0.0
        margin = 0.04 * (top - bottom)
        if top > bottom:  # not for a single value that is the ideal
            ax.set_ylim(bottom - (margin if bottom else 0), top + margin)
        ax.axhline(panel.ideal, color=_EVENT, linewidth=0.8, zorder=2)
    number = FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "−"))
    ax.yaxis.set_major_formatter(number)
    ax.xaxis.set_major_formatter(number)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=3, width=0.8, labelcolor=_INK)
    ax.grid(True, axis="y")
    ax.set_axisbelow(True)


def _last_value(run: _Run, panel: _Panel) -> str:
    """The last finite value in words; that of held-out text if it was measured."""
    for kind, words in (("evaluation", "held out"), ("train", "ends at")):
        finite = [value for value in run.series(panel.metric, kind)[1] if math.isfinite(value)]
        if finite:
            return f"{words} {finite[-1]:{panel.spec}}".replace("-", "−")
    return ""


def _legend(figure: Any, run: _Run) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if "train" in run.kinds:
        handles.append(Line2D([], [], color=_TRAIN, linewidth=1.4, label="training batch"))
    if "evaluation" in run.kinds:
        dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4.2}
        handles.append(Line2D([], [], color=_HELD_OUT, label="held-out text", **dot))
    if marks := run.resamplings():
        label = f"dead features resampled ({sum(n for _, n in marks):,} in all)"
        handles.append(Line2D([], [], color=_EVENT, linewidth=0.8, linestyle=(0, (1.5, 2)), label=label))
    figure.legend(handles=handles, loc="outside lower left", ncols=1 if len(figure.axes) == 1 else 3)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
