"""The first answer of a study: its stages up to what changed, and the findings in lines; the rest later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saeffect.progress import SILENT, Log
from saeffect.study.run import STAGES, run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.models_report import findings
from saeffect.study.study import Study

__all__ = ["FirstAnswer", "first_answer"]

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
    run = run_study(study, out, stages=_FIRST, log=log, ready=ready)
    return FirstAnswer(findings(run, log), run)
