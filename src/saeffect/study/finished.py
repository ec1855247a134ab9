"""A finished run for Python and notebooks: its answer, tables and figures, read on first use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeffect.errors import ConfigError, NotFound, Undefined, unknown_name
from saeffect.io import read_json
from saeffect.lm.tokens import printable_text
from saeffect.paths import user_path
from saeffect.study.results import Picture, run_figures, run_tables
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FinishedRun", "html_of", "open_run"]


def open_run(folder: Path | str) -> FinishedRun:
    """The results of a finished run; no model is loaded and nothing is written.

    Raises `NotFound` if no run of a study was finished there.

    Example:
        >>> open_run("no/such/run")
        Traceback (most recent call last):
        saeffect.errors.NotFound: NotFound: there is no finished run in 'no/such/run'.
          at:  no/such/run
          fix: give a run directory, such as runs/<name>; saeffect run makes one.
    """
    path = user_path(folder)
    if not (path / "study.yaml").is_file() or not (path / "report.html").is_file():
        raise NotFound(
            f"there is no finished run in {str(folder)!r}.",
            at=str(folder),
            fix="give a run directory, such as runs/<name>; saeffect run makes one.",
        )
    return FinishedRun(path)


@dataclass(frozen=True)
class FinishedRun:
    """The results in the run directory `folder`. Made by `open_run`."""

    folder: Path

    @cached_property
    def study(self) -> Study:
        """The study as it was run; its arms can be opened while their models exist."""
        return Study.open(self.folder / "study.yaml")

    @cached_property
    def answer(self) -> Mapping[str, Any]:
        """`headline`, `learned` and `paragraph` (str), `caveats` (list of str); empty for a study without SAEs."""
        path = self.folder / "comparison" / "answer.json"
        answer = read_json(path) if path.is_file() else {}
        return answer if isinstance(answer, dict) else {}

    @property
    def headline(self) -> str:
        """The sentence at the top of the report."""
        return str(self.answer.get("learned") or self.answer.get("headline") or "")

    @cached_property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table by name, as `run_tables`."""
        return run_tables(self.folder)

    @cached_property
    def figures(self) -> Mapping[str, Picture]:
        """Every figure of the report by name, as `run_figures`."""
        return run_figures(self.folder)

    def draw(self, name: str, ax: Axes | None = None) -> list[Axes]:
        """Redraw a figure of the report with matplotlib and return its axes, to be changed: `axes[0].figure`.

        With `ax`, which must belong to a subplot grid, it is drawn there (several panels share the place of `ax`).

        Raises:
            UnknownName: No such figure.
            Undefined: There is nothing to draw; the message says why.
            ConfigError: `ax` for a figure that consists of one per arm, or without a grid.
        """
        from saeffect.report.figures import FIGURES, draw_figures, drawn_into
        from saeffect.study.stages.compare import read_comparison
        from saeffect.study.stages.report import report_context

        kind = next((kind for kind in FIGURES if name == kind.name or name.startswith(f"{kind.name}_")), None)
        if kind is not None and ax is not None and name != kind.name:
            raise ConfigError(f"{name} is one of several figures.", at="ax", fix="draw it without ax.")
        if ax is not None and ax.get_subplotspec() is None:
            raise ConfigError("these axes belong to no grid.", at="ax", fix="make them by plt.subplots.")
        run = RunFolder(self.folder, self.study)
        with drawn_into(ax):
            only = () if kind is None else (kind.name,)
            figures = draw_figures(read_comparison(run), report_context(run), only=only)
        drawn = {figure.name: figure for figure in figures}
        if name not in drawn:
            raise unknown_name("figure", name, drawn or [kind.name for kind in FIGURES], at=str(self.folder))
        figure = drawn[name].figure
        if figure is None:
            raise Undefined(drawn[name].reason)
        return list(figure.axes)

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.folder)!r}): {len(self.tables)} tables, {len(self.figures)} figures"

    def _repr_html_(self) -> str:
        parts = [
            f"<h3>{_text(self.study.config.title or self.study.config.name)}</h3>",
            f"<p>{_text(self.headline)}</p>",
        ]
        for name, heading in (("table1", "Features and steering"), ("table2", "Coherence of the domain features")):
            if name in self.tables:
                table = self.tables[name].drop(columns=["role", "reason"], errors="ignore").set_index("arm").T
                parts.append(f"<h4>{heading}</h4>{table.to_html(float_format='{:.3g}'.format, border=0)}")
        parts.append(f"<p>{len(self.tables)} tables, {len(self.figures)} figures, {_text(str(self.folder))}</p>")
        return "\n".join(parts)


def html_of(lines: Iterable[str], *tables: pd.DataFrame) -> str:
    """A result as HTML for notebooks: lines of text, then tables."""
    paragraphs = (f"<p>{_text(line)}</p>" for line in lines)
    return "\n".join((*paragraphs, *(table.to_html(float_format="{:.4g}".format, border=0) for table in tables)))


def _text(text: str) -> str:
    return escape(printable_text(text))
