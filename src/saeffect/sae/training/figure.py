"""The curves of a training, or of several over each other, from their metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeffect.errors import BadFile, EmptySelection
from saeffect.io import atomic_path
from saeffect.lm.tokens import printable_token
from saeffect.sae.training.log import METRICS_FILE, loss_parts, read_metrics

__all__ = ["FIGURES", "save_training_figure"]

FIGURES = ("training.svg", "training.png")

# The look of the report's figures, which live above this floor.
_INK, _MUTED, _GRID = "#1f2328", "#59636e", "#d8dee4"
_TRAIN, _HELD_OUT, _EVENT = "#0072b2", "#d55e00", "#8c959f"  # Okabe & Ito's blue and vermilion: far apart in grey too
_RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (1.5, 1.5)), (0, (4, 1, 1, 1)))
_PART_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_FONT = "DejaVu Sans"  # ships with matplotlib, so that the layout is the same on every machine
_RC: Mapping[str, Any] = {
    "font.family": [_FONT],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "figure.facecolor": "#ffffff",
    "text.color": _INK,
    "text.parse_math": False,  # names of folders are other people's: a dollar sign is a dollar sign
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


@dataclass(frozen=True)
class _Panel:
    """One metric against tokens. `ideal`: a value to draw a line at; `logarithmic`: where the values span much."""

    metric: str
    title: str
    spec: str
    logarithmic: bool = False
    ideal: float | None = None


_LOSS = _Panel("loss", "loss", ".3g", logarithmic=True)
_MSE = _Panel("mse", "squared error (mse)", ".3g", logarithmic=True)
_PANELS = (
    _Panel("explained_variance", "explained variance", ".3f", ideal=1.0),
    _Panel("l0", "active features a token (l0)", ",.1f", logarithmic=True),
    _Panel("dead", "dead features", ",.0f"),
    _Panel("ce_loss_score", "CE loss score", ".3f", ideal=1.0),
    _Panel("l2_ratio", "l2 ratio, out / in", ".3f", ideal=1.0),
    _Panel("mean_log10_density", "mean log10 density", ".2f"),
)


@dataclass(frozen=True)
class _Run:
    """One training: its rows, what it is called, and how it is drawn beside others."""

    name: str
    rows: list[dict[str, Any]]
    colour: str
    line: Any

    def series(self, metric: str, kind: str) -> tuple[list[float], list[float]]:
        """Tokens and values, NaN where a row has none that is finite; empty where no row has one."""
        rows = [r for r in self.rows if r["kind"] == kind and metric in r and _finite(r.get("tokens"))]
        values = [float(r[metric]) if _finite(r[metric]) else math.nan for r in rows]
        if not any(map(math.isfinite, values)):
            return [], []
        return [float(r["tokens"]) for r in rows], values

    def has(self, metric: str) -> bool:
        """Whether there is anything to draw."""
        return any(self.series(metric, kind)[0] for kind in ("train", "evaluation"))

    def parts(self) -> dict[str, str]:
        """The parts of the loss and their labels, without those that are nearly always 0."""
        names = dict.fromkeys(name for row in self.rows if row["kind"] == "train" for name in row)
        found = {name: self.series(name, "train")[1] for name in loss_parts(names)}
        drawn = {name for name, values in found.items() if sum(map(bool, values)) > len(values) / 10}
        return {name: label for name, label in loss_parts(names).items() if name in drawn}

    def resamplings(self) -> list[tuple[float, int]]:
        """Tokens and the number of features, of each time that dead features were made anew."""
        rows = [r for r in self.rows if r["kind"] == "event" and r.get("event") == "resampled"]
        return [
            (float(r["tokens"]), int(r["n_features"]) if _finite(r.get("n_features")) else 0)
            for r in rows
            if _finite(r.get("tokens"))
        ]


def save_training_figure(folders: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Draw the curves of one training, or of several over each other, as training.svg and training.png.

    Panels: loss and its parts (of several trainings: the loss, and the squared error), explained variance, l0,
    dead features, and, where they were measured, CE loss score, l2 ratio and mean log10 density, all against
    tokens. Panels without data are left out. Lines are training batches, dots are held-out text.

    Args:
        folders: A folder with a metrics.jsonl, or several.
        out: Folder for the figure; of one training its own by default.

    Returns:
        The PNG; the SVG is beside it.

    Raises:
        NotFound: A folder has no metrics.jsonl.
        EmptySelection: No folders are given, or nothing has been measured yet.
        BadFile: A metrics.jsonl is damaged, or the figure cannot be written.
        ValueError: Several folders, and no `out`.
    """
    paths = [Path(folders)] if isinstance(folders, str | Path) else [Path(folder) for folder in folders]
    if not paths:
        raise EmptySelection("no folders of trainings are given.", at="folders")
    if out is None and len(paths) > 1:
        raise ValueError("`out` must say where the figure of several trainings goes")
    runs = _read(paths)
    import matplotlib

    with matplotlib.rc_context(dict(_RC)):
        figure = _draw(runs, paths)
        target = Path(out) if out is not None else paths[0]
        metadata: dict[str, dict[str, Any]] = {
            "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
            "png": {"Software": None},
        }
        try:
            for name, ending in zip(FIGURES, ("svg", "png"), strict=True):
                with atomic_path(target / name) as temporary:
                    figure.savefig(temporary, format=ending, metadata=metadata[ending])
        except OSError as error:
            raise BadFile(f"the figure cannot be written: {error.strerror or error}.", at=str(target)) from error
    return target / "training.png"


