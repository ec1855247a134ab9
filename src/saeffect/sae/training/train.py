"""Training SAEs on activations, as many at once as share a model and a hook. Read `train_saes` downwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor

from saeffect.errors import BadFile, ConfigError, EmptySelection, Interrupted
from saeffect.lm.activations import ActivationSource
from saeffect.parallel import Interruption, barrier, from_all, is_first, rank_and_world, stopping
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import load_sae
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.log import TrainingLog
from saeffect.sae.training.loggers import LoggerName
from saeffect.sae.training.run import Evaluation, Position, SaeJob, SaeRun

__all__ = ["Evaluation", "SaeJob", "train_saes"]


def train_saes(
    source: ActivationSource,
    jobs: Sequence[SaeJob],
    *,
    evaluate: Evaluation | None = None,
    logger: LoggerName = "none",
    log: Log = SILENT,
) -> list[SparseAutoencoder]:
    """Train SAEs of one model and hook side by side, in one pass over the activations, and save them; returns them
    as saved.

    The jobs share batch size, number of steps and order of the data. The scaling of inputs is folded into the weights;
    the curve of the training lies beside them. A run that was stopped, also with `kill -9`, resumes from its last
    checkpoint and ends with the same weights; a finished one is not repeated. Under `torchrun` each process takes its
    share of every batch; the first one measures (with `evaluate`, an SAE in unscaled units), logs and writes, to
    folders that all share.

    ConfigError: `out` holds what another recipe or somebody else made, or is not shared by all processes; or jobs that
    cannot share batches or folders. EmptySelection: fewer activations than one batch. BadFile: loss or weights are not
    finite; the disk is full; something cannot be read or written. InUse: another process trains into one of the
    folders. Interrupted: Ctrl-C, SIGTERM, or the end of another process.
    """
    log = log if is_first() else SILENT
    todo = [job for job in jobs if not _is_finished(job, source, log)]
    barrier()  # all have looked before the first one changes anything
    if is_first():
        for job in jobs:
            if job not in todo:
                job.complete(source.identity())
    if todo:
        with stopping(f"{', '.join(str(job.out) for job in todo)} keep their last checkpoints"):
            _train(source, todo, evaluate=evaluate, logger=logger, log=log)
    else:
        log("finished before; nothing to do")
    return [load_sae(job.out) for job in jobs]


def _is_finished(job: SaeJob, source: ActivationSource, log: Log) -> bool:
    damaged = job.folder(source.identity()).damaged()
    if damaged:
        log(f"{job.out}: {', '.join(damaged)} changed or vanished after the training, which is done again")
    return damaged == []


def _train(
    source: ActivationSource, jobs: Sequence[SaeJob], *, evaluate: Evaluation | None, logger: LoggerName, log: Log
) -> None:
    config = jobs[0].config  # batches, steps and order of the data are the same for all
    _refuse_unlike(jobs)
    rank, world = rank_and_world()
    total = _total_steps(source, config, world)
    with ExitStack() as stack:
        if is_first():  # take hold of all folders before anything heavy starts, or of none
            folders = [job.folder(source.identity()) for job in jobs]
            for folder in folders:
                stack.enter_context(folder.held())
            for folder in folders:
                folder.checkpoint.begin()
        barrier()
        # SAELens' expected_average_only_in: inputs get a mean norm of sqrt(d_in).
        scale = 1.0 if config.normalise_inputs == "none" else math.sqrt(source.d_in) / source.mean_norm
        runs = [SaeRun(job, source, total, scale) for job in jobs]
        start = _restore(runs, log)
        interruption = stack.enter_context(Interruption())
        logs = [stack.enter_context(opened) for opened in _logs(runs, start.step, logger, log)]
        for position, x in _batches(source, config, total, start):
            mine, asked = x.tensor_split(world)[rank] * scale, interruption.asked
            reports = [run.step(position.step, mine, len(x), stop=asked) for run in runs]
            for run, report in zip(runs, reports, strict=True):
                run.check(report, position.step)
            for run, training_log, report in zip(runs, logs, reports, strict=False):
                run.record(training_log, position.step, report, x, evaluate)
            done = position.step + 1
            stop = any(report.stop for report in reports)
            if stop or (done % config.checkpoint_every == 0 and done < total):
                _save_checkpoints(runs, position)
            if stop:
                raise Interrupted(
                    f"stopped after step {done:,} of {total:,}; the state is saved in"
                    f" {', '.join(str(job.out) for job in jobs)}.",
                    fix="run the same command again to go on from there.",
                )
    _finish(runs)


def _finish(runs: Sequence[SaeRun]) -> None:
    """Save every SAE before deleting the first checkpoint, so that a kill in between loses nothing."""
    if is_first():
        for run in runs:
            run.finish()
        for run in runs:
            run.checkpoint.drop_all()
    barrier()


def _save_checkpoints(runs: Sequence[SaeRun], position: Position) -> None:
    """Save all runs' checkpoints, and only then delete old ones: there is always a step that all have."""
    if is_first():
        for run in runs:
            run.save_checkpoint(position)
        for run in runs:
            run.checkpoint.drop_old(position.step + 1)
    barrier()


