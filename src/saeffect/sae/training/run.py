"""One SAE in training: start and resume, checkpoints, measurements, and saving at the end."""

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
from saeffect.sae.hub import locate_sae
from saeffect.sae.trainable import TrainableSae
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.figure import FIGURES, save_training_figure
from saeffect.sae.training.log import METRICS_FILE, TrainingLog
from saeffect.sae.training.step import StepReport, TrainingStep, new_sae

__all__ = ["Evaluation", "Position", "SaeJob", "SaeRun", "copy_weights"]

Evaluation = Callable[[SparseAutoencoder], Mapping[str, float]]

_MAX_LINES = 200  # of metrics, unless the recipe sets how often: a curve needs no more
_CFG = "cfg.json"
_LEAVES = (WEIGHTS, _CFG, SPARSITY, METRICS_FILE, *FIGURES, "training.json", "README.md")


@dataclass(frozen=True)
class SaeJob:
    config: SaeTrainingConfig
    out: Path
    metadata: Mapping[str, Any] = field(default_factory=dict)  # origin of the activations; saved in cfg.json
    dtype: str = "float16"  # of the saved weights

    def folder(self, activations: str) -> TrainingFolder:
        """The job's folder for training on activations of this identity."""
        return TrainingFolder(self.out, self._made_by(activations), _LEAVES, keep=self.config.keep_checkpoints)

    def refuse_strangers(self) -> None:
        """As `TrainingFolder.refuse_strangers`, before the activations are known."""
        TrainingFolder(self.out, "", _LEAVES).refuse_strangers()

    def complete(self, activations: str) -> None:
        """Repair the folder of a finished SAE: rewrite cfg.json and figures if damaged, remove half-written files."""
        folder = self.folder(activations)
        cfg = (folder.note() or {}).get("cfg")
        damaged = (
            isinstance(cfg, dict) and isinstance(cfg.get("metadata"), dict) and not _contains(self.out / _CFG, cfg)
        )
        figures = [self.out / name for name in FIGURES]
        needs_figure = any(not path.is_file() or not path.stat().st_size for path in figures)
        if damaged or needs_figure or folder.checkpoint.owner() is not None:
            with folder.held():
                if damaged:
                    write_json(self.out / _CFG, cfg)
                if needs_figure:
                    save_training_figure(self.out)
                folder.checkpoint.drop_all()

    def _made_by(self, activations: str) -> str:
        """Fingerprint of everything that decides the weights; how often things are written does not."""
        config = self.config.model_dump(
            mode="json",
            exclude={"metrics_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "init_from"},
        )
        start = None if self.config.init_from is None else hash_folder(locate_sae(self.config.init_from))
        return fingerprint([config, start, activations, self.dtype])


@dataclass(frozen=True)
class Position:
    """Position of a batch: its step, its pass over the data (`epoch`), and its number within the pass."""

    step: int
    epoch: int
    index: int


def _contains(path: Path, cfg: dict[str, Any]) -> bool:
    """Whether the cfg.json at `path` contains `cfg`, as training wrote it; its metadata may have further keys."""
    stored = None
    with contextlib.suppress(SaeffectError):
        stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("metadata"), dict):
        return False
    return stored | cfg | {"metadata": stored["metadata"] | cfg["metadata"]} == stored


