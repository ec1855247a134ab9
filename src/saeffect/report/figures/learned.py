"""Changes beyond null fine-tunes, what the changed features cause, effects of model and SAE; and crosscoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from saeffect.comparison import Comparison
from saeffect.diffing.latent_scaling import null_cuts
from saeffect.diffing.put_back_shares import OWN_WRITING
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    DASHED,
    GRID,
    INK,
    MUTED,
    ROLE_STYLES,
    Drawing,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.words.causes import factorial_estimate, factorial_sentences, text_name, what_it_causes
from saeffect.report.words.numbers import count, is_defined, percent

__all__ = ["crossed", "draw_shares", "latent_scaling", "learned", "put_back"]

_MAX_GROUPS = 10


def learned(comparison: Comparison, _context: ReportContext) -> Drawing:
    """One line a group, highest score first, and a band for the highest scores in the nulls."""
    tables = comparison.matches.further
    groups, nulls = tables.get("change_groups"), tables.get("null_groups")
    if groups is None or nulls is None or groups.empty or nulls.empty:
        raise Undefined("there are no null fine-tunes to compare with.")
    rows = groups.head(_MAX_GROUPS).to_dict("records")
    highest = nulls["highest"].to_numpy(dtype=np.float64)
    figure = new_figure(0.9 + 0.42 * len(rows))
    ax = figure.add_subplot()
    null, tuned = ROLE_STYLES["placebo"], ROLE_STYLES["treatment"]
    ax.axvspan(0, highest.max(), color=null.colour, alpha=0.13, linewidth=0)
    ax.plot(highest, np.full(len(highest), -0.75), "|", color=null.colour, markersize=7)
    ax.text(highest.max(), -0.75, " nulls", size=7.8, color=MUTED, va="center", clip_on=False)
    for y, row in zip(reversed(range(len(rows))), rows, strict=True):
        score = abs(float(row["score"]))
        claimed = bool(row["claimed"])
        ax.plot([0, score], [y - 0.12, y - 0.12], color=tuned.colour if claimed else null.colour, linewidth=1.6)
        ax.plot([score], [y - 0.12], tuned.marker, color=tuned.colour if claimed else null.colour, markersize=5)
        less = " (less)" if row["direction"] == "less" else ""
        ax.text(0, y + 0.12, safe_text(", ".join(row["tokens"][:6]) + less, 58), size=7.8, color=INK, va="bottom")
    ax.set(ylim=(-1.15, len(rows) - 0.35), yticks=[], xlim=(0, None))
    ax.set_xlabel("change, in units of what nulls do to such a group", color=MUTED)
    clean_axes(ax, grid="x")
    n = int(groups["claimed"].sum())
    scores = "; ".join(f"{row['name']} {abs(float(row['score'])):.1f}" for row in rows)
    return Drawing(
        figure,
        f"The groups of features that changed most. Grey strokes: the highest score of any group in each of"
        f" {len(nulls)} null fine-tunes; what lies in the grey band, a fine-tune that teaches nothing reaches too."
        f" {n} {'group lies' if n == 1 else 'groups lie'} clearly beyond.",
        f"Scores of groups: {scores}. Highest in nulls: {highest.max():.1f}.",
    )


# By effect: label, colour, marker, marker size.
_MARKS: Mapping[str, tuple[str, str, str, float]] = {
    "model": ("model", ROLE_STYLES["treatment"].colour, "s", 6.5),
    "dictionary": ("SAE", ROLE_STYLES["control"].colour, "o", 6.5),
    "both": ("both", INK, "D", 5.0),
    "rest": ("rest", ROLE_STYLES["placebo"].colour, "|", 8.0),
}
_UNIT_NAMES = {"share": "percentage points", "share of tokens": "percentage points of tokens", "coherence": ""}


def crossed(comparison: Comparison, _context: ReportContext) -> Drawing:
    """Estimates with 95 % intervals: the effects of model, SAE, both together, and the rest."""
    table = comparison.matches.further.get("factorial")
    if table is None or table.empty:
        raise Undefined("no SAE was read on both models.")
    rows = table[table["estimate"].notna()]
    names = list(dict.fromkeys(rows["quantity"]))
    if not names:
        reason = next((f": {reason}" for reason in table["reason"] if reason), "")
        raise Undefined(f"no quantity was measured with each SAE on both models{reason}.")
    figure = new_figure(0.3 + 1.16 * len(names))
    for ax, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        _draw_effects(ax, rows[rows["quantity"] == name].set_index("effect"))
    return Drawing(
        figure,
        "Each arm's SAE, read and steered on both models; every quantity on its own scale, with 95 % intervals "
        "and, at the right, the value of the control's SAE on its own model. "
        "Model: the fine-tuned model minus the base model, with the same SAE. SAE: the treatment's SAE minus the "
        "control's, on the same model. Both: their sum, the difference between the arms. Rest: half of how much the "
        "model's part depends on the SAE. Intervals of the SAE's part hold for these two SAEs, not for other seeds.",
        " ".join(factorial_sentences(table).values()),
    )


def _draw_effects(ax: Axes, rows: pd.DataFrame) -> None:
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
            _draw_estimate(ax, y, rows.loc[effect], factor, (colour, marker, size))
    ax.set_title(safe_text(first["label"], 44), loc="left", size=8.8, pad=5)
    noun, start = _UNIT_NAMES.get(unit, unit), factor * float(first["mean_cc"])
    noun = f"{noun}, from {start:.3g}".removeprefix(", ").replace("-", "−") if np.isfinite(start) else noun
    ax.text(1.0, 1.04, noun, transform=ax.transAxes, size=7.8, color=MUTED, ha="right", va="bottom")
    ax.set(xlim=(-reach, reach), ylim=(-0.6, len(_MARKS) - 0.4), yticks=[])
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "−"))
    ax.tick_params(labelsize=8)
    clean_axes(ax, grid="x")


def _draw_estimate(ax: Axes, y: int, row: Mapping[Any, Any], factor: float, mark: tuple[str, str, float]) -> None:
    """An interval and its dot; a dot without an interval is hollow."""
    estimate, (colour, marker, size) = factorial_estimate(row), mark
    if estimate.defined:
        low, high = factor * estimate.low, factor * estimate.high
        ax.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
    face = colour if estimate.defined else "none"
    value = factor * estimate.value
    ax.plot([value], [y], marker, color=colour, markerfacecolor=face, markersize=size, markeredgewidth=1.4)


_SHARE_OF = {"loss": "of the change in loss", "kl": "of the change in predictions (KL)"}
_LOWEST, _HIGHEST = -0.25, 1.3  # shares are clipped to this range


def put_back(comparison: Comparison, context: ReportContext) -> Drawing:
    """The study's `draw_shares`."""
    table = comparison.matches.further.get("put_back")
    if table is None or table.empty:
        raise Undefined("no features were put back.")
    return draw_shares(table, subject=context.domain)


