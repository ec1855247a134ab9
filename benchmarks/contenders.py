"""The contenders, their environments, and the parent's side of the connection to each process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["CONTENDERS", "Contender", "Worker", "python_of", "available_contenders"]

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Contender:
    """One way to take a training step.

    Attributes:
        key: Short and unique within its architecture; results are filed under it.
        label: What tables and figures say.
        architecture: "l1" or "topk".
        runner: Name of the function in peers_sae or ours_sae.
        module: What must be importable where it runs.
        options: See the runner.
        main: Whether it takes part in every shape, or only at 24,576 features and batch 1,024.
        ours: Whether it is saeffect.
    """

    key: str
    label: str
    architecture: str
    runner: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    main: bool = True
    ours: bool = False


def _l1(key: str, label: str, runner: str, module: str, **rest: Any) -> Contender:
    return Contender(key, label, "l1", runner, module, **rest)


def _topk(key: str, label: str, runner: str, module: str, **rest: Any) -> Contender:
    return Contender(key, label, "topk", runner, module, **rest)


CONTENDERS: tuple[Contender, ...] = (
    _l1("sae_lens", "sae-lens", "sae_lens", "sae_lens"),
    _l1("sae_lens_compiled", "sae-lens, compile_sae", "sae_lens", "sae_lens", options={"compile": True}, main=False),
    _l1("sae_lens_autocast", "sae-lens, bf16 autocast", "sae_lens", "sae_lens", options={"autocast": True}, main=False),
    _l1("dictionary_learning", "dictionary-learning, Standard", "dictionary_learning", "dictionary_learning"),
    _l1(
        "dictionary_learning_april",
        "dictionary-learning, April update",
        "dictionary_learning",
        "dictionary_learning",
        options={"april": True},
        main=False,
    ),
    _l1("plain", "plain autograd", "plain_autograd", "torch"),
    _l1("saeffect", "saeffect", "saeffect", "saeffect", ours=True),
    _l1(
        "saeffect_bf16",
        "saeffect, bf16 encoder",
        "saeffect",
        "saeffect",
        options={"encoder_dtype": "bfloat16"},
        ours=True,
    ),
    _topk("sae_lens", "sae-lens", "sae_lens", "sae_lens"),
    _topk("sae_lens_sparse", "sae-lens, sparse activations", "sae_lens", "sae_lens", options={"sparse": True}),
    _topk("dictionary_learning", "dictionary-learning", "dictionary_learning", "dictionary_learning"),
    _topk("sparsify", "sparsify, signum", "sparsify", "sparsify", options={"optimizer": "signum"}),
    _topk("sparsify_adam", "sparsify, Adam", "sparsify", "sparsify", options={"optimizer": "adam"}, main=False),
    _topk("plain", "plain autograd", "plain_autograd", "torch"),
    _topk("saeffect", "saeffect", "saeffect", "saeffect", ours=True),
    _topk(
        "saeffect_free",
        "saeffect, free decoder rows",
        "saeffect",
        "saeffect",
        options={"decoder_rows": "free"},
        main=False,
        ours=True,
    ),
    _topk(
        "saeffect_bf16",
        "saeffect, bf16 encoder",
        "saeffect",
        "saeffect",
        options={"encoder_dtype": "bfloat16"},
        ours=True,
    ),
)


@cache
def _torch_version() -> str:
    return metadata.version("torch")


@cache
def python_of(module: str) -> str | None:
    """The interpreter that can import a module: the peers' environments first, then this one; None where none can."""
    candidates = [ROOT / ".venv-peers/bin/python", ROOT / ".venv-dictionary/bin/python", Path(sys.executable)]
    if module in ("saeffect", "torch"):
        candidates = [Path(sys.executable)]
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    for python in candidates:
        if python.exists() and subprocess.run([python, "-c", code], check=False).returncode == 0:
            return str(python)
    return None


def available_contenders(architecture: str, *, every: bool, peers: bool) -> list[Contender]:
    """Contenders of an architecture that can run here.

    Args:
        architecture: "l1" or "topk".
        every: Also those that take part in one shape only.
        peers: Also other people's trainers.
    """
    return [
        c
        for c in CONTENDERS
        if c.architecture == architecture
        and (every or c.main)
        and (peers or c.module in ("saeffect", "torch"))
        and python_of(c.module) is not None
    ]


class Worker:
    """A contender's process: it waits on its stdin for orders."""

    def __init__(self, module: str, task: dict[str, Any], log: Path) -> None:
        python = python_of(module)
        assert python is not None
        environment = {**os.environ, "OMP_NUM_THREADS": str(task["threads"]), "WANDB_MODE": "disabled"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "60"}
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [python, str(HERE / "worker.py"), json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        started = self._read()
        self.peak_at_start: int = started["peak_rss"]
        self.peers: dict[str, str] = started["peers"]
        if started["torch"] != _torch_version():
            self.close()
            raise RuntimeError(
                f"{python} has torch {started['torch']}, this process {_torch_version()}: not the same race."
                " Install the same build of torch in each environment (make benchmark-env)."
            )

    def ask(self, op: str, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer.

        Raises:
            RuntimeError: The process died; the message ends with the last lines of its log.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **order}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last_lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise RuntimeError("a contender died:\n" + "\n".join(last_lines))
        return dict(json.loads(line))
