"""Training SAEs on activations, as many at once as share a model and a hook. Read `train_saes` downwards."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.activations.source import ActivationSource
from saeffect.errors import BadFile, ConfigError, EmptySelection, Interrupted
from saeffect.models.checkpoint import Checkpoint
from saeffect.processes import barrier, is_first, rank_and_world
from saeffect.provenance import fingerprint, hash_file, read_json, write_json
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.interruption import Interruption
from saeffect.sae.metrics import ReconstructionSums
from saeffect.sae.metrics_loggers import LoggerName
from saeffect.sae.saelens_format import WEIGHTS, load_sae, save_sae
from saeffect.sae.training_config import SaeTrainingConfig
from saeffect.sae.training_figure import save_training_figure
from saeffect.sae.training_log import TrainingLog
from saeffect.sae.training_step import StepReport, TrainingStep, new_sae

__all__ = ["Evaluation", "SaeJob", "SaeQuality", "train_sae", "train_saes", "training_quality"]

Evaluation = Callable[[SparseAutoencoder], Mapping[str, float]]

_FINISHED = "finished.json"


@dataclass(frozen=True)
class SaeJob:
    """One SAE to train.

    Attributes:
        config: The recipe.
        out: Folder for the SAE.
        metadata: Where the activations come from; kept in cfg.json.
        dtype: Of the saved weights.
    """

    config: SaeTrainingConfig
    out: Path
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float16"


@dataclass(frozen=True)
class SaeQuality:
    """Reconstruction on held-out activations.

    Attributes:
        explained_variance: See `saeffect.sae.metrics`.
        l2_ratio: Mean norm out over norm in.
        l0: Mean active features a token.
        dead_share: Share of features that fire on none of the tokens.
        mean_log10_density: Mean over features of log10(firing rate + 1e-10).
        n_tokens: Tokens measured on.
    """

    explained_variance: float
    l2_ratio: float
    l0: float
    dead_share: float
    mean_log10_density: float
    n_tokens: int


def train_sae(
    source: ActivationSource,
    config: SaeTrainingConfig,
    out: Path | str,
    *,
    metadata: Mapping[str, Any],
    dtype: str = "float16",
    evaluate: Evaluation | None = None,
    logger: LoggerName = "none",
    say: Callable[[str], None] = lambda _: None,
) -> SparseAutoencoder:
    """Train one SAE: `train_saes` with one job."""
    job = SaeJob(config, Path(out), metadata, dtype)
    return train_saes(source, [job], evaluate=evaluate, logger=logger, say=say)[0]


def train_saes(
    source: ActivationSource,
    jobs: Sequence[SaeJob],
    *,
    evaluate: Evaluation | None = None,
    logger: LoggerName = "none",
    say: Callable[[str], None] = lambda _: None,
) -> list[SparseAutoencoder]:
    """Train SAEs of one model and hook side by side, in one pass over the activations, and save them.

    They are saved in SAELens' layout, the scaling of their inputs folded into the weights, with the curve of
    the training beside them. A run that was stopped, also with `kill -9`, continues from its last checkpoint
    and ends with the same weights; one that is finished is not repeated. Under `torchrun` each process takes
    its share of every batch.

    Args:
        source: Activations.
        jobs: They share batch size, number of steps and order of the data.
        evaluate: Measures an SAE (in unscaled units) on held-out text, every `evaluate_every` steps.
        logger: "none", "wandb" or "tensorboard".
        say: Receives lines of progress.

    Raises:
        ConfigError: `out` holds a checkpoint of another run; or jobs that cannot share batches.
        EmptySelection: Fewer activations than one batch.
        BadFile: The loss is not finite; the disk is full; activations or a checkpoint cannot be read.
        Interrupted: Ctrl-C or SIGTERM; the state is saved, and the message says how to go on.
    """
    done = [_finished(job, source) for job in jobs]
    if all(sae is not None for sae in done):
        say("finished before; nothing to do")
        return [sae for sae in done if sae is not None]
    plan = _plan(source, jobs)
    scale = _input_scale(source, jobs[0].config)
    runs = [_Run(job, source, plan.total, scale) for job in jobs]
    position = _restore(runs, say)
    first = position.step
    with ExitStack() as stack:
        logs = [stack.enter_context(_log(run, first, logger, say, n_jobs=len(runs))) for run in runs]
        interruption = stack.enter_context(Interruption())
        for position, x in _batches(source, plan, position):
            mine, asked = _share(x) * scale, interruption.asked
            reports = [run.step(position.step, mine, len(x), stop=asked) for run in runs]
            for run, log, report in zip(runs, logs, reports, strict=True):
                run.check(report, position.step)
                run.record(log, position.step, report, mine, evaluate)
            done_steps = position.step + 1
            stop = any(report.stop for report in reports)
            if stop or (done_steps % plan.checkpoint_every == 0 and done_steps < plan.total):
                for run in runs:
                    run.save_checkpoint(position)
            if stop:
                raise Interrupted(
                    f"stopped after step {done_steps:,} of {plan.total:,}; the state is saved in"
                    f" {', '.join(str(job.out) for job in jobs)}.",
                    fix="run the same command again to go on from there.",
                )
    saved = [run.finish() for run in runs]
    barrier()
    return saved


@torch.inference_mode()
def training_quality(sae: SparseAutoencoder, source: ActivationSource, *, max_tokens: int = 200_000) -> SaeQuality:
    """Measure an SAE (saved scale) on activations that it has not seen."""
    sums = ReconstructionSums(sae.cfg.d_in)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    for x in source.sample(max_tokens).split(1024):
        feature_acts = sae.encode(x)
        sums.add(x, sae(x), feature_acts)
        fired += (feature_acts > 0).sum(0)
    density = fired.double() / sums.n_tokens
    return SaeQuality(
        sums.explained_variance(),
        sums.l2_ratio(),
        sums.l0(),
        float((fired == 0).double().mean()),
        float((density + 1e-10).log10().mean()),
        sums.n_tokens,
    )


@dataclass(frozen=True)
class _Plan:
    """What jobs that train side by side have in common."""

    batch_size: int
    data_seed: int
    epochs: int | None  # None: as many as the steps need
    total: int
    checkpoint_every: int


@dataclass(frozen=True)
class _Position:
    """The next batch, or the one just taken: its step, its pass over the data, its number within the pass."""

    step: int
    epoch: int
    index: int


def _plan(source: ActivationSource, jobs: Sequence[SaeJob]) -> _Plan:
    config = jobs[0].config
    shared = ("batch_size", "steps", "epochs", "checkpoint_every", "normalise_inputs")
    for job in jobs[1:]:
        for name in shared:
            if getattr(job.config, name) != getattr(config, name):
                raise ConfigError(
                    f"SAEs that are trained side by side must share {name};"
                    f" got {getattr(config, name)} and {getattr(job.config, name)}.",
                    at=name,
                    fix="give them the same, or train them one after the other from shards.",
                )
    seed = config.seed if config.data_seed is None else config.data_seed
    per_epoch = source.n_batches(config.batch_size, seed=seed, epoch=0)
    if per_epoch == 0:
        raise EmptySelection(
            f"the activations hold fewer tokens than one batch of {config.batch_size:,}.",
            at="batch_size",
            fix="give more text, or a smaller batch_size.",
        )
    if config.steps is not None:
        return _Plan(config.batch_size, seed, None, config.steps, config.checkpoint_every)
    if per_epoch is None:
        raise ConfigError(
            "the length of streamed text is not known beforehand, so the number of steps must be given.",
            at="sae.steps",
            fix="set steps; the text is read again from the start if it is too short.",
        )
    return _Plan(config.batch_size, seed, config.epochs, per_epoch * config.epochs, config.checkpoint_every)


def _batches(source: ActivationSource, plan: _Plan, start: _Position) -> Iterator[tuple[_Position, Tensor]]:
    """Batches from a position on, until the steps are done."""
    step, epoch, index = start.step, start.epoch, start.index
    while step < plan.total:
        before = step
        for x in source.batches(plan.batch_size, seed=plan.data_seed, epoch=epoch, start=index):
            yield _Position(step, epoch, index), x
            step, index = step + 1, index + 1
            if step == plan.total:
                return
        if step == before and index == 0:
            raise EmptySelection(
                f"the activations hold fewer tokens than one batch of {plan.batch_size:,}.",
                at="batch_size",
                fix="give more text, or a smaller batch_size.",
            )
        epoch, index = epoch + 1, 0


def _share(x: Tensor) -> Tensor:
    """This process's part of a batch."""
    rank, world = rank_and_world()
    return x.tensor_split(world)[rank]


