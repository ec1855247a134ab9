"""`saeffect diff`: what fine-tuning changed between two models, without a study file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from saeffect.cli.console import ConsoleProgress, show
from saeffect.paths import user_path

__all__ = ["Base", "Chat", "Field", "Nulls", "Positions", "Sae", "Texts", "Tuned", "diff"]

Base = Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder, GGUF file, or bundled:<name>.")]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The same, or a PEFT adapter alone.")]
Sae = Annotated[
    str | None,
    typer.Option(help="An SAE of BASE: folder, bundled:<name>, saelens:<release>/<id> or hf:org/name/folder."),
]

Texts = Annotated[
    list[str] | None,
    typer.Option(help="Text to read, as path or name=path; give it again for more. By default the bundled text."),
]
Field = Annotated[str | None, typer.Option(help="Which field of the text, or a template: '{question}\\n{answer}'.")]
Chat = Annotated[bool, typer.Option("--chat", help="The text is conversations, as lists of messages.")]
Positions = Annotated[
    list[str] | None, typer.Option(metavar="PART", help="Of chats, what counts: user, assistant, special, ...")
]
Nulls = Annotated[str | None, typer.Option(help="Null fine-tunes: folder of traces, or bundled:<name>.")]

_NO_SAE = (
    "no SAE was given (--sae), so features are not compared: one of the base model would name what changed inside it."
    " Train one with saeffect train-sae, or take a public one of this model in SAELens' layout."
)
_NO_NULLS = "not known: how much of this any further training would change (--nulls, see saeffect finetune)."


def diff(
    base: Base,
    tuned: Tuned,
    sae: Sae = None,
    text: Texts = None,
    field: Field = None,
    chat: Chat = False,
    positions: Positions = None,
    vocabulary: Annotated[str | None, typer.Option(help="Words of a domain: bundled name or file.")] = None,
    nulls: Nulls = None,
    push: Annotated[
        bool, typer.Option("--push", help="Also let BASE write while pushed along the mean difference, and nulls'.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; the study file lies beside it.", parser=user_path)
    ] = None,
) -> None:
    """Compare a base model with its fine-tune: first findings, then the report."""
    from saeffect.study.diff import DiffRequest, diff_study, same_model, write_study
    from saeffect.study.run import STAGES, run_study
    from saeffect.study.stages.report import findings

    folder = out or Path("runs") / _study_name(tuned)
    request = DiffRequest(
        base,
        tuned,
        sae,
        tuple(text or ()),
        vocabulary,
        nulls,
        _study_name(folder.name),
        field=field,
        chat=chat or bool(positions),
        positions=tuple(positions or ("all",)),
        push=push,
    )
    with ConsoleProgress() as log:
        study = diff_study(request, folder.with_name(folder.name + ".yaml"), log)
        if same_model(study):
            show(f"no difference: {base} and {tuned} are the same files.")
            return
        first_stages = STAGES[: STAGES.index("changes") + 1]
        run = run_study(study, folder, stages=first_stages, log=log, ready=lambda: write_study(study))
        lines = findings(run, log)
        if not lines:
            show("no difference: on this text, both models predict the same to the last digit.")
            return
        missing = [line for line, value in ((_NO_SAE, sae), (_NO_NULLS, study.config.nulls)) if not value]
        for line in ("", *lines, *missing, ""):
            show(line)
        run_study(study, folder, log=log)
    if run.path("report.html").is_file():
        show(f"report: {run.path('report.html').resolve()}")
    show(f"to go on: edit {study.source}, then saeffect run {study.source} --out {folder}")


def _study_name(text: str) -> str:
    """A study's name from what was typed: its last part, in letters that a name may have."""
    last = Path(text.removeprefix("bundled:")).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:60] or "diff"
