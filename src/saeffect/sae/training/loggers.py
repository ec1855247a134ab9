"""Loggers of a training's metrics besides its own file: Weights & Biases, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from saeffect.errors import BadFile, ConfigError, NotFound, unknown_name
from saeffect.io import atomic_path
from saeffect.progress import Log

__all__ = ["LoggerName", "MetricsLogger", "TrainingRun", "check_logger", "open_logger"]

LoggerName = Literal["none", "wandb", "tensorboard"]

_ID_FILE = "run_id.txt"
_NOT_CURVES = ("step", "kind", "event")


class MetricsLogger(Protocol):
    """Takes the rows of metrics.jsonl as they come."""

    def log(self, row: Mapping[str, Any]) -> None:
        """One row, as `TrainingLog` writes it."""

    def close(self, *, failed: bool) -> None:
        """No more rows will come; `failed` when an error or the user ended the training."""


@dataclass(frozen=True)
class TrainingRun:
    """The training that a logger records. The logger's files go below the SAE's folder."""

    folder: Path
    config: Mapping[str, Any]
    first_step: int = 0  # steps done before this process; above 0 when a stopped run resumes
    earlier: Iterable[Mapping[str, Any]] = field(default=())  # rows of those steps, sent to a logger that is new

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def plain_config(self) -> dict[str, Any]:
        """The hyperparameters as JSON values; values of other types become strings."""
        return json.loads(json.dumps(dict(self.config), default=str))


def check_logger(name: str) -> None:
    """Refuse an unknown logger (UnknownName), or one whose package is not installed (NotFound)."""
    if name not in get_args(LoggerName):
        raise unknown_name("logger", name, get_args(LoggerName), at="logger")
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    # Without an origin it is not a package but a folder of that name, such as W&B creates.
    if spec is None or spec.origin is None:
        raise NotFound(
            f"the {name} logger needs the package {name!r}, which is not installed.",
            at="logger",
            fix=f'pip install "saeffect[{name}]".',
        )


def open_logger(name: str, run: TrainingRun, log: Log) -> MetricsLogger | None:
    """The logger of that name, ready for rows; None for "none". ConfigError if Weights & Biases refuses; BadFile if
    the record of the run to continue is damaged or unwritable.
    """
    try:
        if name == "wandb":
            return _WeightsAndBiases(run, log)
        if name == "tensorboard":
            return _TensorBoard(run, log)
    except OSError as error:
        raise BadFile(f"the {name} logger cannot write: {error}.", at=str(run.folder)) from error
    return None


def _curves(row: Mapping[str, Any]) -> dict[str, float]:
    """Names and values to draw: "train/mse", "evaluation/l0", "resampled/n_features"."""
    prefix = row["event"] if row["kind"] == "event" else row["kind"]
    return {f"{prefix}/{name}": value for name, value in row.items() if name not in _NOT_CURVES and value is not None}


class _WeightsAndBiases:
    """A run at Weights & Biases, or offline in the folder (WANDB_MODE); a row is sent once a later step's comes."""

    def __init__(self, run: TrainingRun, log: Log) -> None:
        import wandb

        id_path = run.folder / "wandb" / _ID_FILE
        stored_id = _run_id(id_path) if run.first_step else None
        identity = stored_id or uuid.uuid4().hex[:8]
        # Its messages and its capture of the terminal would interfere with ours; some come before `init` reads its own.
        settings = wandb.Settings(silent=True, console="off")
        try:
            wandb.setup(settings)
            self._run = wandb.init(
                project=None if os.environ.get("WANDB_PROJECT") else "saeffect",
                id=identity,
                name=run.name,
                dir=str(run.folder),
                config=run.plain_config(),
                resume="allow" if stored_id else None,
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases does not let the run begin: {error}",
                at="logger",
                fix="run `wandb login`; or set WANDB_MODE=offline and upload later with `wandb sync`.",
            ) from error
        with atomic_path(id_path) as temporary:
            temporary.write_text(identity + "\n", encoding="utf-8")
        if self._run.offline:
            runs = run.folder / "wandb" / f"offline-run-*-{identity}"
            log(f"Weights & Biases: offline; upload with `wandb sync {runs}`")
        elif not self._run.disabled:
            log(f"Weights & Biases: {self._run.url}")
        if not stored_id:
            for row in run.earlier:
                self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(_curves(row), step=row["step"])

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(path: Path) -> str | None:
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", text, re.ASCII):
        raise BadFile(
            f"this is no id of a Weights & Biases run: {text[:40]!r}.",
            at=str(path),
            fix="delete the file; the training then goes on under a new id.",
        )
    return text


class _TensorBoard:
    """Event files in the folder's `tensorboard`; what a stopped run logged after its checkpoint is hidden."""

    def __init__(self, run: TrainingRun, log: Log) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        is_new = not any(folder.glob("events.*"))
        self._writer = SummaryWriter(str(folder), purge_step=None if is_new else run.first_step)
        if is_new or not run.first_step:
            listing = json.dumps({"name": run.name, **run.plain_config()}, indent=2, ensure_ascii=False)
            self._writer.add_text("config", "\n".join(f"    {line}" for line in listing.splitlines()))
        if is_new:
            for row in run.earlier:
                self._add(row)
        self._writer.flush()
        log(f"TensorBoard: tensorboard --logdir {folder}")

    def log(self, row: Mapping[str, Any]) -> None:
        self._add(row)
        self._writer.flush()  # rows in its queue would be lost if the process is killed

    def close(self, *, failed: bool) -> None:
        del failed
        self._writer.close()

    def _add(self, row: Mapping[str, Any]) -> None:
        for name, value in _curves(row).items():
            if not isinstance(value, str) and math.isfinite(value):
                self._writer.add_scalar(name, value, row["step"])
