"""A study from beginning to end. Read this first: it is the method section, one stage a paragraph.

A stage is skipped while the hash of everything its numbers depend on is unchanged. After an interruption, the next run
resumes after the last finished stage (steering: the last finished batch of texts) with the same numbers.

Under `torchrun` only the first process writes; the others wait and join in the shared stages (steering).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from saeffect.errors import ConfigError, unknown_name
from saeffect.io import fingerprint, sole_writer
from saeffect.parallel import from_first, is_first, join
from saeffect.progress import SILENT, Log
from saeffect.study.check import check_study
from saeffect.study.progress_file import ProgressFile
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.changes import changes_inputs, run_changes
from saeffect.study.stages.compare import compare_inputs, run_compare
from saeffect.study.stages.cross import cross_inputs, help_cross, run_cross
from saeffect.study.stages.dose_search import dose_inputs, help_dose_search, run_dose_search
from saeffect.study.stages.features import (
    coherence_inputs,
    features_inputs,
    run_coherence,
    run_features,
    run_seeds,
    seeds_inputs,
)
from saeffect.study.stages.gate import gate_inputs, run_gate
from saeffect.study.stages.match import match_inputs, run_match
from saeffect.study.stages.push import push_inputs, run_push
from saeffect.study.stages.put_back import put_back_inputs, run_put_back
from saeffect.study.stages.report import models_report_inputs, report_inputs, run_models_report, run_report
from saeffect.study.stages.select import run_select, select_inputs
from saeffect.study.stages.steer import help_steer, run_steer, steer_inputs
from saeffect.study.stages.trace import run_trace, trace_inputs
from saeffect.study.study import Study

__all__ = ["STAGES", "run_study", "stage_keys"]

_NO_FURTHER_STAGES = ""  # message of the first process to the others

STAGES = (
    "gate", "features", "coherence", "select", "match", "changes", "put-back", "push", "steer", "cross", "compare",
    "report",
)  # fmt: skip


def run_study(
    study: Study,
    out: Path | str,
    *,
    stages: Sequence[str] = STAGES,
    redo: bool = False,
    log: Log = SILENT,
    ready: Callable[[], None] = lambda: None,
) -> RunFolder:
    """Run the stages of a study in order, skipping those already done; returns the run directory.

    Under `torchrun` every process makes the same call and gets the directory; the tables equal those of one process
    with as many threads.

    Args:
        out: The run directory.
        stages: Some of `STAGES`; earlier ones must be up to date.
        redo: Repeat the named stages even if their inputs are unchanged.
        ready: Called once the study is checked, before anything is computed.

    Raises:
        UnknownName: An unknown stage.
        ConfigError: An earlier stage is not up to date; processes see different files; or the directory holds something
            that no run wrote.
        InUse: Another run is writing to the directory.
        Interrupted: Another process of the same run is gone.
        SaeffectError: A problem in the study; the failing stage changed nothing in the directory.
    """
    for name in stages:
        if name not in STAGES:
            raise unknown_name("stage", name, STAGES)
    join()  # now: until the first shared stage the other processes would time out
    if not is_first():
        return _help(study, out)
    check_study(study, out, log)
    ready()
    with sole_writer(out):
        run = RunFolder(out, study)
        run.remove_leftovers()
        for line in run.damage:
            log(f"  {line}")
        with ProgressFile(run.folder, study.config.name, study.config.title, stage_keys(study)) as progress:
            log = progress.following(log)
            _open_new_arms(run, stages, log)
            _lead(run, stages, redo, log, progress)
    return run


def stage_keys(study: Study) -> tuple[str, ...]:
    """Every stage of a study by its name in the manifest ("steer control"), in the order in which they run."""
    return tuple(step.key for step in _method(study))


def _lead(run: RunFolder, stages: Sequence[str], redo: bool, log: Log, progress: ProgressFile) -> None:
    """The first process: run the stages in order, and announce the shared ones to the others."""
    last = max(STAGES.index(name) for name in stages) if stages else -1
    for step in _method(run.study):
        if step.stage in stages:
            progress.begin(step.key)
            inputs = step.read_inputs(run)
            run.stage(step.key, inputs, partial(_work, step, run, inputs, log), log, redo=redo)
        elif STAGES.index(step.stage) < last and not run.is_done(step.key, step.read_inputs(run)):
            # Going on would mix this study's numbers with those of an older one.
            raise ConfigError(
                f"the stage before is missing or out of date: {step.key}.",
                at=str(run.folder),
                fix=f"run saeffect {step.stage} first, or saeffect run for all of it.",
            )
    if "report" in stages:
        run.delete_partial()
    from_first(_NO_FURTHER_STAGES)


@dataclass(frozen=True)
class _Step:
    """A stage of one arm or of all; the other processes run `help`."""

    stage: str
    name: str
    inputs: Callable[..., Any]
    work: Callable[..., Iterable[Path]]
    arm: str | None = None
    help: Callable[..., None] | None = None

    @property
    def key(self) -> str:
        return f"{self.name} {self.arm}" if self.arm else self.name

    def arguments(self, run: RunFolder) -> tuple[Any, ...]:
        return (run, self.arm) if self.arm else (run,)

    def read_inputs(self, run: RunFolder) -> Any:
        return self.inputs(*self.arguments(run))


def _method(study: Study) -> Iterator[_Step]:
    if not study.has_saes:
        yield from _method_without_saes(study)
        return

    # Does each SAE reconstruct its model at its hook? If not, its features say nothing about the model.
    for arm in study.ordered_arms():
        yield _Step("gate", "gate", gate_inputs, run_gate, arm)

    # Both models read the same text, and write: what differs, in raw numbers.
    yield _Step("changes", "trace", trace_inputs, run_trace)

    # Name every feature by the tokens it promotes, and find where it fires.
    for arm in study.ordered_arms():
        yield _Step("features", "features", features_inputs, run_features, arm)

    # How similar in meaning are the top tokens of each feature?
    for arm in study.config.arms:
        yield _Step("coherence", "coherence", coherence_inputs, run_coherence, arm)

    # Which features are about the domain, by vocabulary and by people's verdicts?
    yield _Step("select", "select", select_inputs, run_select)

    # Which feature became which, and which are gone or new, beyond what other seeds of the same model show?
    # First the features of those further seeds, where the study has any.
    for arm in study.ordered_arms():
        if study.config.arms[arm].more_saes:
            yield _Step("match", "seeds", seeds_inputs, run_seeds, arm)
    if not study.one_sae:
        yield _Step("match", "match", match_inputs, run_match)

    # What changed between the models themselves, on features that both share? The trace, beyond what fine-tunes change
    # that were taught nothing.
    yield _Step("changes", "changes", changes_inputs, run_changes)

    # What do the changed features cause? Their activations are put back while the fine-tuned model reads other text.
    if study.config.put_back is not None:
        yield _Step("put-back", "put back", put_back_inputs, run_put_back)

    # What does the mean activation difference make the base model write, and nulls' differences, as far?
    if study.config.push is not None:
        yield _Step("push", "push", push_inputs, run_push)

    # Does steering with a feature do what its tokens promise, more than features that resemble it in everything but
    # their subject, more than random directions, and more than what needs no SAE? The dose is found on prompts that
    # the test does not use; what is measured, and which of it decides, was declared in the study file.
    if study.config.steering is not None:
        yield _Step("steer", "dose search", dose_inputs, run_dose_search, help=help_dose_search)
        for arm in study.ordered_arms():
            yield _Step("steer", "steer", steer_inputs, run_steer, arm, help_steer)

    # Each arm's SAE on both models: what does the model do, with the same features, and what does the SAE do?
    if study.config.comparison.crossed:
        yield _Step("cross", "cross", cross_inputs, run_cross, help=help_cross)

    # What differs between control and treatment, and is it more than between two SAEs of the control?
    yield _Step("compare", "compare", compare_inputs, run_compare)

    # The report.
    yield _Step("report", "report", report_inputs, run_report)


def _method_without_saes(study: Study) -> Iterator[_Step]:
    # What changed between the models themselves is all that there is to find.
    yield _Step("changes", "trace", trace_inputs, run_trace)
    yield _Step("changes", "changes", changes_inputs, run_changes)
    if study.config.push is not None:
        yield _Step("push", "push", push_inputs, run_push)
    yield _Step("report", "report", models_report_inputs, run_models_report)


def _open_new_arms(run: RunFolder, stages: Sequence[str], log: Log) -> None:
    """Load the arms to be measured before anything is written: only loading finds broken weights."""
    if "gate" in stages and run.study.has_saes:
        # The control last: it is needed first, and the last model loaded stays in memory.
        for arm in reversed(run.study.ordered_arms()):
            if not run.is_done(f"gate {arm}", gate_inputs(run, arm)):
                run.study.open_arm(arm, log)


def _work(step: _Step, run: RunFolder, inputs: Any, log: Log) -> Iterable[Path]:
    """Do the work of a stage; announce it to the other processes if they share it."""
    if step.help is not None:
        from_first(f"{step.key}\n{fingerprint(inputs)}")
    return step.work(*step.arguments(run), log)


def _help(study: Study, out: Path | str) -> RunFolder:
    """The other processes: do a share of each stage that the first process announces, until it ends."""
    while (call := from_first()) != _NO_FURTHER_STAGES:
        key, expected = call.split("\n")
        run = RunFolder(out, study)
        step = next(step for step in _method(study) if step.key == key)
        if fingerprint(step.read_inputs(run)) != expected or step.help is None:
            raise ConfigError(
                f"the processes see different files, or run different studies: the inputs of {key} differ.",
                at=str(run.folder),
                fix="let the study, its models and --out be in folders that all machines share.",
            )
        step.help(*step.arguments(run))
    return RunFolder(out, study)
