"""The picture of a race: bars for each number of threads, and what the bare products alone would allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawing import INK, PALETTE, drawn

__all__ = ["Race", "draw"]


@dataclass(frozen=True)
class Race:
    """What is drawn of the results of a race.

    Attributes:
        labels: Of the sides, the peer first.
        quantity: Key of the speeds, such as "tokens_per_second"; "limit_" before it is that of the limits.
        limit_of: By what name the limits know a side.
        speed: Format of a speed.
        ratio: Format of how many times faster than the peer.
        ticks: Format of the axis.
        axis: What the axis says.
        logarithmic: Whether the peer's bar is too short to be seen otherwise; its number then stands outside.
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
    """Write `stem`.svg and `stem`.png: a group of bars for each number of threads, a mark where the limit is."""
    from matplotlib.ticker import StrMethodFormatter

    count = sum(len(found[race.quantity]) + 1 for found in results["speed"].values())
    with drawn(stem, figsize=(8.4, 0.9 + 0.36 * count)) as ax:
        at, ticks = 0, []
        for threads, found in results["speed"].items():
            ticks.append((at, f"{threads} thread" + "s" * (threads != "1") + ":"))
            at += 1
            for name, colour in zip(race.labels, PALETTE, strict=True):
                if name in found[race.quantity]:
                    _bar(ax, at, name, found, race, colour)
                    ticks.append((at, race.labels[name]))
                    at += 1
        ax.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        if race.logarithmic:
            ax.set_xscale("log")
        ax.xaxis.set_major_formatter(StrMethodFormatter(race.ticks))
        ax.set_xlabel(race.axis)
        ax.set_title(title, loc="left", fontsize=9, color=INK)


def _bar(ax: Any, at: int, name: str, found: dict[str, Any], race: Race, colour: str) -> None:
    speed = found[race.quantity][name]
    ax.barh(at, speed, color=colour, height=0.74)
    limit = found[f"limit_{race.quantity}"].get(race.limit_of(name))
    if limit is not None:
        ax.plot([limit, limit], [at - 0.42, at + 0.42], color=INK, linewidth=1.4)
    text = race.speed.format(speed)
    if name != race.peer:
        text += f" ({race.ratio.format(found['ratio'][name])}×)"
    # On a logarithmic axis the shortest bar is where it begins and has no room inside.
    outside = race.logarithmic and name == race.peer
    ax.annotate(
        text,
        (speed, at),
        (4 if outside else -4, 0),
        textcoords="offset points",
        ha="left" if outside else "right",
        va="center",
        color="#ffffff" if colour == PALETTE[-1] else "#111111",
    )
