"""`saeffect verdicts`: export people's verdicts on the features of a run as CSV, or import them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeffect.cli.console import show
from saeffect.cli.help import Command, CommandGroup
from saeffect.cli.run import RunFolder
from saeffect.paths import user_path

__all__ = ["export_verdicts", "import_verdicts", "verdicts"]

_File = Annotated[
    Path, typer.Argument(metavar="FILE", help="CSV: feature, arm, rater, verdict, label, note.", parser=user_path)
]

verdicts = typer.Typer(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)


@verdicts.command("export", cls=Command, help="Write the verdicts that stand. Decoys without a feature are left out.")
def export_verdicts(run: RunFolder, file: _File) -> None:
    """Write the verdicts of a run's review to a CSV file."""
    from saeffect.study.review import export_verdicts as write

    n_written, n_gone = write(run, file)
    show(f"{n_written} verdicts: {file.resolve()}")
    if n_gone:
        show(f"{n_gone} are on features that the run no longer has; they are not among them, but stay in the history.")


@verdicts.command(
    "import", cls=Command, help="Add verdicts to the run's review. All or none; the history keeps those before them."
)
def import_verdicts(run: RunFolder, file: _File) -> None:
    """Add the verdicts of a CSV file to a run's review."""
    from saeffect.study.review import import_verdicts as add

    n_added, n_before = add(run, file)
    show(f"{n_added} verdicts imported" + (f", {n_before} were there before." if n_before else "."))
