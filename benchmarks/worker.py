"""One contender in its own process: `python worker.py '{"runner": ..., ...}'`, orders on stdin, answers on stdout.

Started by `contenders.Worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from feed import Feed, Finished, startup_message
from measure import copy_rate, product_rate
from peers_sae import RUNNERS as PEERS
from peers_sae import Spec


def _private_stdout() -> TextIO:
    """The pipe for answers; from here on, what a peer prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _machine(task: dict[str, Any], answers: TextIO) -> None:
    """Measures the machine's rates, between the contenders."""
    n, d_in, d_sae = task["batch"], task["d_in"], task["d_sae"]
    answers.write(json.dumps(startup_message()) + "\n")
    answers.flush()
    while json.loads(sys.stdin.readline() or '{"op": "quit"}')["op"] != "quit":
        rates = {
            "float32_flop": product_rate(n, d_in, d_sae, torch.float32),
            "bfloat16_flop": product_rate(n, d_in, d_sae, torch.bfloat16),
            "copy_bytes": copy_rate(4 * d_in * d_sae * 2),
        }
        answers.write(json.dumps(rates) + "\n")
        answers.flush()


def _exactness(spec: Spec, pool: Tensor, answers: TextIO) -> None:
    from exactness import exactness

    for message in (startup_message(), exactness(spec, pool[0])):
        answers.write(json.dumps(message) + "\n")
        answers.flush()


def main() -> None:
    answers = _private_stdout()
    task = json.loads(sys.argv[1])
    if task["runner"] == "saeffect":  # what `saeffect train-sae` does first
        from saeffect.parallel import keep_freed_memory, use_large_pages

        keep_freed_memory()
        use_large_pages()
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    if task["runner"] == "machine":
        _machine(task, answers)
        return
    from safetensors.torch import load_file

    spec = Spec(
        start=load_file(task["start"]),
        batch=task["batch"],
        k=task["k"],
        lr=task["lr"],
        l1=task["l1"],
        options=task["options"],
    )
    pool = load_file(task["activations"])["x"]
    if task["runner"] == "exactness":
        _exactness(spec, pool, answers)
        return
    runners = dict(PEERS)
    if task["runner"] not in runners:
        from ours_sae import RUNNERS as OURS

        runners |= OURS
    with contextlib.suppress(Finished):
        runners[task["runner"]](spec, Feed(pool, task["k"], sys.stdin, answers))


if __name__ == "__main__":
    main()
