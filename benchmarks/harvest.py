# ruff: noqa: T201
"""How fast activations are harvested, beside sae-lens' own way, and what bfloat16 costs.

    python benchmarks/harvest.py                 about 5 minutes on two cores
    python benchmarks/harvest.py --quick         a tiny model, one round: seconds
    python benchmarks/harvest.py --no-bound      without the embedded model

A model of GPT-2 small's shape with random weights (speed depends on the shape alone), blocks.8.hook_resid_pre,
8 rows of 512 tokens. Rounds are interleaved, so that a busy machine slows every side. Writes harvest.json, .svg and
.png into the results folder; the last line of stdout is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from running import parser_of, write_results
from speed_figure import Race, draw

LABELS = {
    "sae_lens_float32": "sae-lens' ActivationsStore, float32 (its default)",
    "saeffect_float32": "saeffect, float32",
    "saeffect_bfloat16": "saeffect, bfloat16 (its default here)",
}
RACE = Race(
    LABELS,
    "tokens_per_second",
    limit_of=lambda name: name.removeprefix("saeffect_"),
    speed="{:,.0f}",
    ratio="{:.1f}",
    ticks="{x:,.0f}",
    axis="tokens a second; a line: what the products alone would allow",
)


def main() -> None:
    """Measure, check, write, draw, print."""
    parser = parser_of(__doc__, "a tiny model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-bound", action="store_true", help="leave out what needs the embedded model")
    options = parser.parse_args()
    results = measure(options)
    write_results(
        results,
        "harvest",
        options,
        lambda measured, stem: draw(measured, RACE, f"{measured['task']['model']}, {measured['task']['hook']}", stem),
    )
    for threads, measured in results["speed"].items():
        print(f"{threads} thread(s)")
        for name, speed in measured["tokens_per_second"].items():
            print(f"  {LABELS[name]:<52}{speed:10,.0f} tokens/s")
        for name, share in measured["share_of_limit"].items():
            print(f"  {name:<52}{share:10.0%} of the limit")
    print(json.dumps(results["summary"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, and the summary of the last line."""
    import torch

    from saeffect.io import versions

    task = Task(quick=options.quick)
    rounds = options.rounds or (1 if options.quick else 3)
    results: dict[str, Any] = {
        "task": task.describe(),
        "versions": versions() | {name: metadata.version(name) for name in ("sae-lens", "transformer-lens")},
        "equality": task.check(),
        "speed": {},
    }
    for threads in options.threads:
        torch.set_num_threads(threads)
        results["speed"][str(threads)] = task.race(rounds)
    if not (options.no_bound or options.quick):
        from bfloat16_bound import bfloat16_bound

        results["bfloat16"] = bfloat16_bound()
    results["summary"] = summarise(results)
    return results


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The last line. A ratio is the lowest over the numbers of threads."""
    speed = results["speed"].values()
    share = [measured["share_of_limit"].get("saeffect_bfloat16") for measured in speed]
    bound = results.get("bfloat16")
    return {
        "harvest_vs_sae_lens_float32": min(round(measured["ratio"]["saeffect_float32"], 2) for measured in speed),
        "harvest_vs_sae_lens_defaults": min(round(measured["ratio"]["default"], 2) for measured in speed),
        "share_of_limit": None if None in share else round(min(share), 2),
        "tokens_per_second": {
            threads: {name: round(value) for name, value in measured["tokens_per_second"].items()}
            for threads, measured in results["speed"].items()
        },
        "equal_to_sae_lens_rel": results["equality"]["float32_relative_error"],
        "bfloat16_explained_variance_change": bound and round(bound["change"], 5),
        "bfloat16_error_share_of_variance": bound and round(bound["error_share_of_variance"], 6),
    }


class Task:
    """The same weights and tokens for both sides.

    Args:
        quick: A tiny model instead of one of GPT-2 small's shape.
    """

    def __init__(self, *, quick: bool) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        from saeffect.lm.loading import resolve_dtype

        sizes = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 200} if quick else {}
        self.config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(self.config).eval().requires_grad_(False)
        self.layer = 3 if quick else 8
        self.hook = f"blocks.{self.layer}.hook_resid_pre"
        rows, context = (4, 48) if quick else (8, 512)
        self.ids = torch.randint(1, self.config.vocab_size, (rows, context))
        self.ours = {"float32": self._ours(torch.float32)}
        self.default = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
        if self.default != "float32":
            self.ours[self.default] = self._ours(resolve_dtype("auto", torch.device("cpu")))
        self.peer = self._sae_lens()

    def describe(self) -> dict[str, Any]:
        config = self.config
        model = f"GPT-2 with random weights, {config.n_layer} blocks, d_model {config.n_embd}"
        return {"model": model, "hook": self.hook, "tokens": list(self.ids.shape), "default_dtype": self.default}

    def _ours(self, dtype: Any) -> Callable[[], Any]:
        """One pass as `harvest` and `StreamedActivations` make it: checked for NaN, outliers left out."""
        import copy

        from saeffect.lm.activations import first_limit, run_pass
        from saeffect.lm.language_model import LanguageModel, fused

        lm = LanguageModel(copy.deepcopy(self.model).to(dtype), None, "gpt2")
        ids = self.ids.numpy().astype("int32")
        limit = first_limit(lm, self.hook, ids[:2])

        def harvest() -> Any:
            with fused(lm):
                return run_pass(lm, self.hook, ids, limit)

        return harvest

    def _sae_lens(self) -> Callable[[], Any]:
        """`ActivationsStore.get_activations` on transformer-lens' model of the same weights."""
        import torch
        from datasets import Dataset
        from peer_model import hooked_gpt2
        from sae_lens import ActivationsStore

        config = self.config
        model = hooked_gpt2(self.model, processed=False)
        rows, context = self.ids.shape
        store = ActivationsStore(
            model,
            Dataset.from_dict({"tokens": self.ids.tolist()}),
            streaming=False,
            hook_name=self.hook,
            hook_head_index=None,
            context_size=context,
            d_in=config.n_embd,
            n_batches_in_buffer=4,
            total_training_tokens=self.ids.numel(),
            store_batch_size_prompts=rows,
            train_batch_size_tokens=context,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )
        return lambda: store.get_activations(self.ids)

    def check(self) -> dict[str, float]:
        """Relative errors against sae-lens' activations, over the positions that count.

        Raises:
            RuntimeError: float32 differs by more than rounding, or bfloat16 by more than 2 %.
        """
        expected = self.peer()
        errors = {}
        for name, ours in self.ours.items():
            acts, mask = ours()
            if int(mask.sum()) < 0.9 * mask[:, 1:].numel():
                raise RuntimeError("more than a tenth of the positions were left out")
            error = (acts.float() - expected[mask]).norm() / expected[mask].norm()
            errors[f"{name}_relative_error"] = float(error)
            if not error < (1e-5 if name == "float32" else 0.02):
                raise RuntimeError(f"{name} activations differ from sae-lens': relative error {float(error):.2g}")
        return errors

    def race(self, rounds: int) -> dict[str, Any]:
        """Medians over interleaved rounds; ratios are medians of each round's ratio."""
        sides = {"sae_lens_float32": self.peer, **{f"saeffect_{name}": f for name, f in self.ours.items()}}
        for side in sides.values():
            side()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        rates: dict[str, list[float]] = {name: [] for name in self.ours}
        for _ in range(rounds):
            for name, side in sides.items():
                started = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - started)
            for name, rates_of_dtype in rates.items():
                rates_of_dtype.append(self._product_rate(name))
        ratio = {
            name: statistics.median(p / o for p, o in zip(seconds["sae_lens_float32"], times, strict=True))
            for name, times in seconds.items()
        }
        speed = {name: self.ids.numel() / statistics.median(times) for name, times in seconds.items()}
        limits = {name: statistics.median(rate) / self._flop_per_token() for name, rate in rates.items()}
        return {
            "tokens_per_second": speed,
            "seconds": seconds,
            "ratio": ratio | {"default": ratio[f"saeffect_{self.default}"]},
            "limit_tokens_per_second": limits,
            "share_of_limit": {f"saeffect_{n}": speed[f"saeffect_{n}"] / limit for n, limit in limits.items()},
        }

    def _flop_per_token(self) -> float:
        """Of the blocks before the hook: products with weights, and scores and mixtures of the visible half."""
        d = self.config.n_embd
        return self.layer * (2 * 12 * d * d + 4 * d * (self.ids.shape[1] + 1) / 2)

    def _product_rate(self, dtype: str) -> float:
        """FLOP a second of the largest product of a block, its output in memory that is there already."""
        import torch

        n, d = self.ids.numel(), self.config.n_embd
        x, w = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((n, d), (d, 4 * d)))
        out = torch.empty(n, 4 * d, dtype=x.dtype)
        torch.mm(x, w, out=out)
        started = time.perf_counter()
        for _ in range(4):
            torch.mm(x, w, out=out)
        return 4 * 2 * n * d * 4 * d / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
