"""What more of a dose does to the concept and to the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from saeffect.comparison import Comparison
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import INK, MUTED, PAPER, ArmStyle, DrawnFigure, clean_axes, new_figure, safe_text
from saeffect.report.outcome_summary import dose_summary
from saeffect.report.words.names import control_words, dose_axis
from saeffect.steering.placebos import STEERED

__all__ = ["doses"]

_DOTTED: Mapping[str, Any] = {"linestyle": (0, (1, 2)), "linewidth": 1.1, "markersize": 4.2, "markeredgewidth": 1.0}


@dataclass(frozen=True)
class _Panel:
    """A number of the search: its title, and whether its axis is logarithmic."""

    measure: str
    title: str
    is_log: bool = False


_PANELS = (
    _Panel("gain", "concept: gain in similarity, steered − unsteered"),
    _Panel("direct_effect", "concept: direct effect on the top tokens (nats)"),
    _Panel("perplexity", "fluency: perplexity under the unsteered model (log scale)", is_log=True),
    _Panel("distinct2", "fluency: distinct-2, share of different word pairs"),
    _Panel("fluency", "fluency: 1 is that of the unsteered text"),
    _Panel("score", "concept × fluency: what the dose is chosen by"),
)


def doses(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Concept and fluency against the dose, one panel each, with the placebo's; the chosen dose is marked."""
    del comparison
    results = context.steering
    if results is not None and results.operator == "ablate":
        raise Undefined("an ablation has one dose, so there is no dose-response curve.")
    table, source = _curves(context, list(styles))
    panels = [one for one in _PANELS if one.measure in table.columns and table[one.measure].notna().any()]
    if not panels:
        raise Undefined("the dose search has no numbers to draw.")
    chosen = _chosen(context)
    figure = new_figure(0.55 + 1.32 * len(panels))
    axes: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    arms = [name for name in styles if (table["arm"] == name).any()]
    reach = float(np.ptp(table["dose"])) or 1.0
    placebos = [str(name) for name in dict.fromkeys(table["condition"]) if name != STEERED]
    for ax, panel in zip(axes, panels, strict=True):
        if chosen is not None:
            ax.axvline(chosen, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        for place, name in enumerate(arms):
            shift = (place - (len(arms) - 1) / 2) * 0.014 * reach
            mine = table[table["arm"] == name].sort_values("dose")
            for placebo in placebos:
                _placebo_line(ax, mine[mine["condition"] == placebo], panel, styles[name], shift)
            _line(ax, mine[mine["condition"] == STEERED], panel, styles[name], shift)
        _dress(ax, panel)
    control = control_words(placebos[0]) if placebos else ""
    _label_axes(axes, chosen, table, dose_axis(results), control)
    searched = int(table["n_features"].max()) if "n_features" in table.columns else 0
    bars = f" Lines: means over {searched} features an arm; bars: 95 % intervals over them." if searched else ""
    beside = (
        f" Dotted and hollow, in the colour of its arm: {control} at the same dose, on the same prompts and with the "
        "same sampling noise. What a line shows beyond its dotted one is due to the features."
        if placebos
        else " No placebo was run at these doses, so what any push of that size does is not shown."
    )
    choice = "No dose was chosen." if chosen is None else "The dashed line is the dose that was chosen."
    return DrawnFigure(
        name="doses",
        title="What more of a dose does",
        caption=(f"The dose search, on prompts that the test does not use. {choice}{bars}{beside}"),
        alt=_alt(table, panels[0], chosen),
        figure=figure,
        source=source,
    )


def _curves(context: ReportContext, order: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """One row per arm, condition and dose, and where it is from.

    By feature where there is such a table, else the search's means.

    Raises:
        Undefined: There was no search.
    """
    results, table = context.steering, context.doses
    if results is not None and results.dose_response is not None and len(results.dose_response):
        found = dose_summary(results.dose_response, order)
        numbers = "gain, direct_effect, perplexity, distinct2, score"
        return found, f"steering/dose_response.parquet, means by arm, condition and dose of {numbers}"
    if table is None or table.empty or "dose" not in table.columns:
        raise Undefined("no dose search was recorded.")
    known = {name for name in order if "arm" in table.columns and (table["arm"] == name).any()}
    if not known:
        table = table.assign(arm=order[0])
    if "condition" not in table.columns:
        table = table.assign(condition=STEERED)
    return table, "steering/dose_search.parquet, one row per arm, condition and dose"


def _chosen(context: ReportContext) -> float | None:
    if context.doses is not None and "chosen" in context.doses.columns:
        chosen = context.doses.loc[context.doses["chosen"].astype(bool), "dose"]
        if len(chosen):
            return float(chosen.iloc[0])
    return context.steering.dose if context.steering is not None else None


def _line(ax: Axes, rows: pd.DataFrame, panel: _Panel, style: ArmStyle, shift: float) -> None:
    x, y = rows["dose"].to_numpy(dtype=float) + shift, rows[panel.measure].to_numpy(dtype=float)
    if f"{panel.measure}_low" in rows.columns:
        low, high = (rows[f"{panel.measure}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
        ax.vlines(x, low, high, color=style.colour, linewidth=1.1, alpha=0.45, zorder=2)
    ax.plot(x, y, marker=style.marker, color=style.colour, linestyle=style.line, markersize=4.2, linewidth=1.5,
            label=safe_text(style.name, 18), zorder=3)  # fmt: skip


def _placebo_line(ax: Axes, rows: pd.DataFrame, panel: _Panel, style: ArmStyle, shift: float) -> None:
    """Without bars: what counts is where it lies, and six lines with bars could not be read."""
    x, y = rows["dose"].to_numpy(dtype=float) + shift, rows[panel.measure].to_numpy(dtype=float)
    ax.plot(x, y, marker=style.marker, color=style.colour, markerfacecolor=PAPER, zorder=2.5, **_DOTTED)


def _dress(ax: Axes, panel: _Panel) -> None:
    ax.set_title(panel.title, size=8.6)
    if panel.is_log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        every = [step * 10.0**power for power in range(-1, 9) for step in (1, 3)]
        ticks = [tick for tick in every if low <= tick <= high]
        ticks = ticks if len(ticks) <= 5 else [tick for tick in ticks if f"{tick:e}"[0] == "1"]
        ax.set_yticks(ticks or [low, high])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="y", which="minor", length=0)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(labelsize=8)
    clean_axes(ax, grid="y")


def _label_axes(axes: Sequence[Axes], chosen: float | None, table: pd.DataFrame, label: str, control: str) -> None:
    if chosen is not None:
        axes[0].annotate(f"chosen: {chosen:g}", (chosen, 1.0), xycoords=("data", "axes fraction"), xytext=(-5, -2),
                         textcoords="offset points", va="top", ha="right", color=MUTED, size=8)  # fmt: skip
    doses = sorted(set(table["dose"].astype(float)))
    if len(doses) <= 8:
        axes[-1].set_xticks(doses, [f"{dose:g}" for dose in doses])
    axes[-1].set_xlabel(label, size=8.5)
    handles, names = axes[0].get_legend_handles_labels()
    if control:
        handles.append(Line2D([], [], color=MUTED, marker="o", markerfacecolor=PAPER, **_DOTTED))
        names.append(control)
    if len(names) > 1:
        axes[0].figure.legend(handles, names, loc="outside upper left", ncols=4, handlelength=2.2, columnspacing=1.1)


def _alt(table: pd.DataFrame, panel: _Panel, chosen: float | None) -> str:
    parts = []
    for name in dict.fromkeys(table["arm"]):
        rows = table[(table["arm"] == name) & (table["condition"] == STEERED)]
        rows = rows.dropna(subset=panel.measure).sort_values("dose")
        if len(rows):
            first, last = rows.iloc[0], rows.iloc[-1]
            parts.append(
                f"{name} from {first[panel.measure]:.3g} at {first['dose']:g} to {last[panel.measure]:.3g} at "
                f"{last['dose']:g}"
            )
    return f"{panel.title} by dose: {'; '.join(parts)}. Chosen dose: {'none' if chosen is None else f'{chosen:g}'}."
