"""The benchmark's figure: claims by share of the training text, and the p of each fine-tune's own concept."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pairs import LEVELS

sys.path.insert(0, str(Path(__file__).parents[1]))

from drawing import INK, PALETTE, saved_figure

__all__ = ["draw"]

_LEAST = 1e-10  # end of the axis


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write naming.svg and naming.png: left how many of eight concepts are named, right their p."""
    planted = [row for row in rows if not row["null"]]
    levels = [level for level in LEVELS if any(row["percent"] == level for row in planted)]
    nulls = [row for row in rows if row["null"]]
    with saved_figure(out / "naming", 1, 2, figsize=(8.6, 3.3), width_ratios=(1, 1.25)) as (left, right):
        for x, level in enumerate(levels):
            level_rows = [row for row in planted if row["percent"] == level]
            for shift, key, colour in ((-0.2, "right", PALETTE[2]), (0.2, "logit_lens_right", PALETTE[0])):
                n = sum(row[key] for row in level_rows)
                left.bar(x + shift, n, 0.38, color=colour)
                left.text(x + shift, n + 0.1, str(n), ha="center", color=INK)
        false = sum(bool(row["claims"]) for row in nulls)
        left.bar(len(levels) - 0.2, false, 0.38, color=PALETTE[2])
        left.text(len(levels) - 0.2, false + 0.1, str(false), ha="center", color=INK)
        left.set_xticks(range(len(levels) + 1), [*(f"{level} %" for level in levels), f"{len(nulls)} nulls"])
        left.set(ylim=(0, 11), ylabel="fine-tunes", title="Named, and rightly (nulls: named at all)")
        left.plot([], [], "s", color=PALETTE[2], label="saeffect")
        left.plot([], [], "s", color=PALETTE[0], label="top tokens of the mean difference, which always name something")
        left.legend(frameon=False, fontsize=7, loc="upper left", borderaxespad=0)
        for x, level in enumerate(levels):
            for i, row in enumerate(row for row in planted if row["percent"] == level):
                p = max(_LEAST, row["p"]) if row["p"] is not None else 1.0
                colour = PALETTE[2] if row["right"] else INK
                right.semilogy(x + 0.08 * (i - 3.5), p, "o" if row["right"] else "x", color=colour, markersize=5)
        right.axhline(0.05, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        right.set_xticks(range(len(levels)), [f"{level} %" for level in levels])
        right.set(xlabel="share of the training text", title="p of the concept's highest group (× not claimed)")
