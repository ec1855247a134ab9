"""Two pictures: what the most changed features of every fine-tune are about, and error rates beside the promised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from saeffect.report.figures.style import safe_text

__all__ = ["draw_models", "draw_rates"]

_INK, _MUTED, _GRID, _PALE = "#1f2328", "#59636e", "#d8dee4", "#f3f5f7"
_OWN, _OTHER, _BAD = "#0b6e69", "#e0a030", "#c0504d"
_STYLE: Mapping[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "text.color": _INK,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "saeffect",
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
}


def draw_models(models: Mapping[str, Any], stem: Path) -> None:
    """One row a fine-tune, its most changed features from left to right, each by its first two top tokens."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch, Patch

    n_top = max(len(model["top"]) for model in models.values())
    with plt.rc_context(dict(_STYLE)):
        figure = plt.figure(figsize=(12.5, 1.1 + 0.42 * len(models)))
        ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        ax.set_xlim(-1.45, n_top + 0.05)
        ax.set_ylim(len(models) - 0.4, -1.75)
        ax.set_axis_off()
        for row, (name, model) in enumerate(models.items()):
            null = name not in model["hits"]
            mark = "" if null else ("  ✓" if model["found"] else "  ✗")
            colour = _MUTED if null else (_OWN if model["found"] else _BAD)
            ax.text(-0.1, row, name + mark, ha="right", va="center", color=colour, weight="bold", fontsize=9)
            for column, feature in enumerate(model["top"]):
                own, other = name in feature["concepts"], [c for c in feature["concepts"] if c != name]
                face, text = (_OWN, "white") if own else ("white", _INK) if other else (_PALE, _MUTED)
                ax.add_patch(
                    FancyBboxPatch(
                        (column + 0.05, row - 0.36),
                        0.9,
                        0.72,
                        boxstyle="round,pad=0,rounding_size=0.08",
                        facecolor=face,
                        edgecolor=_OTHER if other and not own else face,
                        linewidth=1.4,
                        mutation_aspect=0.6,
                    )
                )
                ax.text(column + 0.5, row, _label(feature, name), ha="center", va="center", color=text, fontsize=7)
        for column in range(n_top):
            ax.text(column + 0.5, -0.62, str(column + 1), ha="center", color=_MUTED)
        ax.text(-1.4, -1.3, "The ten most changed features of every fine-tune", fontsize=11, weight="bold")
        ax.legend(
            handles=[
                Patch(facecolor=_OWN, label="about what it was taught"),
                Patch(facecolor="white", edgecolor=_OTHER, linewidth=1.4, label="about another planted concept"),
                Patch(facecolor=_PALE, label="about neither"),
            ],
            loc="upper right",
            ncols=3,
            frameon=False,
            fontsize=8,
        )
        _save(figure, stem)
        plt.close(figure)


def draw_rates(rates: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """False alarms, false discoveries, coverage and power of every setting, with bands of 95 % chance about nominal."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("alarms", "studies of nothing\nthat report something", 0.05, "n_studies", "above"),
        ("false_discovery", "share of findings\nthat are false", 0.05, "n_studies", "above"),
        ("coverage", "95 % intervals\nthat hold the truth", 0.95, "n_intervals", "below"),
        ("power", "real effects\nthat are found", None, "n_studies", ""),
    )
    with plt.rc_context(dict(_STYLE)):
        figure, axes = plt.subplots(1, 4, figsize=(12.5, 1.3 + 0.27 * len(rates)), sharey=True, layout="constrained")
        for ax, (key, title, nominal, count, bad) in zip(axes, panels, strict=True):
            for row, setting in enumerate(rates):
                value = setting[key]
                if value is None or math.isnan(value):
                    continue
                half = 1.96 * math.sqrt(max(value * (1 - value), 1e-9) / setting[count])
                wrong = nominal is not None and (value - half > nominal if bad == "above" else value + half < nominal)
                colour = _BAD if wrong else _OWN
                ax.plot([value - half, value + half], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
                ax.plot(value, row, "o", color=colour if setting["strict"] else "white", markeredgecolor=colour, ms=5)
            if nominal is not None:
                ax.axvline(nominal, color=_INK, linewidth=1, zorder=0)
                band = 1.96 * math.sqrt(nominal * (1 - nominal) / rates[0][count])
                ax.axvspan(nominal - band, nominal + band, color=_GRID, alpha=0.7, zorder=-1, linewidth=0)
                low, high = ax.get_xlim()
                ax.set_xlim((0, max(0.1, high)) if nominal < 0.5 else (min(0.9, low), 1.0))
            else:
                ax.set_xlim(0, 1.02)
            ax.set_title(title, fontsize=9, loc="left")
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.grid(True, axis="x", color=_GRID, linewidth=0.6)
            ax.set_axisbelow(True)
            ax.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(rates)), [setting["setting"] for setting in rates])
        axes[0].set_ylim(len(rates) - 0.4, -0.6)
        figure.supxlabel(
            "Lines: 95 % Monte-Carlo error. Grey: what a rate at its nominal level would show. "
            "Open circles: outside what the method promises.",
            fontsize=8,
            color=_MUTED,
        )
        _save(figure, stem)
        plt.close(figure)


def _label(feature: Mapping[str, Any], model: str) -> str:
    """Two tokens that tell what a feature is about: those of its concept first, if it has one."""
    tokens = feature.get("matched", {}).get(model) or []
    words = list(dict.fromkeys(token.strip().lower() for token in [*tokens, *feature["tokens"]] if token.strip()))
    return "\n".join(safe_text(word, 12) for word in words[:2])


def _save(figure: Any, stem: Path) -> None:
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
    figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None}, facecolor="white")
