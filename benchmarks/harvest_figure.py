"""The picture of the harvest benchmark: tokens a second, and what the processor's products alone would allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

COLOURS = {"sae_lens_float32": "#b9c4cc", "saeffect_float32": "#5fa39f", "saeffect_bfloat16": "#0b6e69"}
INK = "#4a4a4a"


def draw(results: dict[str, Any], labels: dict[str, str], stem: Path) -> None:
    """Write `stem`.svg and `stem`.png: a group of bars for each number of threads, a mark where the limit is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "saeffect"}
    with plt.rc_context(style):
        count = sum(len(found["tokens_per_second"]) + 1 for found in results["speed"].values())
        figure, ax = plt.subplots(figsize=(8.4, 0.9 + 0.36 * count), layout="constrained")
        at, ticks = 0, []
        for threads, found in results["speed"].items():
            ticks.append((at, f"{threads} thread" + "s" * (threads != "1") + ":"))
            at += 1
            for name in (name for name in labels if name in found["tokens_per_second"]):
                _bar(ax, at, name, found)
                ticks.append((at, labels[name]))
                at += 1
        ax.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))
        ax.set_xlabel("tokens a second; a line: what the products alone would allow")
        ax.set_title(f"{results['task']['model']}, {results['task']['hook']}", loc="left", fontsize=9, color=INK)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)
        plt.close(figure)


def _bar(ax: Any, at: int, name: str, found: dict[str, Any]) -> None:
    speed, ratio = found["tokens_per_second"][name], found["ratio"][name]
    ax.barh(at, speed, color=COLOURS[name], height=0.74)
    limit = found["limit_tokens_per_second"].get(name.removeprefix("saeffect_"))
    if limit is not None:
        ax.plot([limit, limit], [at - 0.42, at + 0.42], color=INK, linewidth=1.4)
    text = f"{speed:,.0f}" if name == "sae_lens_float32" else f"{speed:,.0f} ({ratio:.1f}×)"
    colour = "#ffffff" if name == "saeffect_bfloat16" else "#111111"
    ax.annotate(text, (speed, at), (-4, 0), textcoords="offset points", va="center", ha="right", color=colour)
