"""`saeffect verify`: do a finished run's numbers follow from its tables? Exit code 0 yes, 1 no, 2 wrong input."""

from __future__ import annotations

import typer

from saeffect.cli.console import ConsoleProgress, show
from saeffect.cli.run import RunFolder

__all__ = ["verify"]

_MAX_LINES = 30  # lines


def verify(run: RunFolder) -> None:
    """Recompute a finished run's numbers from its stored tables."""
    from saeffect.study.verify import verify as check

    with ConsoleProgress() as log:
        result = check(run, log)
    for line in result.disagreements[:_MAX_LINES]:
        show(str(line))
    if len(result.disagreements) > _MAX_LINES:
        show(f"and {len(result.disagreements) - _MAX_LINES} more")
    summary = f"{result.files} files as written, {result.recomputed} recomputed ({result.values:,} values)"
    if result.disagreements:
        show(f"{len(result.disagreements)} disagree." + (f" The run was {result.note}." if result.note else ""))
        raise typer.Exit(1)
    show(f"Everything agrees: {summary}.")