def _input_scale(source: ActivationSource, config: SaeTrainingConfig) -> float:
    """Factor that gives inputs a mean norm of sqrt(d_in) (SAELens' expected_average_only_in), or 1."""
    return 1.0 if config.normalise_inputs == "none" else math.sqrt(source.d_in) / source.mean_norm


def _made_by(job: SaeJob, source: ActivationSource) -> str:
    """Fingerprint of everything that decides the weights; how often things are written does not."""
    config = job.config.model_dump(
        mode="json", exclude={"metrics_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"}
    )
    return fingerprint([config, source.identity(), job.dtype])


def _finished(job: SaeJob, source: ActivationSource) -> SparseAutoencoder | None:
    note, weights = job.out / _FINISHED, job.out / WEIGHTS
    if not (note.is_file() and weights.is_file()):
        return None
    found = read_json(note)
    if found.get("made_by") != _made_by(job, source) or found.get("weights_sha256") != hash_file(weights):
        return None
    return load_sae(job.out)


def _restore(runs: Sequence[_Run], say: Callable[[str], None]) -> _Position:
    """Take all runs back to the newest step that each has a checkpoint of; where to go on."""
    steps = set.intersection(*(set(run.checkpoint.steps()) for run in runs))
    step = max(steps, default=0)
    for run in runs:
        run.checkpoint.restore(run.trainer.leaves, run.trainer.optimizer, run.state(), step=step)
    if step:
        say(f"going on from step {step:,}")
    epoch, index = runs[0].next_batch.tolist()
    return _Position(step, epoch, index)


