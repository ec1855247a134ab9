"""`saeffect reproduce`: the figures of Gupta & Sica (2024), from the files that they published."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from saeffect.cli.console import show
from saeffect.paths import user_path

__all__ = ["reproduce"]


def reproduce(
    files: Annotated[
        Path,
        typer.Argument(metavar="FILES", help="A copy of the authors' repository, or some files.", parser=user_path),
    ],
    embeddings: Annotated[
        str, typer.Option(help="Word vectors: a bundled name or a vectors file.")
    ] = "glove-wiki-gigaword-100",
    csv: Annotated[Path | None, typer.Option(help="Write the table here, too.", parser=user_path)] = None,
) -> None:
    """Each figure: the paper's, ours, and whether they agree at the printed digits."""
    from saeffect.io import atomic_path
    from saeffect.study.reproduce import reproduce as recompute

    table = recompute(files, embeddings=embeddings)
    if csv is not None:
        with atomic_path(csv) as temporary:
            table.to_csv(temporary, index=False)
    notes = list(dict.fromkeys(note for note in table["note"] if note))
    show(f"{'figure':<38}{'paper':>8}{'ours':>9}  verdict")
    for (place, arm), rows in table.groupby(["place", "arm"], sort=False):
        show(f"{place}, {arm}")
        for row in rows.itertuples():
            mark = f" [{notes.index(row.note) + 1}]" if row.note else ""
            show(f"  {row.figure:<36}{row.paper:>8}{_ours(row.ours, str(row.paper)):>9}  {row.verdict}{mark}")
    show()
    for number, note in enumerate(notes, 1):
        show(f"[{number}] {note}")
    counts = table["verdict"].value_counts()
    show("; ".join(f"{n} {verdict}" for verdict, n in counts.items()) + ".")


def _ours(value: float, paper: str) -> str:
    """Our figure, rounded to as many decimals as the paper's.

    Example:
        >>> _ours(0.41097, "0.39"), _ours(float("nan"), "100")
        ('0.41', '-')
    """
    return "-" if math.isnan(value) else f"{value:.{len(paper.partition('.')[2])}f}"
