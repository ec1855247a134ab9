"""One SAE in training: how it begins and resumes, its checkpoints, what is measured, and what is saved at the end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae, SaeffectError
from saeffect.io import fingerprint, hash_folder, read_json, write_json
from saeffect.lm.activations import ActivationSource
from saeffect.lm.checkpoint import TrainingFolder
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import SPARSITY, WEIGHTS, load_sae, save_sae
from saeffect.sae.trainable import TrainableSae
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.figure import FIGURES, save_training_figure
from saeffect.sae.training.log import METRICS_FILE, TrainingLog
from saeffect.sae.training.step import StepReport, TrainingStep, new_sae

__all__ = ["Evaluation", "Position", "SaeJob", "SaeRun", "copy_weights"]

Evaluation = Callable[[SparseAutoencoder], Mapping[str, float]]

_MOST_LINES = 200  # of metrics, unless the recipe says how often: a curve is drawn from no more
_CFG = "cfg.json"
_LEAVES = (WEIGHTS, _CFG, SPARSITY, METRICS_FILE, *FIGURES, "training.json", "README.md")


@dataclass(frozen=True)
class SaeJob:
    config: SaeTrainingConfig
    out: Path
    metadata: Mapping[str, Any] = field(default_factory=dict)  # where the activations come from; kept in cfg.json
    dtype: str = "float16"  # of the saved weights

    def folder(self, activations: str) -> TrainingFolder:
        """The job's folder, if it trains on activations of this identity."""
        return TrainingFolder(self.out, self._made_by(activations), _LEAVES, keep=self.config.keep_checkpoints)

    def refuse_strangers(self) -> None:
        """As `TrainingFolder.refuse_strangers`, before the activations are known."""
        TrainingFolder(self.out, "", _LEAVES).refuse_strangers()

    def complete(self, activations: str) -> None:
        """In the folder of a finished SAE: make again what needs no training, and remove half-written files."""
        folder = self.folder(activations)
        cfg = (folder.note() or {}).get("cfg")
        damaged = isinstance(cfg, dict) and isinstance(cfg.get("metadata"), dict) and not _says(self.out / _CFG, cfg)
        drawn = [self.out / name for name in FIGURES]
        undrawn = any(not path.is_file() or not path.stat().st_size for path in drawn)
        if damaged or undrawn or folder.checkpoint.owner() is not None:
            with folder.held():
                if damaged:
                    write_json(self.out / _CFG, cfg)
                if undrawn:
                    save_training_figure(self.out)
                folder.checkpoint.drop_all()

    def _made_by(self, activations: str) -> str:
        """Fingerprint of everything that decides the weights, without how often things are written."""
        config = self.config.model_dump(
            mode="json",
            exclude={"metrics_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "init_from"},
        )
        start = None if self.config.init_from is None else hash_folder(self.config.init_from)
        return fingerprint([config, start, activations, self.dtype])


@dataclass(frozen=True)
class Position:
    """The next batch, or the one just taken: its step, its pass over the data, its number within the pass."""

    step: int
    epoch: int
    index: int


def _says(path: Path, cfg: dict[str, Any]) -> bool:
    """Whether a cfg.json says all that training wrote into it; its metadata may say more by now."""
    found = None
    with contextlib.suppress(SaeffectError):
        found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("metadata"), dict):
        return False
    return found | cfg | {"metadata": found["metadata"] | cfg["metadata"]} == found