def draw_shares(table: pd.DataFrame, *, source: str = "domain", subject: str = "medical") -> Drawing:
    """Share carried by the most changed features over their number, beside matched features and the whole activation.

    `table` is that of `put_back_table`; `source` is the text, and `subject` its name. Undefined if no share is defined.
    """
    rows = table[(table["edited"] == "tuned") & table["source"].isin([source, OWN_WRITING])]
    curves = rows[(rows["features"] == "changed") & (rows["source"] == source)]
    if curves.empty:
        raise Undefined(f"no features were put back on text of the source {source!r}.")
    # Where a share is undefined on the text, that on the model's own writing is drawn.
    curves_by_measure: dict[str, pd.DataFrame] = {}
    for measure in _SHARE_OF:
        for text in (source, OWN_WRITING):
            curve = rows[(rows["features"] == "changed") & (rows["measure"] == measure) & (rows["source"] == text)]
            if measure not in curves_by_measure and _has_share(curve):
                curves_by_measure[measure] = curve
    if not curves_by_measure:
        raise Undefined(f"{curves['reason'].iloc[0]}.")
    figure = new_figure(0.55 + 2.4 * len(curves_by_measure))
    panels = figure.subplots(len(curves_by_measure), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (measure, curve) in zip(panels, curves_by_measure.items(), strict=True):
        text = str(curve["source"].iloc[0])
        whole = rows[(rows["measure"] == measure) & (rows["features"] == "whole") & (rows["source"] == text)]
        _draw_share_curves(ax, curve)
        name = f"Share {_SHARE_OF[measure]}\non {text_name(text, safe_text(subject, 20))}"
        ax.set_title(name, loc="left", size=8.8)
        ax.text(0.01, 1.0, f" the whole activation: {abs(whole['whole'].iloc[0]):.2g} nats a token", size=7.8,
                color=MUTED, transform=ax.get_yaxis_transform(), va="bottom")  # fmt: skip
    panels[-1].set_xlabel("features put back, the most changed first")
    missing = [_SHARE_OF[measure] for measure in _SHARE_OF if measure not in curves_by_measure]
    reasons = curves[~curves["measure"].isin(curves_by_measure)]["reason"]
    return Drawing(
        figure,
        "While the fine-tuned model reads, features at the hook get the values that they have in the base model, and "
        "the rest of the model runs as it is. Orange: the features that changed most, found on other text. Grey: as "
        "many others that fire as often and as strongly, drawn anew for each text. At the dashed line the whole "
        "activation is put back; what all features leave to it is what the SAE does not rebuild. Bands: 95 % intervals "
        f"over {count(curves['n_rows'].iloc[0])} texts."
        + (f" The share {missing[0]} is undefined: {reasons.iloc[0]}." if missing else ""),
        what_it_causes(table, subject, source) or f"All features carry {percent(curves['share'].iloc[-1], 0)}.",
    )


def _has_share(rows: pd.DataFrame) -> bool:
    return bool((rows["kind"] == "own").any() and is_defined(rows.loc[rows["kind"] == "own", "share"].iloc[0]))


def _draw_share_curves(ax: Axes, rows: pd.DataFrame) -> None:
    own = rows[rows["kind"] == "own"].sort_values("n_features")
    matched = rows[(rows["kind"] == "matched") & rows["share"].notna()].sort_values("n_features")
    style = ROLE_STYLES["treatment"]
    n_all = int(own["n_features"].iloc[-1])
    ax.axhline(0, color=GRID, linewidth=0.8)
    ax.axhline(1, **DASHED)
    for curve, colour, marker, name in ((matched, MUTED, None, "matched"), (own, style.colour, "o", "most changed")):
        if curve.empty:
            continue
        x, share, low, high = (curve[c].to_numpy(dtype=np.float64) for c in ("n_features", "share", "low", "high"))
        share, low, high = (values.clip(_LOWEST, _HIGHEST) for values in (share, low, high))
        ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
        ax.plot(x, share, color=colour, marker=marker, markersize=4, linewidth=1.4)
        # Matched sets end before all features, which leaves room for the label.
        align = ("right", "bottom") if name == "most changed" else ("left", "center")
        position, offset = (len(x) // 2, (-4, 8)) if name == "most changed" else (-1, (6, 0))
        ax.annotate(name, (x[position], share[position]), xytext=offset,
                    textcoords="offset points", ha=align[0], va=align[1], color=INK if name == "matched" else colour,
                    size=8.2)  # fmt: skip
    ends = rows.loc[rows["kind"] != "difference", ["low", "high"]].to_numpy(dtype=np.float64)
    lowest, highest = np.nanmin(ends, initial=0.0), np.nanmax(ends, initial=1.0)
    ax.set_ylim(max(_LOWEST, min(-0.05, lowest - 0.03)), min(_HIGHEST, max(1.16, highest + 0.05)))
    ax.set_xscale("log")
    ticks = own["n_features"].astype(int).tolist()
    ax.set_xticks(ticks, [*(f"{n:,}" for n in ticks[:-1]), f"all\n{n_all:,}"])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %".replace("-", "−"))
    clean_axes(ax, grid="y")


_TUNED, _NULL = "#e69f00", "#b6c0ca"
_BINS: list[float] = np.linspace(-1.0, 1.0, 81).tolist()


def latent_scaling(table: pd.DataFrame, nulls: Sequence[pd.DataFrame], *, rate: float = 0.05) -> Figure:
    """Histogram of features from "base model alone" (-1) to "tuned model alone" (1), with the nulls' features in grey.

    `table` as `against_nulls` gives it, `nulls` as `LatentScaling.result` does. Undefined if no feature fires.
    """
    lean = table["lean"].dropna()
    if lean.empty:
        raise Undefined("no feature of the crosscoder fires on this text.")
    figure = new_figure(2.6)
    axes = figure.subplots()
    axes.hist(lean.clip(-1, 1), _BINS, color=_TUNED, log=True, label="this fine-tune")
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