def _total_steps(source: ActivationSource, config: SaeTrainingConfig, world: int) -> int:
    if config.batch_size < world:
        raise ConfigError(
            f"a batch of {config.batch_size:,} tokens cannot be shared by {world:,} processes.",
            at="batch_size",
            fix="use fewer processes, or a larger batch_size.",
        )
    per_epoch = source.n_batches(config.batch_size)
    if per_epoch == 0:
        raise _too_few(config.batch_size)
    if config.steps is not None:
        return config.steps
    if per_epoch is None:
        raise ConfigError(
            "the length of streamed text is not known beforehand, so the number of steps must be given.",
            at="sae.steps",
            fix="set steps; the text is read again from the start if it is too short.",
        )
    return per_epoch * config.epochs


def _refuse_unlike(jobs: Sequence[SaeJob]) -> None:
    for job in jobs[1:]:
        if unlike := job.config.unlike(jobs[0].config):
            key, mine, first = unlike
            raise ConfigError(
                f"SAEs that are trained side by side must share {key}; got {first} and {mine}.",
                at=key,
                fix="give them the same (for several seeds: one data_seed), or train them one after the other.",
            )
    folders = [job.out.resolve() for job in jobs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError("two SAEs cannot be trained into one folder.", at=str(folder))


def _too_few(batch_size: int) -> EmptySelection:
    return EmptySelection(
        f"the activations hold fewer tokens than one batch of {batch_size:,}.",
        at="batch_size",
        fix="give more text, or a smaller batch_size.",
    )


def _batches(
    source: ActivationSource, config: SaeTrainingConfig, total: int, start: Position
) -> Iterator[tuple[Position, Tensor]]:
    step, epoch, index = start.step, start.epoch, start.index
    while step < total:
        before = step
        for x in source.batches(config.batch_size, seed=config.order_seed, epoch=epoch, start=index):
            yield Position(step, epoch, index), x
            step, index = step + 1, index + 1
            if step == total:
                return
        if step == before and index == 0:
            raise _too_few(config.batch_size)
        epoch, index = epoch + 1, 0


def _restore(runs: Sequence[SaeRun], log: Log) -> Position:
    """Return all runs to the newest step of which each has a readable checkpoint; where to resume."""
    steps = sorted(set.intersection(*(set(run.checkpoint.steps()) for run in runs)), reverse=True)
    # Each process reads the checkpoints that the first one wrote.
    if any(seen != steps for seen in from_all(steps)):
        raise ConfigError(
            "the processes see different checkpoints.",
            at=", ".join(str(run.job.out) for run in runs),
            fix="let the output be in a folder that all machines share.",
        )
    for step in steps:
        unreadable = _restored(runs, step)
        if unreadable is None:
            log(f"going on from step {step:,}")
            epoch, index = runs[0].next_batch.tolist()
            return Position(step, epoch, index)
        if step == steps[-1]:
            raise unreadable
        log(f"the checkpoint after step {step:,} cannot be read ({unreadable.at}): the one before is taken")
    return Position(0, 0, 0)


def _restored(runs: Sequence[SaeRun], step: int) -> BadFile | None:
    """Why a process cannot read the checkpoints of a step; None if all can."""
    mine = None
    try:
        for run in runs:
            run.restore(step)
    except BadFile as error:
        mine = error
    return next((error for error in (mine, *from_all(mine)) if error is not None), None)


def _logs(runs: Sequence[SaeRun], first_step: int, logger: LoggerName, log: Log) -> Iterator[TrainingLog]:
    for run in runs if is_first() else ():
        name = run.job.out.resolve().name
        yield TrainingLog(
            run.job.out,
            total_steps=run.trainer.total_steps,
            batch_size=run.job.config.batch_size,
            first_step=first_step,
            config=run.job.config.model_dump(mode="json"),
            log=log if len(runs) == 1 else log.named(name),
            logger=logger,
        )