class SaeRun:
    """One job in training; inputs are multiplied by `scale`."""

    def __init__(self, job: SaeJob, source: ActivationSource, total_steps: int, scale: float) -> None:
        config = job.config
        self.job, self.scale, self.folder = job, scale, job.folder(source.identity())
        sae = new_sae(config, source.d_in)
        sae.initialise(source.sample(20_000) * scale, config)
        if config.init_from is not None:
            copy_weights(config.init_from, sae, scale, unit_decoder=config.unit_decoder, at="init_from")
        self.trainer = TrainingStep(sae, config, total_steps)
        self._metrics_every = config.metrics_every or max(30, -(-total_steps // _MOST_LINES))
        self.step = self.trainer.__call__
        self.next_batch = torch.zeros(2, dtype=torch.int64)  # its pass over the data, its number within the pass
        self.checkpoint = self.folder.checkpoint

    def restore(self, step: int) -> None:
        self.checkpoint.restore(self.trainer.leaves, self.trainer.optimizer, self._state(), step=step)

    def save_checkpoint(self, position: Position) -> None:
        """Keep the state after the step at `position`; older ones stay. BadFile: weights not finite, disk full."""
        self._refuse_broken(position.step)
        self.next_batch.copy_(torch.tensor([position.epoch, position.index + 1]))
        self.checkpoint.save(
            position.step + 1, self.trainer.leaves, self.trainer.optimizer, self._state(), drop_old=False
        )

    def check(self, report: StepReport, step: int) -> None:
        """Refuse a loss or a gradient's norm that is not finite."""
        clipped = self.job.config.clip_gradient_norm is not None
        if not math.isfinite(report.loss):
            raise self._diverged(f"the loss became {report.loss}", step)
        if clipped and not math.isfinite(report.gradient_norm):
            raise self._diverged(f"the gradient's norm became {report.gradient_norm}", step)

    def record(self, log: TrainingLog, step: int, report: StepReport, x: Tensor, evaluate: Evaluation | None) -> None:
        """After a step, write what is due: metrics, a measurement on held-out text (by `evaluate`, of an SAE in
        unscaled units), a note of resampled features. `x` is the whole batch, unscaled.
        """
        config, last = self.job.config, step + 1 == self.trainer.total_steps
        if report.n_resampled:
            log.event(step, "resampled", n_features=report.n_resampled)
        if last or (step + 1) % self._metrics_every == 0:
            log.metrics(step, self._row(report, x))
        if evaluate is not None and (last or (step + 1) % config.evaluate_every == 0):
            with log.pause():
                measured = evaluate(self._folded())
            log.metrics(step, measured, kind="evaluation")

    def finish(self) -> None:
        """Save the SAE, draw the curve, and note that the training is done; the checkpoints stay."""
        self._refuse_broken(self.trainer.total_steps - 1)
        out = self.job.out
        save_sae(self._folded(), out, dtype=self.job.dtype, sparsity=self.trainer.log10_density().cpu())
        save_training_figure(out)
        self.folder.finish((WEIGHTS, SPARSITY, METRICS_FILE), cfg=read_json(out / _CFG))

    def _state(self) -> dict[str, Tensor]:
        return self.trainer.state() | {"next_batch": self.next_batch}

    def _folded(self) -> SparseAutoencoder:
        trained = self.trainer.sae
        twin = new_sae(self.job.config, trained.cfg.d_in)
        twin.load_state_dict(trained.state_dict())
        twin.fold_scale(self.scale)
        sae = twin.for_inference()
        sae.cfg = replace(sae.cfg, metadata={**sae.cfg.metadata, **self.job.metadata})
        return sae.eval().requires_grad_(False)

    def _row(self, report: StepReport, x: Tensor) -> dict[str, float]:
        x = x * self.scale
        variance = float((x - x.mean(0)).square().sum() / len(x))
        return {
            "loss": report.loss,
            **report.losses,
            "explained_variance": 1 - report.losses["mse"] / variance if variance else math.nan,
            "l0": report.l0,
            "dead": int((self.trainer.since_fired >= self.job.config.dead_after).sum()),
            "gradient_norm": report.gradient_norm,
            "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
        }

    def _refuse_broken(self, step: int) -> None:
        """Refuse to save weights that are not finite: they would replace a good checkpoint."""
        for name, leaf in self.trainer.leaves.items():
            if not math.isfinite(float(leaf.detach().sum())) and not torch.isfinite(leaf).all():
                raise self._diverged(f"{name} became NaN or infinite", step)

    def _diverged(self, what: str, step: int) -> BadFile:
        kept = self.checkpoint.steps()
        goes_on = f"; it goes on from the checkpoint after step {kept[-1]:,}" if kept else ""
        fix = f"look for NaN in the activations, lower learning_rate or clip gradients{goes_on}."
        return BadFile(f"{what} at step {step:,}.", at=str(self.job.out), fix=fix)


@torch.no_grad()
def copy_weights(
    source: Path | str, sae: TrainableSae, scale: float, *, unit_decoder: bool = False, at: str | None = None
) -> None:
    """Copy the weights of an SAE on disk into one that is about to be trained on scaled inputs.

    Every feature keeps its index, so that SAEs of different arms line up. The source, which takes unscaled activations,
    may have another architecture; what can be kept of it is:

    | from \\ to | standard, topk | batchtopk, matryoshka | jumprelu | gated |
    |---|---|---|---|---|
    | standard, topk | as it is | threshold 0 | threshold of a fresh start | both biases alike |
    | jumprelu | threshold dropped | median of the thresholds | as it is | exactly |
    | gated | gates dropped | median of the thresholds | exactly | as it is |

    Where a threshold or a gate is dropped, features fire more often at first; the penalty, or k, takes over. `sae` is
    changed in place, leaves included; a JumpReLU SAE must have its starting thresholds. `scale` is the factor of the
    inputs in training: biases and thresholds grow by it (`fold_scale` undoes that). IncompatibleSae: another d_in or
    d_sae, or a source that normalises or centres inputs as `sae` does not.
    """
    loaded = load_sae(source, at=at)
    fixes = {
        "d_in": "start from an SAE of the same size, at the same hook.",
        "d_sae": f"set d_sae to {loaded.cfg.d_sae}: features keep their index.",
        "normalize_activations": "start from an SAE that takes the residual stream as it is.",
        "centre_input": "start from an SAE that takes the residual stream as it is.",
    }
    for name, fix in fixes.items():
        found, expected = getattr(loaded.cfg, name), getattr(sae.cfg, name)
        if found != expected:
            said = f"this SAE has {name}={found!r}, but the one to be trained has {name}={expected!r}."
            raise IncompatibleSae(said, at=at or str(source), fix=fix)
    fresh = {name: t.clone() for name, t in sae.named_parameters() if name == "threshold"}
    sae.start_from(loaded, unit_decoder=unit_decoder)
    sae.fold_scale(1.0 / scale)
    if loaded.as_start().threshold is None:
        for name, tensor in fresh.items():  # starts in units of scaled inputs, as it was
            sae.get_parameter(name).copy_(tensor)
