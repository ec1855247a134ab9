"""The figure of a race: bars for each number of threads, and the limit by the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawing import INK, PALETTE, saved_figure

__all__ = ["Race", "draw"]


@dataclass(frozen=True)
class Race:
    """Options of the figure of a race.

    Attributes:
        labels: Of the sides, the peer first.
        quantity: Key of the speeds, such as "tokens_per_second"; "limit_" before it is that of the limits.
        limit_of: Maps a side to its key among the limits.
        speed: Format of a speed.
        ratio: Format of the speed relative to the peer.
        ticks: Format of the axis ticks.
        axis: Label of the axis.
        logarithmic: For a peer's bar that would else be too short to see; its number is then beside the bar.
    """

    labels: dict[str, str]
    quantity: str
    limit_of: Callable[[str], str]
    speed: str
    ratio: str
    ticks: str
    axis: str
    logarithmic: bool = False

    @property
    def peer(self) -> str:
        """The side that the others are compared with."""
        return next(iter(self.labels))


def draw(results: dict[str, Any], race: Race, title: str, stem: Path) -> None:
    """Write `stem`.svg and `stem`.png: a group of bars for each number of threads, with a mark at the limit."""
    from matplotlib.ticker import StrMethodFormatter

    count = sum(len(measured[race.quantity]) + 1 for measured in results["speed"].values())
    with saved_figure(stem, figsize=(8.4, 0.9 + 0.36 * count)) as ax:
        y, ticks = 0, []
        for threads, measured in results["speed"].items():
            ticks.append((y, f"{threads} thread" + "s" * (threads != "1") + ":"))
            y += 1
            for name, colour in zip(race.labels, PALETTE, strict=True):
                if name in measured[race.quantity]:
                    _bar(ax, y, name, measured, race, colour)
                    ticks.append((y, race.labels[name]))
                    y += 1
        ax.set_yticks([position for position, _ in ticks], [label for _, label in ticks])
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        if race.logarithmic:
            ax.set_xscale("log")
        ax.xaxis.set_major_formatter(StrMethodFormatter(race.ticks))
        ax.set_xlabel(race.axis)
        ax.set_title(title, loc="left", fontsize=9, color=INK)


def _bar(ax: Any, y: int, name: str, measured: dict[str, Any], race: Race, colour: str) -> None:
    speed = measured[race.quantity][name]
    ax.barh(y, speed, color=colour, height=0.74)
    limit = measured[f"limit_{race.quantity}"].get(race.limit_of(name))
    if limit is not None:
        ax.plot([limit, limit], [y - 0.42, y + 0.42], color=INK, linewidth=1.4)
    text = race.speed.format(speed)
    if name != race.peer:
        text += f" ({race.ratio.format(measured['ratio'][name])}×)"
    # On a logarithmic axis the shortest bar has no room inside.
    outside = race.logarithmic and name == race.peer
    ax.annotate(
        text,
        (speed, y),
        (4 if outside else -4, 0),
        textcoords="offset points",
        ha="left" if outside else "right",
        va="center",
        color="#ffffff" if colour == PALETTE[-1] else "#111111",
    )
