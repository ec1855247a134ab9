"""The picture of the steering benchmark: features a second, and what the bare products alone would allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

COLOURS = {"paper_loop": "#b9c4cc", "saeffect_float32": "#5fa39f", "saeffect_bfloat16": "#0b6e69"}
INK = "#4a4a4a"


def draw(results: dict[str, Any], labels: dict[str, str], stem: Path) -> None:
    """Write `stem`.svg and `stem`.png: a group of bars for each number of threads, a mark where the limit is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "saeffect"}
    with plt.rc_context(style):
        count = sum(len(found["features_per_second"]) + 1 for found in results["speed"].values())
        figure, ax = plt.subplots(figsize=(8.4, 0.9 + 0.36 * count), layout="constrained")
        at, ticks = 0, []
        for threads, found in results["speed"].items():
            ticks.append((at, f"{threads} thread" + "s" * (threads != "1") + ":"))
            at += 1
            for name in (name for name in labels if name in found["features_per_second"]):
                _bar(ax, at, name, found)
                ticks.append((at, labels[name]))
                at += 1
        ax.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        # One bar is a hundredth of another, so only a logarithmic axis shows both.
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
        ax.set_xlabel("features a second, logarithmic; a line: what the products alone would allow")
        ax.set_title(f"{results['task']['model']}", loc="left", fontsize=9, color=INK)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)
        plt.close(figure)


def _bar(ax: Any, at: int, name: str, found: dict[str, Any]) -> None:
    speed, ratio = found["features_per_second"][name], found["ratio"][name]
    ax.barh(at, speed, color=COLOURS[name], height=0.74)
    limit = found["limit_features_per_second"].get(name)
    if limit is not None:
        ax.plot([limit, limit], [at - 0.42, at + 0.42], color=INK, linewidth=1.4)
    text = f"{speed:.3g}" if name == "paper_loop" else f"{speed:.3g} ({ratio:.0f}×)"
    dark = name == "saeffect_bfloat16"
    style = {"va": "center", "color": "#ffffff" if dark else "#111111"}
    # The shortest bar is where the axis begins and has no room inside.
    if name == "paper_loop":
        ax.annotate(text, (speed, at), (4, 0), textcoords="offset points", ha="left", va="center", color="#111111")
    else:
        ax.annotate(text, (speed, at), (-4, 0), textcoords="offset points", ha="right", **style)
