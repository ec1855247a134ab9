"""The function behind each command, under the command's name: `from saeffect.commands import check`.

A command of a single stage is `run_study` with that stage; `gate` is the command with two arguments. Functions take
objects read from files (a `Study`, a recipe) and return tables or frozen objects; see docs/python.md.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from saeffect.cli.serve import serve
from saeffect.lm.finetune import finetune
from saeffect.progress import SILENT, Log
from saeffect.published import published_saes as saes
from saeffect.sae.convert import convert_sae
from saeffect.sae.training.recipe import harvest_from_recipe as harvest
from saeffect.study.check import check_study as check
from saeffect.study.diff import DiffRequest, diff_study
from saeffect.study.export import export_features as export
from saeffect.study.guard import guard
from saeffect.study.label import label
from saeffect.study.notebook import train_sae
from saeffect.study.pair_gate import gate_pair as gate
from saeffect.study.plan import plan_study as plan
from saeffect.study.reproduce import reproduce
from saeffect.study.review import export_verdicts as verdicts_export
from saeffect.study.review import import_verdicts as verdicts_import
from saeffect.study.run import STAGES
from saeffect.study.run import run_study as run
from saeffect.study.run_folder import RunFolder
from saeffect.study.verify import verify

__all__ = [
    "run",
    "check",
    "plan",
    "gate",
    "diff",
    "features",
    "coherence",
    "select",
    "match",
    "changes",
    "put_back",
    "push",
    "steer",
    "cross",
    "compare",
    "report",
    "serve",
    "verify",
    "export",
    "verdicts_export",
    "verdicts_import",
    "reproduce",
    "finetune",
    "train_sae",
    "harvest",
    "label",
    "guard",
    "saes",
    "convert_sae",
]


def diff(request: DiffRequest, out: Path | str, log: Log = SILENT) -> RunFolder:
    """Run the study of two models, to its report; errors as `diff_study` and `run_study`."""
    return run(diff_study(request, Path(out).with_suffix(".yaml"), log), out, log=log)


features, coherence, select, match, changes, put_back, push, steer, cross, compare, report = (
    partial(run, stages=(stage,)) for stage in STAGES if stage != "gate"
)
