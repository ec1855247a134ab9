"""Commands that run a study or one of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from saeffect.cli.console import ConsoleProgress, show
from saeffect.cli.processes import processes
from saeffect.paths import user_path

__all__ = ["check", "register", "run"]

_Study = Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or bundled:smollm2-medical.")]
_Out = Annotated[
    Path | None, typer.Option(help="Run directory; by default runs/<name of the study>.", parser=user_path)
]
_Redo = Annotated[bool, typer.Option("--redo", help="Do it even if it was done with the same inputs.")]

_STAGES = {
    "gate": "Measure whether each SAE reconstructs its model at its hook.",
    "features": "Make the feature tables: top tokens, moments, activity, contexts.",
    "coherence": "Score the coherence of each feature's top tokens.",
    "select": "Choose the domain features by vocabulary and verdicts.",
    "match": "Match features between arms: kept, moved, gone, new; one SAE on both models.",
    "steer": "Search the dose and steer with every chosen feature and its placebo; also under torchrun.",
    "compare": "Compare the arms.",
    "report": "Write tables, figures and report.html.",
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        "run",
        help="Run a whole study; finished stages are skipped. Steering shared over processes:"
        " torchrun --nproc-per-node=N -m saeffect run ...",
    )(run)
    app.command("check", help="Validate a study without computing anything.")(check)
    for name, text in _STAGES.items():
        app.command(name, help=text + " The stages before it must have been run.")(_stage_command(name))


def run(study: _Study, out: _Out = None, redo: _Redo = False) -> None:
    """Every stage of a study, in order."""
    from saeffect.study.run import STAGES

    _run(study, out, STAGES, redo)


def _show_keys(wanted: bool) -> None:
    if wanted:
        from saeffect.study.study_keys import study_keys

        show(study_keys().rstrip("\n"))
        raise typer.Exit


def check(
    study: _Study,
    out: _Out = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="Show the keys of a study file.", callback=_show_keys, is_eager=True)
    ] = False,
) -> None:
    """Names, files, shapes, tokenizers, disk, and the design check."""
    del keys
    from saeffect.study.check import check_study
    from saeffect.study.study import Study

    with ConsoleProgress() as log:
        opened = Study.open(study)
        result = check_study(opened, out or Path("runs") / opened.config.name, log)
    for line in result.lines:
        show(f"ok  {line}")
    _show_design(result.design)


def _show_design(design: Any) -> None:
    notable = design[design["status"].isin(["flaw", "unknown", "intended"])]
    marks = {"flaw": "!! ", "unknown": "?  ", "intended": "-- "}
    show("design check: in what the arms differ besides the model")
    if notable.empty:
        show("    in nothing")
    arms = [c for c in design.columns if c not in ("field", "differs", "status", "matters")]
    for row in notable.to_dict("records"):
        values = ", ".join(f"{arm}: {row[arm] or 'not recorded'}" for arm in arms)
        show(f"{marks[row['status']]} {row['field']} ({values})")
        show(f"    {row['matters']}")


def _stage_command(stage: str) -> Callable[..., None]:
    def command(study: _Study, out: _Out = None, redo: _Redo = False) -> None:
        _run(study, out, (stage,), redo)

    command.__name__ = stage
    return command


def _run(path: str, out: Path | None, stages: Sequence[str], redo: bool) -> None:
    from saeffect.parallel import is_first
    from saeffect.study.run import run_study
    from saeffect.study.study import Study

    with processes() as log:
        study = Study.open(path)
        folder = out or Path("runs") / study.config.name
        log(f"study {study.config.name}: {', '.join(study.config.arms)}")
        finished = run_study(study, folder, stages=stages, redo=redo, log=log)
    if "report" in stages and is_first():
        _conclude(finished.path("comparison", "answer.json"), finished.path("report.html"))


def _conclude(answer: Path, report: Path) -> None:
    from saeffect.io import read_json

    show("")
    show(read_json(answer)["headline"])
    show("")
    show(f"report: {report.resolve()}")
