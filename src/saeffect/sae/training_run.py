"""One SAE under way: its state, its checkpoints, what is measured on the way, and what is saved at the end."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.activations.source import ActivationSource
from saeffect.errors import BadFile
from saeffect.models.checkpoint import Checkpoint
from saeffect.provenance import fingerprint, hash_file, hash_folder, read_json, write_json
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.saelens_format import WEIGHTS, save_sae
from saeffect.sae.training_config import SaeTrainingConfig
from saeffect.sae.training_figure import save_training_figure
from saeffect.sae.training_log import TrainingLog
from saeffect.sae.training_step import StepReport, TrainingStep, new_sae

__all__ = ["Evaluation", "Position", "SaeJob", "SaeRun", "is_finished", "refuse_unwritable"]

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

    def made_by(self, source: ActivationSource) -> str:
        """Fingerprint of everything that decides the weights; how often things are written does not."""
        config = self.config.model_dump(
            mode="json",
            exclude={"metrics_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "init_from"},
        )
        start = None if self.config.init_from is None else hash_folder(self.config.init_from)
        return fingerprint([config, start, source.identity(), self.dtype])


@dataclass(frozen=True)
class Position:
    """The next batch, or the one just taken: its step, its pass over the data, its number within the pass."""

    step: int
    epoch: int
    index: int


def is_finished(job: SaeJob, source: ActivationSource) -> bool:
    """Whether the job's folder holds the SAE that the job would make."""
    note, weights = job.out / _FINISHED, job.out / WEIGHTS
    if not (note.is_file() and weights.is_file()):
        return False
    found = read_json(note)
    return bool(found.get("made_by") == job.made_by(source) and found.get("weights_sha256") == hash_file(weights))


class SaeRun:
    """One job under way.

    Args:
        job: What to train.
        source: Activations.
        total_steps: Of the whole run.
        scale: What inputs are multiplied by.
    """

    def __init__(self, job: SaeJob, source: ActivationSource, total_steps: int, scale: float) -> None:
        config = job.config
        self.job, self.scale, self._made_by = job, scale, job.made_by(source)
        sae = new_sae(config, source.d_in)
        sae.initialise(source.sample(20_000) * scale, config)
        if config.init_from is not None:
            from saeffect.sae.warm_start import copy_weights

            copy_weights(Path(config.init_from), sae, scale, unit_decoder=config.unit_decoder, at="init_from")
        self.trainer = TrainingStep(sae, config, total_steps)
        self.step = self.trainer.__call__
        self.next_batch = torch.zeros(2, dtype=torch.int64)  # its pass over the data, its number within the pass
        self.checkpoint = Checkpoint(job.out / "checkpoint", self._made_by, keep=config.keep_checkpoints)

    def restore(self, step: int) -> None:
        """Go back to a checkpoint; 0 for none.

        Raises:
            ConfigError: It is another run's.
            BadFile: It cannot be read.
        """
        self.checkpoint.restore(self.trainer.leaves, self.trainer.optimizer, self._state(), step=step)

    def save_checkpoint(self, position: Position) -> None:
        """Keep the state after the step at `position`; older ones stay.

        Raises:
            BadFile: The weights are not finite, or the disk is full.
        """
        self._refuse_broken(position.step)
        self.next_batch.copy_(torch.tensor([position.epoch, position.index + 1]))
        self.checkpoint.save(
            position.step + 1, self.trainer.leaves, self.trainer.optimizer, self._state(), drop_old=False
        )

    def check(self, report: StepReport, step: int) -> None:
        """Refuse to go on from numbers that are none.

        Raises:
            BadFile: The loss, or the gradient's norm, is not finite.
        """
        clipped = self.job.config.clip_gradient_norm is not None
        if not math.isfinite(report.loss):
            raise self._diverged(f"the loss became {report.loss}", step)
        if clipped and not math.isfinite(report.gradient_norm):
            raise self._diverged(f"the gradient's norm became {report.gradient_norm}", step)

    def record(self, log: TrainingLog, step: int, report: StepReport, x: Tensor, evaluate: Evaluation | None) -> None:
        """A line of metrics, a measurement on held-out text, a note of resampled features, when they are due.

        Args:
            log: Open.
            step: The step that is done, from 0.
            report: What it did.
            x: The whole batch, in any scale.
            evaluate: Measures an SAE in unscaled units.
        """
        config, last = self.job.config, step + 1 == self.trainer.total_steps
        if report.n_resampled:
            log.event(step, "resampled", n_features=report.n_resampled)
        if last or (step + 1) % config.metrics_every == 0:
            log.metrics(step, self._row(report, x))
        if evaluate is not None and (last or (step + 1) % config.evaluate_every == 0):
            with log.pause():
                measured = evaluate(self._folded())
            log.metrics(step, measured, kind="evaluation")

    def finish(self) -> None:
        """Save the SAE, draw the curve, and note that this is done; the checkpoints stay.

        Raises:
            BadFile: The weights are not finite, or the disk is full.
        """
        self._refuse_broken(self.trainer.total_steps - 1)
        out = self.job.out
        save_sae(self._folded(), out, dtype=self.job.dtype, sparsity=self.trainer.log10_density().cpu())
        save_training_figure(out)
        write_json(out / _FINISHED, {"made_by": self._made_by, "weights_sha256": hash_file(out / WEIGHTS)})

    def _state(self) -> dict[str, Tensor]:
        return self.trainer.state() | {"next_batch": self.next_batch}

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
        sae.cfg = replace(sae.cfg, metadata={**sae.cfg.metadata, **self.job.metadata})
        return sae.eval().requires_grad_(False)

    def _row(self, report: StepReport, x: Tensor) -> dict[str, float]:
        x = x * self.scale
        variance = float((x - x.mean(0)).square().sum() / len(x))
        row = {"loss": report.loss, **report.losses}
        row |= {
            "explained_variance": 1 - report.losses["mse"] / variance if variance else math.nan,
            "l0": report.l0,
            "dead": int((self.trainer.since_fired >= self.job.config.dead_after).sum()),
            "gradient_norm": report.gradient_norm,
            "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
        }
        return row

    def _refuse_broken(self, step: int) -> None:
        """A checkpoint of weights that are not finite would be of no use, and push a good one out."""
        for name, leaf in self.trainer.leaves.items():
            if not math.isfinite(float(leaf.detach().sum())) and not torch.isfinite(leaf).all():
                raise self._diverged(f"{name} became NaN or infinite", step)

    def _diverged(self, what: str, step: int) -> BadFile:
        return BadFile(
            f"{what} at step {step:,}.",
            at=str(self.job.out),
            fix=f"look for NaN in the activations, lower learning_rate or clip gradients{self._goes_on()}.",
        )

    def _goes_on(self) -> str:
        last = self.checkpoint.steps()
        return f"; it goes on from the checkpoint after step {last[-1]:,}" if last else ""


def refuse_unwritable(out: Path) -> None:
    """Refuse a folder that cannot be made or written, before anything heavy starts.

    Raises:
        BadFile: It cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"0")
    except OSError as error:
        raise BadFile(
            f"this folder cannot be written: {error.strerror or error}.",
            at=str(out),
            fix="choose another output folder, or free some space.",
        ) from error
