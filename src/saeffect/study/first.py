"""The first answer of a study: its stages up to what changed, and the findings in lines; the rest later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saeffect.progress import SILENT, Log
from saeffect.report.words.first import first_findings, is_same
from saeffect.study.check import check_study
from saeffect.study.run import STAGES, run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.changes import read_trace
from saeffect.study.study import Study

__all__ = ["FirstAnswer", "findings", "first_answer"]

_FIRST = STAGES[: STAGES.index("changes") + 1]


@dataclass(frozen=True, eq=False)
class FirstAnswer:
    """The findings, one a line (none if the models do the same), and the run so far."""

    lines: tuple[str, ...]
    run: RunFolder

    def rest(self, log: Log = SILENT) -> RunFolder:
        """Run the other stages, the report last."""
        return run_study(self.run.study, self.run.folder, log=log)


def first_answer(
    study: Study, out: Path, log: Log = SILENT, *, ready: Callable[[], None] = lambda: None
) -> FirstAnswer:
    """Run the stages up to "changes". `ready` is called when the study is found sound, before anything is computed.

    Errors as `run_study`.
    """
    check_study(study, out, log)
    ready()
    run = run_study(study, out, stages=_FIRST, log=log)
    return FirstAnswer(findings(run, log), run)


def findings(run: RunFolder, log: Log = SILENT) -> tuple[str, ...]:
    """What the stage "changes" found, in lines; none if the models do the same."""
    trace, study = read_trace(run), run.study
    if is_same(trace):
        return ()
    control = study.by_role("control")[0]
    lm = study.open_model(control, log)
    features = run.read_table(run.arm(control, "features.parquet")) if study.has_saes else None
    lines = first_findings(
        trace,
        lm.token_strings(),
        lm.plain_tokens().numpy(),
        top_tokens=[] if features is None else features["top_tokens"].tolist(),
        groups=run.table_or_none(run.path("comparison", "change_groups.parquet")),
        decode=lm.decode,
    )
    return tuple(lines)
