"""Style and saving of the benchmarks' figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["INK", "PALETTE", "saved_figure"]

# The peer, ours at the peer's dtype, ours at its default.
PALETTE = ("#b9c4cc", "#5fa39f", "#0b6e69")
INK = "#4a4a4a"

_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "saeffect"}


@contextlib.contextmanager
def saved_figure(stem: Path, *subplots: int, **layout: Any) -> Iterator[Any]:
    """The axes of a new figure (arguments of `plt.subplots`), written to `stem`.svg and `stem`.png at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(*subplots, layout="constrained", **layout)
        yield axes
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)
        plt.close(figure)
