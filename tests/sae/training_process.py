"""Training in processes of their own, that can be killed, signalled, and run side by side as torchrun would start them.

They are forked from a server that has torch imported, so that twenty of them take seconds.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for torchrun, which runs this file as a script

from processes import ranks, server
from saeffect.errors import SaeffectError
from saeffect.io import hash_file
from saeffect.lm.activations import ActivationSource
from saeffect.lm.harvest import ActivationStore
from saeffect.progress import Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.training import run as training_run
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.train import SaeJob, train_saes

WEIGHTS = "sae_weights.safetensors"
METADATA = {"hook_name": "blocks.1.hook_resid_pre"}


@dataclass(frozen=True)
class Spec:
    """What a process trains.

    Attributes:
        jobs: (folder, settings) of each SAE.
        store: Folder of shards.
        lm: Folder of a model whose residuals are streamed instead.
        evaluate: Whether there is held-out text to measure on; it takes as long as the file `slow` in the first
            job's folder says, seconds.
        most_bytes: Largest file that may be written.
    """

    jobs: tuple[tuple[Path, Mapping[str, Any]], ...]
    store: Path | None = None
    lm: Path | None = None
    evaluate: bool = True
    most_bytes: int | None = None

    def source(self) -> ActivationSource:
        if self.lm is None:
            assert self.store is not None
            return ActivationStore.open(self.store)
        import numpy as np

        from saeffect.config import ModelConfig
        from saeffect.lm.activations import StreamedActivations, TokenRows
        from saeffect.lm.loading import load_language_model

        ids = np.random.default_rng(0).integers(1, 320, (24, 24)).astype(np.int32)
        rows = TokenRows(ids, np.zeros(24, dtype=np.int64), ("general",))
        lm = load_language_model(ModelConfig(path=str(self.lm), dtype="float32"))
        return StreamedActivations.open(lm, "blocks.1.hook_resid_pre", rows, pool_rows=8, rows_a_pass=3)

    def train(self, log: Log) -> None:
        """Train in this process."""
        torch.set_num_threads(1)
        if self.most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most_bytes, self.most_bytes))
        training_run.save_training_figure = lambda folder: None  # type: ignore[assignment,return-value]
        jobs = [SaeJob(SaeTrainingConfig(**config), out, METADATA, "float32") for out, config in self.jobs]
        slow = self.jobs[0][0] / "slow"

        def evaluate(sae: SparseAutoencoder) -> dict[str, float]:
            if slow.exists():
                log("measuring")
                time.sleep(float(slow.read_text()))
            return {"ce_loss_score": float(sae.W_dec.sum())}

        train_saes(self.source(), jobs, evaluate=evaluate if self.evaluate else None, log=log)


class Running:
    """A process at work on a spec."""

    def __init__(self, spec: Spec, environment: Mapping[str, str] | None = None) -> None:
        context = server()
        self._lines, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_serve, args=(spec, dict(environment or {}), theirs))
        self.process.start()
        theirs.close()

    def lines(self) -> Iterator[str]:
        """What it says, until it ends; the text of its error last."""
        while True:
            try:
                yield self._lines.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                return

    def line(self, number: int) -> str | None:
        """Wait for so many further lines; the last of them, None if it ended before."""
        found = None
        for number_now, found in enumerate(self.lines(), start=1):
            if number_now == number:
                return found
        return None

    def end(self) -> tuple[int | None, list[str]]:
        """Wait for the end; the exit code and what it said."""
        said = list(self.lines())
        return self.process.exitcode, said


def train(spec: Spec, n_processes: int = 1) -> tuple[list[int | None], list[list[str]]]:
    """Train in one process or many; exit codes, and what each said."""
    all_running = [Running(spec, variables) for variables in ranks(n_processes)]
    ends = [running.end() for running in all_running]
    return [code for code, _ in ends], [said for _, said in ends]


def left_in(folder: Path) -> dict[str, Any]:
    """All that a finished run left: hashes of the SAE's files, rows of metrics but for the seconds, other names."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    hashed = {name: hash_file(folder / name) for name in (WEIGHTS, "cfg.json", "sparsity.safetensors")}
    return hashed | {"metrics": rows, "names": sorted(p.name for p in folder.iterdir())}


def _serve(spec: Spec, variables: dict[str, str], lines: Connection) -> None:
    os.environ.update(variables)
    try:
        spec.train(Log(lines.send))
    except SaeffectError as error:
        lines.send(str(error))
        sys.exit(error.exit_code)
    finally:
        lines.close()


def _main() -> None:
    """As torchrun starts it: the store, the folder, the settings."""

    def write(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    try:
        Spec(((Path(sys.argv[2]), json.loads(sys.argv[3])),), Path(sys.argv[1])).train(Log(write))
    except SaeffectError as error:
        sys.exit(f"{error}\nexit code {error.exit_code}")


if __name__ == "__main__":
    _main()