def _read(paths: Sequence[Path]) -> list[_Run]:
    runs = []
    for index, (path, name) in enumerate(zip(paths, _names(paths), strict=True)):
        colour = _RUNS[index % len(_RUNS)]
        line = _LINES[(index + index // len(_RUNS)) % len(_LINES)]
        runs.append(_Run(name, read_metrics(path / METRICS_FILE), colour, line))
        if not any(row["kind"] != "event" for row in runs[-1].rows):
            raise EmptySelection(
                "nothing has been measured yet: there is no row of metrics.",
                at=str(path / METRICS_FILE),
                fix="let the training reach its first report.",
            )
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _draw(runs: list[_Run], paths: Sequence[Path]) -> Any:
    """A matplotlib figure of all panels, laid out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    first = [_LOSS, _MSE] if len(runs) > 1 else [_LOSS]
    panels = [p for p in (*first, *_PANELS) if any(run.has(p.metric) for run in runs)]
    if len(runs) == 1 and _LOSS not in panels and runs[0].parts():
        panels.insert(0, _LOSS)
    if not panels:
        raise EmptySelection(
            "none of the known metrics has a finite value.",
            at=", ".join(str(path / METRICS_FILE) for path in paths),
        )
    n_columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    names = _name_columns(runs, narrow=n_columns == 1)
    height = 1.95 * n_rows + 0.5 + (0.2 * math.ceil(len(runs) / names) + 0.1 if len(runs) > 1 else 0)
    figure = Figure(
        figsize=(3.8 * n_columns + 0.2, height),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.07, hspace=0.03, wspace=0.04),
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(n_rows, n_columns)
    spare = n_rows * n_columns - len(panels)  # of an odd number the first is drawn wide
    places = [divmod(index + (spare if index else 0), n_columns) for index in range(len(panels))]
    most = max((row["tokens"] for run in runs for row in run.rows if _finite(row.get("tokens"))), default=0)
    unit, divisor = _token_unit(most)
    for index, (panel, (row, column)) in enumerate(zip(panels, places, strict=True)):
        ax = figure.add_subplot(grid[row, :] if spare and not index else grid[row, column])
        _draw_panel(ax, panel, runs, divisor)
        ax.set_xlim(0, (most or 1) * 1.015 / divisor)
        if row + 1 == n_rows:
            ax.set_xlabel(unit)
    _legend(figure, runs)
    figure.draw_without_rendering()  # laid out once, or each saving would do it a little differently
    figure.set_layout_engine("none")
    return figure


def _token_unit(most: float) -> tuple[str, float]:
    """The label of the x axis, and what to divide tokens by."""
    for least, divisor, unit in ((1e9, 1e9, "billions"), (1e6, 1e6, "millions"), (1e4, 1e3, "thousands")):
        if most >= least:
            return f"tokens ({unit})", divisor
    return "tokens", 1.0


def _draw_panel(ax: Any, panel: _Panel, runs: list[_Run], divisor: float) -> None:
    alone = len(runs) == 1
    drawn: list[float] = []  # every value, to choose the scale
    for run in runs:
        for tokens, _ in run.resamplings():
            if alone:
                ax.axvline(tokens / divisor, color=_EVENT, linewidth=0.8, linestyle=(0, (1.5, 2)), zorder=1)
            else:
                ax.plot(tokens / divisor, 0, marker="|", markersize=7, color=run.colour, clip_on=False,
                        transform=ax.get_xaxis_transform(), zorder=4)  # fmt: skip
        look: dict[str, Any] = {"color": run.colour, "linestyle": run.line, "linewidth": 1.1}
        if alone:  # the total is broad and below, so that a part that makes up nearly all of it shows
            look = {"color": _INK, "linewidth": 2.0} if panel is _LOSS else {"color": _TRAIN}
        measured, held_out = run.series(panel.metric, "train"), run.series(panel.metric, "evaluation")
        drawn += _curve(ax, measured, divisor, label="total" if panel is _LOSS else panel.title, **look)
        parts = run.parts() if alone and panel is _LOSS else {}
        for index, (name, label) in enumerate(parts.items()):
            colour, line = _PART_COLOURS[index % len(_PART_COLOURS)], _LINES[(index + 1) % len(_LINES)]
            drawn += _curve(ax, run.series(name, "train"), divisor, color=colour, linestyle=line, label=label)
        dots = _HELD_OUT if alone else run.colour
        if held_out[0] and not measured[0]:
            drawn += _curve(ax, held_out, divisor, color=dots, alpha=0.5, linewidth=1.0)
        size = 4.2 if alone and len(held_out[0]) <= 30 else 3.4
        drawn += _curve(ax, held_out, divisor, color=dots, linestyle="none", marker="o", markersize=size,
                        markeredgecolor="white", markeredgewidth=0.5, zorder=5)  # fmt: skip
        if parts:
            ax.legend(loc="best", ncols=2 if len(parts) > 2 else 1, handlelength=2.6)
    _scale(ax, panel, drawn)
    ax.set_title(panel.title, pad=6)
    if alone:
        ax.set_title(_end(runs[0], panel), loc="right", color=_MUTED, weight="normal", size=8.5, pad=6)


def _curve(ax: Any, series: tuple[list[float], list[float]], divisor: float, **look: Any) -> list[float]:
    """Draw a curve (a dot where there is but one value); the finite values."""
    tokens, values = series
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        if len(finite) == 1:
            look = {"marker": "o", "markersize": 3.5, **look}
        ax.plot([t / divisor for t in tokens], values, **{"linewidth": 1.4, "zorder": 3, **look})
    return finite


def _scale(ax: Any, panel: _Panel, values: list[float]) -> None:
    """Scale, limits, ticks and grid."""
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
        if bottom < 0 < late:  # the first steps can be far below; what matters comes after them
            bottom = max(bottom, late - 1.0) if late < 0.2 else 0.0
        margin = 0.04 * (top - bottom)
        if top > bottom:  # one value, and it is the ideal: any limits will do
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


def _end(run: _Run, panel: _Panel) -> str:
    """The last finite value in words; that of held-out text where it was measured."""
    for kind, words in (("evaluation", "held out"), ("train", "ends at")):
        finite = [value for value in run.series(panel.metric, kind)[1] if math.isfinite(value)]
        if finite:
            return f"{words} {finite[-1]:{panel.spec}}".replace("-", "−")
    return ""


def _legend(figure: Any, runs: list[_Run]) -> None:
    """What lines, dots and marks mean, below all panels; which training is which, above them."""
    from matplotlib.lines import Line2D

    alone = len(runs) == 1
    kinds = {row["kind"] for run in runs for row in run.rows}
    handles = []
    if "train" in kinds:
        handles.append(Line2D([], [], color=_TRAIN if alone else _INK, linewidth=1.4, label="training batch"))
    if "evaluation" in kinds:
        handles.append(Line2D([], [], color=_HELD_OUT if alone else _INK, linestyle="none", marker="o", markersize=4.2,
                              label="held-out text"))  # fmt: skip
    marks = [mark for run in runs for mark in run.resamplings()]
    if marks:
        look: dict[str, Any] = {"linestyle": (0, (1.5, 2))} if alone else {"linestyle": "none", "marker": "|"}
        label = "dead features resampled" + (f" ({sum(n for _, n in marks):,} in all)" if alone else "")
        handles.append(Line2D([], [], color=_EVENT, linewidth=0.8, label=label, **look))
    narrow = len(figure.axes) == 1
    figure.legend(handles=handles, loc="outside lower left", ncols=1 if narrow else 3)
    if not alone:
        names = [Line2D([], [], color=r.colour, linestyle=r.line, label=_safe(r.name)) for r in runs]
        columns = _name_columns(runs, narrow=narrow)
        figure.legend(handles=names, loc="outside upper left", ncols=columns, handlelength=2.6)


def _name_columns(runs: list[_Run], *, narrow: bool) -> int:
    """In how many columns the names of the trainings fit."""
    longest = max(len(run.name) for run in runs)
    return 1 if narrow else 4 if longest <= 14 else 3 if longest <= 22 else 2


def _safe(name: str, limit: int = 40) -> str:
    """A name as it can be drawn: no character acts, and those that the font lacks are □."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
    text = "".join(letter if ord(letter) in known else "□" for letter in printable_token(name))
    return text if len(text) <= limit else "…" + text[1 - limit :]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
