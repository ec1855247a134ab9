"""`saeffect guard`: has a fine-tune kept its budget? For a pipeline: exit code 0 kept, 1 broken, 2 wrong input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from saeffect.cli.console import ConsoleProgress, keys_option, show, show_error, show_table
from saeffect.cli.diff import Base, Sae, Tuned
from saeffect.errors import ConfigError
from saeffect.paths import user_path

if TYPE_CHECKING:
    from saeffect.diffing.guard import Verdict

__all__ = ["guard"]

_STYLES = {"kept": "green", "broken": "bold red", "unjudged": "yellow", "reported": "dim"}


def guard(
    base: Base,
    tuned: Tuned,
    budget: Annotated[Path, typer.Option(help="YAML file (see --keys).", parser=user_path)],
    nulls: Annotated[
        str | None, typer.Option(help="Null fine-tunes to judge groups against: folder of traces, or bundled:<name>.")
    ] = None,
    sae: Sae = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text to read, as path or name=path; by default the bundled text.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for verdicts.json, .xml (JUnit) and .md.", parser=user_path)
    ] = None,
    allow_unjudged: Annotated[
        bool, typer.Option("--allow-unjudged", help="Exit 0 although a rule could not be judged.")
    ] = False,
    keys: Annotated[
        bool, keys_option("Show the keys of a budget file.", "saeffect.diffing.budget:budget_keys")
    ] = False,
) -> None:
    """Judge a fine-tune by a budget."""
    del keys
    from saeffect.report.verdicts import headline, write_verdicts
    from saeffect.study.guard import guard as judge
    from saeffect.study.guard import read_budget

    rules = read_budget(budget)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError("this is a file, and a folder was expected.", at=f"--out {out}", fix="choose another --out.")
    with ConsoleProgress() as log:
        verdicts = judge(base, tuned, rules, nulls=nulls, sae=sae, text=text or (), log=log)
    _show_table(verdicts)
    show(headline(verdicts))
    if out is not None:
        for path in write_verdicts(verdicts, out, f"{tuned} against {base}"):
            show(str(path))
    if any(verdict.status == "broken" for verdict in verdicts):
        raise typer.Exit(1)
    if any(verdict.status == "unjudged" for verdict in verdicts) and not allow_unjudged:
        show_error(
            "Not every rule could be judged.\n  fix: give --nulls with enough nulls, or --allow-unjudged to pass."
        )
        raise typer.Exit(2)


def _show_table(verdicts: Sequence[Verdict]) -> None:
    from saeffect.report.verdicts import COLUMNS, cells

    table = Table(*COLUMNS, box=None, pad_edge=False)
    for verdict in verdicts:
        row = [Text(cell) for cell in cells(verdict)]
        row[2].stylize(_STYLES[verdict.status])
        table.add_row(*row)
    show_table(table)
    for verdict in verdicts:
        if verdict.status == "unjudged":
            show(f"{verdict.rule}: {verdict.reason}")
