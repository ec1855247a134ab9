"""Training SAEs on activations, several of one model and hook at once. Read `train_saes` downwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, EmptySelection, Interrupted
from saeffect.lm.activations import ActivationSource
from saeffect.lm.loading import resolve_device
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
    device: str = "auto",
    logger: LoggerName = "none",
    log: Log = SILENT,
) -> list[SparseAutoencoder]:
    """Train SAEs of one model and hook side by side, in one pass over the activations, on a device (`auto`: a GPU if
    there is one), and save them; returns the saved SAEs.

    The jobs share batch size, number of steps and order of the data. The scaling of inputs is folded into the weights;
    a figure of the training is saved beside them. A stopped run, also after `kill -9`, resumes from its last checkpoint
    and ends with the same weights; a finished one is not repeated. Under `torchrun` each process takes its share of
    every batch; the first one measures (with `evaluate`, which takes an SAE in unscaled units), logs and writes, to
    folders that all processes share.

    ConfigError: `out` holds files of another recipe or that no training wrote, or is not shared by all processes; or
    jobs that cannot share batches or folders. EmptySelection: fewer activations than one batch. BadFile: loss or
    weights are not finite; the disk is full; a file cannot be read or written. InUse: another process trains into one
    of the folders. Interrupted: Ctrl-C, SIGTERM, or the end of another process.
    """
    log = log if is_first() else SILENT
    todo = [job for job in jobs if not _is_finished(job, source, log)]
    barrier()  # all processes have looked before the first one changes anything
    if is_first():
        for job in jobs:
            if job not in todo:
                job.complete(source.identity())
    if todo:
        with stopping(f"{', '.join(str(job.out) for job in todo)} keep their last checkpoints"):
            _train(source, todo, resolve_device(device, at="device"), evaluate=evaluate, logger=logger, log=log)
    else:
        log("finished before; nothing to do")
    return [load_sae(job.out) for job in jobs]


def _is_finished(job: SaeJob, source: ActivationSource, log: Log) -> bool:
    damaged = job.folder(source.identity()).damaged()
    if damaged:
        log(f"{job.out}: {', '.join(damaged)} changed or vanished after the training, which is done again")
    return damaged == []


def _train(
    source: ActivationSource,
    jobs: Sequence[SaeJob],
    device: torch.device,
    *,
    evaluate: Evaluation | None,
    logger: LoggerName,
    log: Log,
) -> None:
    config = jobs[0].config  # batch size, steps and order of the data are the same for all
    _refuse_unlike_jobs(jobs)
    rank, world = rank_and_world()
    total = _total_steps(source, config, world)
    with ExitStack() as stack:
        if is_first():  # lock all folders or none, before anything heavy starts
            folders = [job.folder(source.identity()) for job in jobs]
            for folder in folders:
                stack.enter_context(folder.held())
            for folder in folders:
                folder.checkpoint.begin()
        barrier()
        # SAELens' expected_average_only_in: inputs get a mean norm of sqrt(d_in).
        scale = 1.0 if config.normalise_inputs == "none" else math.sqrt(source.d_in) / source.mean_norm
        runs = [SaeRun(job, source, total, scale, device) for job in jobs]
        start = _restore(runs, log)
        interruption = stack.enter_context(Interruption())
        logs = [stack.enter_context(opened) for opened in _open_logs(runs, start.step, logger, log)]
        for position, x in _batches(source, config, total, start):
            local, stop_requested = x.tensor_split(world)[rank].to(device) * scale, interruption.requested
            reports = [run.step(position.step, local, len(x), stop=stop_requested) for run in runs]
            for run, report in zip(runs, reports, strict=True):
                run.check(report, position.step)
            for run, training_log, report in zip(runs, logs, reports, strict=False):
                run.record(training_log, position.step, report, x, evaluate)
            n_done = position.step + 1
            stop = any(report.stop for report in reports)
            if stop or (n_done % config.checkpoint_every == 0 and n_done < total):
                _save_checkpoints(runs, position)
            if stop:
                raise Interrupted(
                    f"stopped after step {n_done:,} of {total:,}; the state is saved in"
                    f" {', '.join(str(job.out) for job in jobs)}.",
                    fix="run the same command again to go on from there.",
                )
    _finish(runs)


def _finish(runs: Sequence[SaeRun]) -> None:
    """Save every SAE before deleting any checkpoint, so that a kill in between loses nothing."""
    if is_first():
        for run in runs:
            run.finish()
        for run in runs:
            run.checkpoint.drop_all()
    barrier()


def _save_checkpoints(runs: Sequence[SaeRun], position: Position) -> None:
    """Save all runs' checkpoints, and only then delete old ones, so that there is always a step that all have."""
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
        raise _too_few_error(config.batch_size)
    if config.steps is not None:
        return config.steps
    if per_epoch is None:
        raise ConfigError(
            "the length of streamed text is not known beforehand, so the number of steps must be given.",
            at="sae.steps",
            fix="set steps; the text is read again from the start if it is too short.",
        )
    return per_epoch * config.epochs


def _refuse_unlike_jobs(jobs: Sequence[SaeJob]) -> None:
    for job in jobs[1:]:
        if unlike := job.config.unlike(jobs[0].config):
            key, value, first = unlike
            raise ConfigError(
                f"SAEs that are trained side by side must share {key}; got {first} and {value}.",
                at=key,
                fix="give them the same (for several seeds: one data_seed), or train them one after the other.",
            )
    folders = [job.out.resolve() for job in jobs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError("two SAEs cannot be trained into one folder.", at=str(folder))


def _too_few_error(batch_size: int) -> EmptySelection:
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
        first_step = step
        for x in source.batches(config.batch_size, seed=config.order_seed, epoch=epoch, start=index):
            yield Position(step, epoch, index), x
            step, index = step + 1, index + 1
            if step == total:
                return
        if step == first_step and index == 0:
            raise _too_few_error(config.batch_size)
        epoch, index = epoch + 1, 0


def _restore(runs: Sequence[SaeRun], log: Log) -> Position:
    """Restore all runs at the newest step of which each has a readable checkpoint; returns the next batch."""
    steps = sorted(set.intersection(*(set(run.checkpoint.steps()) for run in runs)), reverse=True)
    # Each process reads the checkpoints that the first process wrote.
    if any(other != steps for other in from_all(steps)):
        raise ConfigError(
            "the processes see different checkpoints.",
            at=", ".join(str(run.job.out) for run in runs),
            fix="let the output be in a folder that all machines share.",
        )
    for step in steps:
        failure = _restore_step(runs, step)
        if failure is None:
            log(f"going on from step {step:,}")
            epoch, index = runs[0].next_batch.tolist()
            return Position(step, epoch, index)
        if step == steps[-1]:
            raise failure
        log(f"the checkpoint after step {step:,} cannot be read ({failure.at}): the one before is taken")
    return Position(0, 0, 0)


def _restore_step(runs: Sequence[SaeRun], step: int) -> BadFile | None:
    """Restore all runs at a step; the error if any process cannot read a checkpoint, else None."""
    failure = None
    try:
        for run in runs:
            run.restore(step)
    except BadFile as error:
        failure = error
    return next((error for error in (failure, *from_all(failure)) if error is not None), None)


def _open_logs(runs: Sequence[SaeRun], first_step: int, logger: LoggerName, log: Log) -> Iterator[TrainingLog]:
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
