"""`saeffect plan`: what a study will take in time, memory and disk, from rates measured on the spot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from saeffect.cli.console import ConsoleProgress, show
from saeffect.cli.run import Out, StudyFile

if TYPE_CHECKING:
    from saeffect.study.plan import Plan

__all__ = ["plan"]


def plan(
    study: StudyFile,
    gpus: Annotated[int, typer.Option(help="Devices like this one, each with a process of torchrun.", min=1)] = 1,
    out: Out = None,
) -> None:
    """Predict tokens, operations, memory, disk and time of every stage; no weights are needed."""
    from saeffect.study.plan import plan_study
    from saeffect.study.study import Study

    with ConsoleProgress() as log:
        result = plan_study(Study.open(study), gpus=gpus, out=out, log=log)
    for line in result.lines:
        show(line)
    show()
    for line in _table(result):
        show(line)


def _table(result: Plan) -> list[str]:
    lines = [f"{'stage':<20}{'tokens':>10}{'FLOP':>9}{'memory':>10}{'disk':>10}{'time':>10}"]
    rows = [*result.table.to_dict("records"), {"stage": "all", **result.total.to_dict()}]
    for row in rows:
        lines.append(
            f"{row['stage']:<20}{_short(row['tokens']):>10}{_short(row['flop']):>9}{_bytes(row['memory']):>10}"
            f"{_bytes(row['disk']):>10}{_time(row['seconds']):>10}"
        )
    return lines


def _short(value: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}" if value else ""


def _bytes(value: float) -> str:
    return "" if value < 1e5 else f"{value / 1e9:,.1f} GB" if value >= 1e9 else f"{value / 1e6:,.0f} MB"


def _time(seconds: float) -> str:
    if seconds >= 5_400:
        return f"{seconds / 3_600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