class SaeRun:
    """One job in training, on `device`; inputs are multiplied by `scale`."""

    def __init__(
        self, job: SaeJob, source: ActivationSource, total_steps: int, scale: float, device: torch.device
    ) -> None:
        config = job.config
        self.job, self.scale, self.device, self.folder = job, scale, device, job.folder(source.identity())
        sae = new_sae(config, source.d_in)
        sae.initialise(sae.normalised(source.sample(20_000) * scale), config)
        if config.init_from is not None:
            copy_weights(config.init_from, sae, scale, unit_decoder=config.unit_decoder, at="init_from")
        self.trainer = TrainingStep(sae.to(device), config, total_steps)
        self._metrics_every = config.metrics_every or max(30, -(-total_steps // _MAX_LINES))
        self.step = self.trainer.__call__
        self.next_batch = torch.zeros(2, dtype=torch.int64)  # its epoch, its number within the epoch
        self.checkpoint = self.folder.checkpoint

    def restore(self, step: int) -> None:
        self.checkpoint.restore(self.trainer.leaves, self.trainer.optimizer, self._state(), step=step)

    def save_checkpoint(self, position: Position) -> None:
        """Save the state after the step at `position`; older ones stay. BadFile: weights not finite, disk full."""
        self._refuse_not_finite(position.step)
        self.next_batch.copy_(torch.tensor([position.epoch, position.index + 1]))
        self.checkpoint.save(
            position.step + 1, self.trainer.leaves, self.trainer.optimizer, self._state(), drop_old=False
        )

    def check(self, report: StepReport, step: int) -> None:
        """Refuse a loss or a gradient's norm that is not finite."""
        clipped = self.job.config.clip_gradient_norm is not None
        if not math.isfinite(report.loss):
            raise self._divergence_error(f"the loss became {report.loss}", step)
        if clipped and not math.isfinite(report.gradient_norm):
            raise self._divergence_error(f"the gradient's norm became {report.gradient_norm}", step)

    def record(self, log: TrainingLog, step: int, report: StepReport, x: Tensor, evaluate: Evaluation | None) -> None:
        """Write what is due after a step: metrics, a measurement on held-out text (by `evaluate`, which takes an SAE
        in unscaled units), the number of resampled features. `x` is the whole batch, unscaled.
        """
        config, last = self.job.config, step + 1 == self.trainer.total_steps
        if report.n_resampled:
            log.event(step, "resampled", n_features=report.n_resampled)
        if last or (step + 1) % self._metrics_every == 0:
            log.metrics(step, self._metrics_row(report, x))
        if evaluate is not None and (last or (step + 1) % config.evaluate_every == 0):
            with log.pause():
                measured = evaluate(self._unscaled_sae())
            log.metrics(step, measured, kind="evaluation")

    def finish(self) -> None:
        """Save the SAE, draw the curves, and note that the training is finished; the checkpoints stay."""
        self._refuse_not_finite(self.trainer.total_steps - 1)
        out = self.job.out
        save_sae(self._unscaled_sae(), out, dtype=self.job.dtype, sparsity=self.trainer.log10_density().cpu())
        save_training_figure(out)
        self.folder.finish((WEIGHTS, SPARSITY, METRICS_FILE), cfg=read_json(out / _CFG))

    def _state(self) -> dict[str, Tensor]:
        return self.trainer.state() | {"next_batch": self.next_batch}

    def _unscaled_sae(self) -> SparseAutoencoder:
        sae_in_training = self.trainer.sae
        copy = new_sae(self.job.config, sae_in_training.cfg.d_in).to(self.device)
        copy.load_state_dict(sae_in_training.state_dict())
        copy.fold_scale(self.scale)
        sae = copy.for_inference()
        sae.cfg = replace(sae.cfg, metadata={**sae.cfg.metadata, **self.job.metadata})
        return sae.eval().requires_grad_(False)

    def _metrics_row(self, report: StepReport, x: Tensor) -> dict[str, float]:
        x = self.trainer.sae.normalised(x * self.scale)
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

    def _refuse_not_finite(self, step: int) -> None:
        """Refuse to save weights that are not finite: they would replace a good checkpoint."""
        for name, leaf in self.trainer.leaves.items():
            if not math.isfinite(float(leaf.detach().sum())) and not torch.isfinite(leaf).all():
                raise self._divergence_error(f"{name} became NaN or infinite", step)

    def _divergence_error(self, what: str, step: int) -> BadFile:
        steps = self.checkpoint.steps()
        resume = f"; it goes on from the checkpoint after step {steps[-1]:,}" if steps else ""
        fix = f"look for NaN in the activations, lower learning_rate or clip gradients{resume}."
        return BadFile(f"{what} at step {step:,}.", at=str(self.job.out), fix=fix)


@torch.no_grad()
def copy_weights(
    source: Path | str, sae: TrainableSae, scale: float, *, unit_decoder: bool = False, at: str | None = None
) -> None:
    """Copy the weights of an SAE on disk into one that is about to be trained on scaled inputs.

    Every feature keeps its index, so that SAEs of different arms are aligned. The source, which takes unscaled
    activations, may have another architecture; what is kept:

    | from \\ to | standard, topk | batchtopk, matryoshka | jumprelu | gated |
    |---|---|---|---|---|
    | standard, topk | unchanged | threshold 0 | thresholds as initialised | both biases equal |
    | jumprelu | thresholds dropped | median of the thresholds | unchanged | exact |
    | gated | gates dropped | median of the thresholds | exact | unchanged |

    Where thresholds or gates are dropped, features fire more often until the penalty, or k, limits them. `sae` is
    changed in place, leaves included; a JumpReLU SAE must have its initial thresholds. `scale` is the factor of the
    inputs in training: biases and thresholds are multiplied by it (`fold_scale` is the inverse). IncompatibleSae:
    another d_in or d_sae, or a source that normalises or centres inputs as `sae` does not.
    """
    source_sae = load_sae(source, at=at)
    fixes = {
        "d_in": "start from an SAE of the same size, at the same hook.",
        "d_sae": f"set d_sae to {source_sae.cfg.d_sae}: features keep their index.",
        "normalize_activations": "start from an SAE that takes the residual stream as it is.",
        "centre_input": f"set centre_inputs: {str(source_sae.cfg.centre_input).lower()}.",
    }
    for name, fix in fixes.items():
        stored, expected = getattr(source_sae.cfg, name), getattr(sae.cfg, name)
        if stored != expected:
            message = f"this SAE has {name}={stored!r}, but the one to be trained has {name}={expected!r}."
            raise IncompatibleSae(message, at=at or str(source), fix=fix)
    start_thresholds = {name: t.clone() for name, t in sae.named_parameters() if name == "threshold"}
    sae.start_from(source_sae, unit_decoder=unit_decoder)
    sae.fold_scale(1.0 / scale)
    if source_sae.as_start().threshold is None:
        for name, tensor in start_thresholds.items():  # in units of scaled inputs, as initialised
            sae.get_parameter(name).copy_(tensor)
