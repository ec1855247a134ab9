"""`saeffect run`: all stages of a study, and one command per stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from saeffect.cli.console import process_log, show
from saeffect.paths import user_path

__all__ = ["Out", "RunFolder", "STAGE_HELP", "StudyFile", "run", "stage_command"]

StudyFile = Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or bundled:smollm2-medical.")]
Out = Annotated[Path | None, typer.Option(help="Run directory; by default runs/<name of the study>.", parser=user_path)]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/<name>.", parser=user_path)
]
_Redo = Annotated[bool, typer.Option("--redo", help="Do it even if it was done with the same inputs.")]

STAGE_HELP = {
    "gate": "Measure whether each SAE reconstructs its model at its hook.",
    "features": "Make the feature tables: top tokens, activity, contexts.",
    "coherence": "Score the coherence of each feature's top tokens.",
    "select": "Choose the domain features by vocabulary and verdicts.",
    "match": "Match features between arms: kept, moved, gone, new.",
    "changes": "Judge what changed, against null fine-tunes.",
    "put-back": "Put the changed features back: see what that undoes.",
    "push": "Push the base model along the mean activation difference. Where push asks for it.",
    "steer": "Search the dose, and steer with features and placebos. Also under torchrun.",
    "cross": "Read and steer each arm's SAE on both models. Where comparison.crossed asks for it; also under torchrun.",
    "compare": "Compare the arms.",
    "report": "Write tables, figures and report.html.",
}


def run(study: StudyFile, out: Out = None, redo: _Redo = False) -> None:
    """Every stage of a study, in order."""
    _run(study, out, tuple(STAGE_HELP), redo)


def stage_command(stage: str) -> Callable[..., None]:
    """The command that runs a single stage."""

    def command(study: StudyFile, out: Out = None, redo: _Redo = False) -> None:
        _run(study, out, (stage,), redo)

    command.__name__ = stage
    return command


def _run(path: str, out: Path | None, stages: Sequence[str], redo: bool) -> None:
    from saeffect.io import read_json
    from saeffect.parallel import is_first
    from saeffect.study.run import run_study
    from saeffect.study.stages.report import findings
    from saeffect.study.study import Study

    with process_log() as log:
        study = Study.open(path)
        folder = out or Path("runs") / study.config.name
        log(f"study {study.config.name}: {', '.join(study.config.arms)}")
        finished = run_study(study, folder, stages=stages, redo=redo, log=log)
    if "report" in stages and is_first():
        if study.has_saes:
            answer = read_json(finished.path("comparison", "answer.json"))
            headline: tuple[str, ...] = (str(answer["learned"] or answer["headline"]),)
        else:
            headline = findings(finished)
        for line in ("", *headline, "", f"report: {finished.path('report.html').resolve()}"):
            show(line)
