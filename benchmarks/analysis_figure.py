"""The figure of the analysis benchmark: seconds and memory beside the product alone, and coherence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drawing import INK, PALETTE, saved_figure

__all__ = ["draw"]

COLOURS = dict(zip(("bare", "float32", "bfloat16"), PALETTE, strict=True))


def draw(results: dict[str, Any], labels: dict[str, str], stem: Path) -> None:
    """Write `stem`.svg and `stem`.png: projection on the left, coherence on the right, both in seconds."""
    task = results["task"]
    with saved_figure(stem, 1, 2, figsize=(11, 2.4), width_ratios=(2, 1)) as (left, right):
        sides = results["projection"]
        bars = [
            (
                labels[side],
                side_results["seconds"],
                f"{side_results['seconds']:.1f} s ({side_results['ratio']:.2f}×), {side_results['peak_gb']:.2f} GB",
            )
            for side, side_results in sides.items()
        ]
        _bars(left, bars, [COLOURS[side] for side in sides])
        title = (
            f"Top {task['top_k']} on two scales and moments: {task['d_sae']:,} features × {task['d_vocab']:,} tokens"
        )
        left.set_title(title, loc="left", fontsize=9, color=INK)
        coherence = results["coherence"]
        pairs = [
            ("loop over pairs", coherence["loop_over_pairs_seconds"], f"{coherence['loop_over_pairs_seconds']:.1f} s"),
            ("saeffect", coherence["seconds"], f"{coherence['seconds']:.2f} s"),
        ]
        _bars(right, pairs, [COLOURS["bare"], COLOURS["bfloat16"]])
        right.set_title(f"Coherence of {coherence['n_features']:,} features", loc="left", fontsize=9, color=INK)


def _bars(ax: Any, bars: list[tuple[str, float, str]], colours: list[str]) -> None:
    ax.barh(range(len(bars)), [seconds for _, seconds, _ in bars], color=colours, height=0.7)
    ax.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.6 * max(seconds for _, seconds, _ in bars))
    for row, (_, seconds, text) in enumerate(bars):
        ax.annotate(text, (seconds, row), (4, 0), textcoords="offset points", va="center", color=INK)
    ax.set_xlabel("seconds")
