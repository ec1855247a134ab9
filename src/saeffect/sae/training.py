"""Training one SAE on harvested activations. Read `train_sae` downwards."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saeffect.activations.shards import ActivationStore
from saeffect.config import StrictModel
from saeffect.errors import BadFile, EmptySelection, Interrupted
from saeffect.models.checkpoint import Checkpoint
from saeffect.provenance import atomic_path, fingerprint
from saeffect.sae.base import SaeConfig
from saeffect.sae.metrics import ReconstructionSums
from saeffect.sae.saelens_format import save_sae
from saeffect.sae.topk import TopKSae, TopKStep

__all__ = ["SaeQuality", "SaeTrainingConfig", "train_sae", "training_quality"]


class SaeTrainingConfig(StrictModel):
    """Everything that decides the SAE, given the activations."""

    architecture: Literal["topk"] = "topk"
    d_sae: int = Field(default=4608, ge=1, description="Number of features.")
    k: int = Field(default=32, ge=1, description="Active features a token.")
    epochs: int = Field(default=2, ge=1, description="Passes over the activations.")
    batch_size: int = Field(default=1024, ge=1, description="Tokens a step.")
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_share: float = Field(default=0.02, ge=0, lt=1, description="Share of the steps with a rising rate.")
    decay_share: float = Field(
        default=0.3, ge=0, le=1, description="Share of the steps, at the end, with a falling rate."
    )
    dead_after: int = Field(default=100_000, ge=1, description="A feature is dead after so many tokens without firing.")
    auxiliary_k: int = Field(default=256, ge=1, description="Dead features a token may use in the auxiliary loss.")
    auxiliary_weight: float = Field(default=1 / 32, ge=0)
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between checkpoints.")
    report_every: int = Field(default=100, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> SaeTrainingConfig:
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} is more than d_sae={self.d_sae}")
        return self


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
    store: ActivationStore,
    config: SaeTrainingConfig,
    out: Path | str,
    *,
    metadata: dict[str, Any],
    dtype: str = "float16",
    say: Callable[[str], None] = lambda _: None,
) -> TopKSae:
    """Train an SAE and save it in SAELens' layout, the scaling of its inputs folded into the weights.

    A run that was stopped, also with `kill -9`, continues from its last checkpoint and ends with the same
    weights.

    Args:
        store: Activations.
        config: The recipe.
        out: Folder for the SAE.
        metadata: Where the activations come from; kept in cfg.json.
        dtype: Of the saved weights.
        say: Receives lines of progress.

    Raises:
        ConfigError: `out` holds a checkpoint of another run.
        EmptySelection: Fewer activations than one batch.
        BadFile: The loss is not finite.
        Interrupted: Ctrl-C; the message says how to go on.
    """
    out = Path(out)
    sample = store.sample(20_000)
    scale = _input_scale(sample)
    sae = TopKSae(SaeConfig("topk", sample.shape[1], config.d_sae, k=config.k, metadata=metadata))
    sae.initialise(sample.mean(0) * scale, config.seed)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), fused=True)
    run = _Run(sae, optimizer, torch.zeros(config.d_sae, dtype=torch.int64))
    checkpoint = Checkpoint(out / "checkpoint", fingerprint([config.model_dump(mode="json"), store.note["made_by"]]))
    first = checkpoint.restore(dict(sae.named_parameters()), optimizer, {"since_fired": run.since_fired})
    per_epoch = sum(1 for _ in store.batches(config.batch_size, seed=config.seed, epoch=0))
    if not per_epoch:
        raise EmptySelection(
            f"the harvest holds fewer tokens than one batch of {config.batch_size:,}.",
            at=str(store.folder),
            fix="give more text, or a smaller batch_size.",
        )
    total = per_epoch * config.epochs
    log = _Log(out / "metrics.jsonl", total, config, say, first)
    try:
        for step, x in _batches(store, config, per_epoch, first):
            optimizer.param_groups[0]["lr"] = config.learning_rate * _rate_factor(step, total, config)
            result = _step(run, x * scale, config)
            if not math.isfinite(result.mse):
                raise BadFile(
                    f"the loss became {result.mse} at step {step}.",
                    at=str(out),
                    fix="lower learning_rate; the last checkpoint is from before.",
                )
            log.step(step, x * scale, result, run, config)
            if (step + 1) % config.checkpoint_every == 0:
                checkpoint.save(step + 1, dict(sae.named_parameters()), optimizer, {"since_fired": run.since_fired})
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the last checkpoint stays in {out}.", fix="run the same command again.") from None
    _fold_scale(sae, scale)
    save_sae(sae, out, dtype=dtype)
    shutil.rmtree(checkpoint.folder, ignore_errors=True)
    return sae


@torch.inference_mode()
def training_quality(sae: TopKSae, store: ActivationStore, *, max_tokens: int = 200_000) -> SaeQuality:
    """Measure an SAE (saved scale) on activations that it has not seen."""
    sums = ReconstructionSums(sae.cfg.d_in)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    for x in store.sample(max_tokens).split(1024):
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


@dataclass
class _Run:
    """What changes from step to step."""

    sae: TopKSae
    optimizer: torch.optim.Adam
    since_fired: Tensor  # tokens since each feature last fired, int64 [d_sae]


def _batches(
    store: ActivationStore, config: SaeTrainingConfig, per_epoch: int, first: int
) -> Iterator[tuple[int, Tensor]]:
    for epoch in range(first // per_epoch, config.epochs):
        for index, x in enumerate(store.batches(config.batch_size, seed=config.seed, epoch=epoch)):
            step = epoch * per_epoch + index
            if step >= first:
                yield step, x


def _step(run: _Run, x: Tensor, config: SaeTrainingConfig) -> TopKStep:
    dead = (run.since_fired >= config.dead_after).nonzero().flatten()
    result = run.sae.accumulate_gradients(
        x, dead=dead, k_auxiliary=config.auxiliary_k, auxiliary_weight=config.auxiliary_weight
    )
    run.sae.remove_parallel_gradient()
    torch.nn.utils.clip_grad_norm_(run.sae.parameters(), 1.0)
    run.optimizer.step()
    run.sae.normalise_decoder()
    run.since_fired += len(x)
    run.since_fired[result.fired] = 0
    return result


def _rate_factor(step: int, total: int, config: SaeTrainingConfig) -> float:
    warmup = max(1, round(config.warmup_share * total))
    decay = max(1, round(config.decay_share * total))
    return min(1.0, (step + 1) / warmup, (total - step) / decay)


def _input_scale(sample: Tensor) -> float:
    """Factor that gives inputs a mean norm of sqrt(d_in) (SAELens' expected_average_only_in)."""
    return float(math.sqrt(sample.shape[1]) / sample.norm(dim=1).mean())


@torch.no_grad()
def _fold_scale(sae: TopKSae, scale: float) -> None:
    """Let the SAE take and give unscaled activations; feature activations keep the scaled size over `scale`.

    With inputs s·x the activations are s times what unit decoder rows need to rebuild x, so both biases
    shrink by s and the weights stay: decoder rows keep length 1, activations are in the residual's units.
    """
    sae.b_enc.div_(scale)
    sae.b_dec.div_(scale)


class _Log:
    """A line of metrics.jsonl, and of progress, every so many steps."""

    def __init__(
        self, path: Path, total: int, config: SaeTrainingConfig, say: Callable[[str], None], first: int
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in _read_lines(path) if r["step"] < first] if first else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._total, self._say, self._first, self._config = total, say, first, config
        self._started = time.monotonic()

    def step(self, step: int, x: Tensor, result: TopKStep, run: _Run, config: SaeTrainingConfig) -> None:
        done = step + 1
        if done % config.report_every and done != self._total:
            return
        variance = float((x - x.mean(0)).square().sum() / len(x))
        row = {
            "step": step,
            "tokens": done * config.batch_size,
            "mse": result.mse,
            "auxiliary": result.auxiliary,
            "explained_variance": 1 - result.mse / max(variance, 1e-12),
            "l0": result.l0,
            "dead": int((run.since_fired >= config.dead_after).sum()),
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        pace = (done - self._first) / (time.monotonic() - self._started)
        self._say(
            f"step {done}/{self._total}  explained variance {row['explained_variance']:.3f}"
            f"  l0 {result.l0:.1f}  dead {row['dead']}  {pace * config.batch_size:,.0f} tokens/s"
            f"  {(self._total - done) / pace / 60:.1f} min left"
        )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a killed run
            break
    return rows
