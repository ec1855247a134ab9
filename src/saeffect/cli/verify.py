"""`saeffect verify`: do a finished run's numbers follow from its tables? Exit code 0 yes, 1 no, 2 wrong input."""

from __future__ import annotations

import typer

from saeffect.cli.console import ConsoleProgress, show
from saeffect.cli.run import RunFolder

__all__ = ["verify"]

_MOST = 30  # lines


def verify(run: RunFolder) -> None:
    """Recompute a finished run's numbers from its stored tables."""
    from saeffect.study.verify import verify as check

    with ConsoleProgress() as log:
        found = check(run, log)
    for line in found.disagreements[:_MOST]:
        show(str(line))
    if len(found.disagreements) > _MOST:
        show(f"and {len(found.disagreements) - _MOST} more")
    looked = f"{found.files} files as written, {found.recomputed} recomputed ({found.values:,} values)"
    if found.disagreements:
        show(f"{len(found.disagreements)} disagree." + (f" The run was {found.note}." if found.note else ""))
        raise typer.Exit(1)
    show(f"Everything agrees: {looked}.")
