# ruff: noqa: T201
"""How many features a second are steered, beside the paper's loop through transformer-lens.

    python benchmarks/steering.py                about 5 minutes on two cores
    python benchmarks/steering.py --quick        a tiny model, one round: seconds

A model of GPT-2 small's shape with random weights in both libraries, a prompt of seven tokens, 50 new ones at top_p
0.3, temperature 1 and frequency penalty 1, a vector added to `blocks.8.hook_resid_pre` at every position. The paper's
loop steers one feature at a time; saeffect gives each row of a batch its own vector. Steered texts alone: that
saeffect generates the unsteered ones once for all features is no advantage here. Rounds are interleaved, so that a
busy machine slows every side. Writes steering.json, .svg and .png; the last line of stdout is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from running import parser_of, write_results
from speed_figure import Race, draw

LABELS = {
    "paper_loop": "the paper's loop: transformer-lens, float32",
    "saeffect_float32": "saeffect, float32",
    "saeffect_bfloat16": "saeffect, bfloat16 (its default here)",
}
RACE = Race(
    LABELS,
    "features_per_second",
    limit_of=str,
    speed="{:.3g}",
    ratio="{:.0f}",
    ticks="{x:g}",
    axis="features a second, logarithmic; a line: what the products alone would allow",
    logarithmic=True,  # one bar is a hundredth of another
)


def main() -> None:
    """Measure, check, write, draw, print."""
    parser = parser_of(__doc__, "a tiny model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--features", type=int, default=None, help="a round of saeffect; the default is one batch")
    options = parser.parse_args()
    results = measure(options)
    write_results(results, "steering", options, lambda values, stem: draw(values, RACE, values["task"]["model"], stem))
    for threads, row in results["speed"].items():
        print(f"{threads} thread(s)")
        for name, speed in row["features_per_second"].items():
            share = row["share_of_limit"].get(name)
            limit = "" if share is None else f"{share:8.0%} of the limit"
            print(f"  {LABELS[name]:<46}{speed:9.3f} features/s{row['ratio'][name]:8.1f}×{limit}")
    print(json.dumps(results["summary"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, and the summary of the last line."""
    import torch
    from steering_task import Task

    from saeffect.io import versions

    task = Task(quick=options.quick, features=options.features)
    rounds = options.rounds or (1 if options.quick else 3)
    results: dict[str, Any] = {
        "task": task.describe(),
        "versions": versions() | {"transformer-lens": metadata.version("transformer-lens")},
        "equality": task.check(),
        "speed": {},
        "by_batch": {},
    }
    for threads in options.threads:
        torch.set_num_threads(threads)
        results["speed"][str(threads)] = race(task, rounds)
    for name in task.ours:
        results["by_batch"][name] = {str(n): task.steer(name, n)[0] for n in task.batches}
    results["summary"] = summarise(results)
    return results


def race(task: Any, rounds: int) -> dict[str, Any]:
    """Medians over interleaved rounds; ratios are medians of each round's ratio."""
    names = ["paper_loop", *task.ours]
    speed: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in task.ours}
    for number in range(rounds + 1):
        for name in names:
            value = task.paper_loop() if name == "paper_loop" else task.steer(name)[0]
            if number:  # the first round fills caches and is not counted
                speed[name].append(value)
        for name, part_runs in parts.items():
            part_runs.append(task.parts(name))
    median = {name: statistics.median(value) for name, value in speed.items()}
    ratio = {
        name: statistics.median(o / p for p, o in zip(speed["paper_loop"], values, strict=True))
        for name, values in speed.items()
    }
    limits = {name: statistics.median(p["limit_features_per_second"] for p in runs) for name, runs in parts.items()}
    return {
        "features_per_second": median,
        "rounds": speed,
        "ratio": ratio | {"default": ratio[task.default]},
        "limit_features_per_second": limits,
        "share_of_limit": {name: median[name] / limit for name, limit in limits.items()},
        "parts": {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in parts.items()
        },
    }


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The last line. A ratio is the lowest over the numbers of threads."""
    speed = results["speed"].values()
    return {
        "features_vs_paper_loop": round(min(row["ratio"]["saeffect_float32"] for row in speed), 1),
        "features_vs_paper_loop_default": round(min(row["ratio"]["default"] for row in speed), 1),
        "default_dtype": results["task"]["default_dtype"],
        "features_per_second": {
            threads: {name: float(f"{value:.4g}") for name, value in row["features_per_second"].items()}
            for threads, row in results["speed"].items()
        },
        "share_of_limit": {
            name: round(min(row["share_of_limit"][name] for row in speed), 2)
            for name in next(iter(speed))["share_of_limit"]
        },
        "batch": results["task"]["batch"],
        "same_greedy_tokens": results["equality"]["same_greedy_tokens"],
        "log_probability_error": float(f"{results['equality']['float32_log_probability_error']:.2g}"),
        "tokens_in_top_p_set": results["task"]["tokens_in_top_p_set"],
    }


if __name__ == "__main__":
    main()