def _log(run: _Run, first: int, logger: LoggerName, say: Callable[[str], None], *, n_jobs: int) -> TrainingLog:
    name = run.job.out.resolve().name
    return TrainingLog(
        run.job.out,
        total_steps=run.trainer.total_steps,
        batch_size=run.job.config.batch_size,
        first_step=first,
        config=run.job.config.model_dump(mode="json"),
        say=say if n_jobs == 1 else lambda line: say(f"{name}: {line}"),
        logger=logger,
    )


class _Run:
    """One job under way."""

    def __init__(self, job: SaeJob, source: ActivationSource, total: int, scale: float) -> None:
        config = job.config
        self.job, self.scale = job, scale
        self.made_by = _made_by(job, source)
        sae = new_sae(config, source.d_in)
        sae.initialise(source.sample(20_000) * scale, config)
        if config.init_from is not None:
            from saeffect.sae.warm_start import copy_weights

            copy_weights(Path(config.init_from), sae, scale)
        self.trainer = TrainingStep(sae, config, total)
        self.step = self.trainer.__call__
        self.next_batch = torch.zeros(2, dtype=torch.int64)  # its pass over the data, its number within the pass
        self.checkpoint = Checkpoint(job.out / "checkpoint", self.made_by, keep=config.keep_checkpoints)

    def state(self) -> dict[str, Tensor]:
        return self.trainer.state() | {"next_batch": self.next_batch}

    def save_checkpoint(self, position: _Position) -> None:
        self.next_batch.copy_(torch.tensor([position.epoch, position.index + 1]))
        if is_first():
            self.checkpoint.save(position.step + 1, self.trainer.leaves, self.trainer.optimizer, self.state())
        barrier()

    def check(self, report: StepReport, step: int) -> None:
        if not math.isfinite(report.loss):
            last = self.checkpoint.steps()
            raise BadFile(
                f"the loss became {report.loss} at step {step:,}.",
                at=str(self.job.out),
                fix="lower learning_rate or clip gradients"
                + (f"; the checkpoint after step {last[-1]:,} is from before." if last else "."),
            )

    def record(self, log: TrainingLog, step: int, report: StepReport, x: Tensor, evaluate: Evaluation | None) -> None:
        """A line of metrics, a measurement on held-out text, a note of resampled features, when they are due."""
        config, last = self.job.config, step + 1 == self.trainer.total_steps
        if report.n_resampled:
            log.event(step, "resampled", n_features=report.n_resampled)
        if last or (step + 1) % config.metrics_every == 0:
            log.metrics(step, self._row(report, x))
        if evaluate is not None and (last or (step + 1) % config.evaluate_every == 0):
            with log.pause():
                measured = evaluate(self._folded())
            log.metrics(step, measured, kind="evaluation")

    def finish(self) -> SparseAutoencoder:
        """Save the SAE, drop the checkpoints, draw the curve."""
        sae = self._folded()
        if is_first():
            out = self.job.out
            save_sae(sae, out, dtype=self.job.dtype, sparsity=self.trainer.log10_density().cpu())
            save_training_figure(out)
            write_json(out / _FINISHED, {"made_by": self.made_by, "weights_sha256": hash_file(out / WEIGHTS)})
            shutil.rmtree(self.checkpoint.folder, ignore_errors=True)
        return sae

    def _folded(self) -> SparseAutoencoder:
        """A copy in unscaled units, in the form that is saved."""
        trained = self.trainer.sae
        twin = new_sae(self.job.config, trained.cfg.d_in)
        twin.cfg = copy.copy(trained.cfg)
        twin.load_state_dict(trained.state_dict())
        for name, tensor in twin.running_state().items():
            tensor.copy_(trained.running_state()[name])
        twin.fold_scale(self.scale)
        sae = twin.for_inference()
        sae.cfg = type(sae.cfg)(**{**vars(sae.cfg), "metadata": dict(self.job.metadata)})
        return sae.eval().requires_grad_(False)

    def _row(self, report: StepReport, x: Tensor) -> dict[str, float]:
        variance = float((x - x.mean(0)).square().sum() / max(len(x), 1))
        row = {"loss": report.loss, **report.losses}
        row |= {
            "explained_variance": 1 - report.losses["mse"] / variance if variance else math.nan,
            "l0": report.l0,
            "dead": int((self.trainer.since_fired >= self.job.config.dead_after).sum()),
            "gradient_norm": report.gradient_norm,
            "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
        }
        return row
