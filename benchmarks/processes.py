# ruff: noqa: T201
"""Speed of two single-thread processes, started by torchrun, against one, at training and at harvesting.

    python benchmarks/processes.py                       about 5 minutes on two cores
    python benchmarks/processes.py --cases l1-4096       one of them
    python benchmarks/processes.py --quick               tiny shapes, seconds: only runs the code

Training goes through `train_saes`, at d_in 768 and d_sae 24,576, from weights at realistic sparsity; the number after
the name of a case is the batch over all processes. Time is counted between batches, so it includes whole steps, but not
the start or the saving at the end. Harvesting runs a model of GPT-2 small's shape; its speed is the one that the
command prints at the end. Rounds are interleaved. The last line of stdout is one line of JSON; `train_2_vs_1` is the
smaller of L1 and TopK at a batch of 4,096.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from torch import Tensor

CASES = ("l1-4096", "topk-4096", "l1-1024", "topk-1024", "harvest")
HOOK = "blocks.8.hook_resid_pre"
L0, K = 58.0, 32
WARMUP = 2


class TimedBatches:
    """A few batches from memory, repeated; records when each was taken.

    Attributes:
        taken_at: Seconds on a monotonic clock.
    """

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        self.taken_at: list[float] = []
        self.d_in, self.mean_norm = pool.shape[-1], float(pool[0].norm(dim=1).mean())

    def identity(self) -> str:
        return "benchmark"

    def sample(self, n_tokens: int) -> Tensor:
        return self._pool[0][:n_tokens]

    def n_batches(self, batch_size: int) -> int:  # noqa: ARG002 - the interface's
        return len(self._pool)

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:  # noqa: ARG002
        for x in self._pool[start:]:
            self.taken_at.append(time.monotonic())
            yield x
        self.taken_at.append(time.monotonic())


def train(task: dict[str, Any]) -> float:
    """Tokens a second of this process's run, over all processes."""
    import torch
    from safetensors.torch import load_file

    from saeffect.sae.training.config import SaeTrainingConfig
    from saeffect.sae.training.train import SaeJob, train_saes

    torch.set_num_threads(1)
    architecture, batch = task["architecture"], task["batch"]
    source = TimedBatches(load_file(task["activations"])["x"])
    architecture_settings = {"k": task["k"]} if architecture == "topk" else {"l1_coefficient": 1.0}
    config = SaeTrainingConfig(
        architecture=architecture,
        d_sae=task["d_sae"],
        batch_size=batch,
        steps=task["steps"],
        learning_rate=1e-5,  # sparsity stays where it started
        init_from=task["start"],
        normalise_inputs="none",
        checkpoint_every=10_000,
        metrics_every=10_000,
        **architecture_settings,
    )
    train_saes(source, [SaeJob(config, Path(task["out"]))])
    seconds = [after - before for before, after in zip(source.taken_at, source.taken_at[1:], strict=False)]
    return batch / statistics.median(seconds[WARMUP:])


def harvest(task: dict[str, Any]) -> float:
    """Tokens a second over all processes, from the last log line of `harvest`."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from saeffect.lm.activations import TokenRows
    from saeffect.lm.harvest import harvest as run
    from saeffect.lm.language_model import LanguageModel
    from saeffect.progress import Log

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 2, "vocab_size": 320} if task["quick"] else {}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    lm = LanguageModel(model, None, "gpt2-shaped", "random")
    ids = np.random.default_rng(0).integers(1, 320, (task["rows"], 128)).astype(np.int32)
    rows = TokenRows(ids, np.zeros(len(ids), dtype=np.int64), ("random",))
    lines: list[str] = []
    run(lm, HOOK, rows, task["out"], rows_per_shard=4, batch_size=4, log=Log(lines.append))
    match = re.search(r"([\d,]+) tokens/s", lines[-1])
    assert match is not None
    return float(match[1].replace(",", ""))


def work(task: dict[str, Any]) -> None:
    """One process of one measurement; the first one prints the speed."""
    from saeffect.parallel import is_first, leave

    speed = (harvest if task["case"] == "harvest" else train)(task)
    if is_first():
        print(json.dumps({"speed": speed}))
    leave()


def prepare(case: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write what a case's processes read; the task, but for the folder of results."""
    if case == "harvest":
        return {"case": case, "rows": 8 if options.quick else 48, "quick": options.quick}
    import torch
    from safetensors.torch import save_file
    from synthetic import Planted, l1_start, topk_start

    from saeffect.sae import ARCHITECTURES
    from saeffect.sae.base import SaeConfig
    from saeffect.sae.formats import save_sae

    torch.set_num_threads(os.cpu_count() or 1)
    name, batch = case.split("-")
    d_in, d_sae, n_tokens = (32, 128, 64) if options.quick else (768, 24_576, int(batch))
    architecture, k = ("standard", None) if name == "l1" else ("topk", 8 if options.quick else K)
    steps = WARMUP + options.steps * max(1, 4096 // int(batch))
    planted = Planted(d_in, d_sae)
    pool = planted.activations(steps * n_tokens).view(steps, n_tokens, d_in)
    start = l1_start(planted, pool[0], 12.0 if options.quick else L0) if k is None else topk_start(planted)
    sae = ARCHITECTURES[architecture](SaeConfig(architecture, d_in, d_sae, k=k))
    with torch.no_grad():
        for parameter, tensor in start.items():
            getattr(sae, parameter).copy_(tensor)
    save_sae(sae, folder / f"{case}-start")
    save_file({"x": pool}, folder / f"{case}-x.safetensors")
    return {
        "case": case,
        "architecture": architecture,
        "start": str(folder / f"{case}-start"),
        "activations": str(folder / f"{case}-x.safetensors"),
        "batch": n_tokens,
        "d_sae": d_sae,
        "k": k,
        "steps": steps,
    }


def measure_speed(task: dict[str, Any], n_processes: int) -> float:
    """Start the processes, each with one thread, and wait for the speed."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={n_processes}", "--master-port=29517"]
    with tempfile.TemporaryDirectory() as out:
        argument = json.dumps(task | {"out": out})
        process = subprocess.run(
            [sys.executable, *(torchrun if n_processes > 1 else []), __file__, "--work", argument],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return float(json.loads(process.stdout.splitlines()[-1])["speed"])


def main() -> None:
    """Measure each case with one process and with two, alternating."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of 4,096 tokens; more of smaller ones")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return
    summary: dict[str, float] = {}
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            task = prepare(case, options, Path(folder))
            speeds: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(options.rounds):
                for n_processes, measured in speeds.items():
                    measured.append(measure_speed(task, n_processes))
        one, two = (statistics.median(measured) for measured in speeds.values())
        print(f"{case:<12}{one:10,.0f} tokens/s in one process{two:10,.0f} in two {two / one:8.2f} times")
        key = "harvest_2_vs_1" if case == "harvest" else f"train_2_vs_1_{case.replace('-', '_')}"
        summary[key] = round(two / one, 3)
    at_4096 = [summary[key] for key in ("train_2_vs_1_l1_4096", "train_2_vs_1_topk_4096") if key in summary]
    if at_4096:
        summary["train_2_vs_1"] = min(at_4096)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
