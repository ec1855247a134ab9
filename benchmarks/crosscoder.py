# ruff: noqa: T201
"""How fast a crosscoder trains beside dictionary-learning's own trainer, and which planted changes it finds.

    python benchmarks/crosscoder.py                     both: about 15 minutes on two cores
    python benchmarks/crosscoder.py --parts speed       needs .venv-dictionary and .peer-crosscoder (setup_peers.sh)
    python benchmarks/crosscoder.py --parts planted
    python benchmarks/crosscoder.py --quick             tiny shapes, our side only

Writes crosscoder.json and crosscoder.md into the results folder; the last line of stdout is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from contenders import ROOT, Worker, python_of
from running import parser_of, write_results

CHECKOUT = ROOT / ".peer-crosscoder"
SEEDS, NULLS = 3, 5
FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0)
RATE = 0.05
MIN_COSINE = 0.8  # cosine from which a feature counts as the planted one


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Steps a second of both, alternating in one run, on the same batches from the same weights."""
    import torch
    from safetensors.torch import save_file
    from synthetic import Planted, topk_start

    d_model, d_sae, batch, k = (16, 64, 32, 4) if options.quick else (768, 12_288, 1024, 32)
    rounds, steps = options.rounds or (1 if options.quick else 6), 2 if options.quick else 3
    planted = Planted(2 * d_model, d_sae)  # both models' activations of a token side by side
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        pool = planted.activations(8 * batch).view(8, batch, 2 * d_model)
        save_file({"x": pool}, folder / "x.safetensors")
        save_file(topk_start(planted), folder / "start.safetensors")
        task = {"start": str(folder / "start.safetensors"), "activations": str(folder / "x.safetensors")}
        task |= {"batch": batch, "k": k, "lr": 1e-5, "l1": 0.0, "threads": options.threads}
        tasks = {
            "saeffect": ("saeffect", task | {"runner": "saeffect", "options": {"architecture": "crosscoder"}}),
            "dictionary_learning": (
                "dictionary_learning",
                task | {"runner": "crosscoder", "options": {"checkout": str(CHECKOUT)}},
            ),
        }
        if options.quick or not CHECKOUT.exists() or python_of("dictionary_learning") is None:
            del tasks["dictionary_learning"]
        workers = {name: Worker(module, task, folder / f"{name}.log") for name, (module, task) in tasks.items()}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        try:
            for worker in workers.values():
                worker.ask("run", steps=1)  # maps memory, starts threads
            for _ in range(rounds):
                for contender, worker in workers.items():
                    seconds[contender].append(statistics.median(worker.ask("run", steps=steps)["seconds"]))
        finally:
            for worker in workers.values():
                worker.close()
    results: dict[str, Any] = {
        "d_model": d_model,
        "d_sae": d_sae,
        "batch": batch,
        "k": k,
        "threads": options.threads,
        "torch": torch.__version__,
        "steps_per_second": {name: 1 / statistics.median(times) for name, times in seconds.items()},
    }
    if "dictionary_learning" in seconds:
        ratios = [b / a for a, b in zip(seconds["saeffect"], seconds["dictionary_learning"], strict=True)]
        results["ratios"], results["times_as_fast"] = ratios, statistics.median(ratios)
    return results


class Concepts:
    """Activations of two models as sums of known concepts, each scaled by its factor in the tuned model."""

    def __init__(self, factors: Any, *, seed: int, d_model: int = 64) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(len(factors), d_model, generator=torch.Generator().manual_seed(0))
        self.rows = rows / rows.norm(dim=1, keepdim=True)
        self.factors = torch.as_tensor(factors, dtype=torch.float32)

    def draw(self, n_rows: int, n_tokens: int) -> tuple[Any, Any]:
        """Both models' activations, `[n_rows, n_tokens, d_model]`."""
        import torch

        shape = (n_rows, n_tokens, len(self.rows))
        on = torch.rand(shape, generator=self._generator) < 6 / len(self.rows)
        f = on * torch.randn(shape, generator=self._generator).mul_(0.3).exp_() * 4
        noise = [0.1 * torch.randn(*shape[:2], self.rows.shape[1], generator=self._generator) for _ in range(2)]
        return f @ self.rows + noise[0], (f * self.factors) @ self.rows + noise[1]


def train_crosscoder(concepts: Concepts, *, d_sae: int, steps: int) -> Any:
    """A BatchTopK crosscoder of these two models, as it would be saved."""
    import torch

    from saeffect.sae.training.config import SaeTrainingConfig
    from saeffect.sae.training.step import TrainingStep, new_sae

    config = SaeTrainingConfig(architecture="crosscoder", d_sae=d_sae, k=6, dead_after=20_000, learning_rate=3e-3)
    sae = new_sae(config, 2 * concepts.rows.shape[1])
    step: Any = None
    for number in range(steps):
        x = torch.cat(concepts.draw(1, 512), dim=2)[0]
        if step is None:
            sae.initialise(x, config)
            step = TrainingStep(sae, config, steps)
        step(number, x)
    return sae.for_inference()


def measure_scaling(concepts: Concepts, sae: Any) -> Any:
    """The table of latent scaling on new text."""
    from saeffect.diffing.latent_scaling import LatentScaling

    scaling = LatentScaling(sae)
    for _ in range(20):
        scaling.add(*concepts.draw(10, 64))
    return scaling.result()


def planted(options: argparse.Namespace) -> dict[str, Any]:
    """Recall of concepts that the fine-tune scaled, at 5 % false alarms, with cuts from null fine-tunes."""
    n, d_sae, steps = (40, 64, 150) if options.quick else (200, 320, 1000)
    seeds, nulls = (1, 2) if options.quick else (SEEDS, NULLS)
    null_tables = []
    for number in range(nulls):
        # A fine-tune that teaches nothing new moves every concept a little.
        drift = np.exp(np.random.default_rng(100 + number).normal(0, 0.03, n))
        concepts = Concepts(drift, seed=100 + number)
        null_tables.append(measure_scaling(concepts, train_crosscoder(concepts, d_sae=d_sae, steps=steps)))
    studies = [_study(seed, n, d_sae, steps, null_tables) for seed in range(seeds)]
    summary = {}
    distances = [abs(row["estimate"] - 1) for study in studies for row in study if row["factor"] == 1 and row["found"]]
    cut = float(np.quantile(distances, 1 - RATE))  # from unchanged concepts, which only the benchmark knows
    for factor in FACTORS:
        rows = [row for study in studies for row in study if row["factor"] == factor]
        estimates = [row["estimate"] for row in rows if row["found"]]
        summary[f"{factor:g}"] = {
            "planted": len(rows),
            "has_a_feature": float(np.mean([row["found"] for row in rows])),
            "called_changed": float(np.mean([row["changed"] for row in rows])),
            "beyond_cut": float(np.mean([row["found"] and abs(row["estimate"] - 1) > cut for row in rows])),
            "estimate": float(np.median(estimates)),
            "estimate_low": float(np.quantile(estimates, 0.1)),
            "estimate_high": float(np.quantile(estimates, 0.9)),
            "called_exclusive": float(np.mean([row["exclusive"] for row in rows])),
            "exclusive_by_decoder_norm": float(np.mean([row["by_norm"] for row in rows])),
        }
    return {"factors": summary, "cut": cut, "seeds": seeds, "nulls": nulls, "concepts": n, "d_sae": d_sae, "rate": RATE}


def _study(seed: int, n: int, d_sae: int, steps: int, nulls: Any) -> list[dict[str, Any]]:
    import torch

    from saeffect.diffing.latent_scaling import against_nulls, directions

    generator = np.random.default_rng(seed)
    factors = np.ones(n)
    changed = generator.permutation(n)[: n * 2 // 5].reshape(4, -1)
    for factor, members in zip((0.0, 0.25, 0.5, 2.0), changed, strict=True):
        factors[members] = factor
    drift = np.exp(generator.normal(0, 0.03, n))
    concepts = Concepts(factors * drift, seed=seed)
    sae = train_crosscoder(concepts, d_sae=d_sae, steps=steps)
    table = against_nulls(measure_scaling(concepts, sae), nulls, rate=RATE)
    rows = directions(sae)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-8)
    alive = torch.from_numpy((table["n_rows"] > 1).to_numpy())
    cosine, best = (concepts.rows @ rows.T).masked_fill(~alive, -1.0).max(dim=1)
    results = []
    for concept, factor in enumerate(factors):
        row = table.loc[int(best[concept])]
        has_feature = bool(cosine[concept] > MIN_COSINE)
        expected = ("base", "shared", "tuned")[1 + int(np.sign(factor - 1))]
        kind = str(row["kind"])
        results.append(
            {
                "factor": float(factor),
                "found": has_feature,
                "estimate": row["presence_tuned"] / row["presence_base"] / drift[concept],
                # Of a concept that did not change, any change is a false alarm.
                "changed": has_feature and (kind != "shared" if factor == 1 else expected in kind),
                "exclusive": has_feature and kind in ("base only", "tuned only"),
                "by_norm": has_feature and not 0.1 < row["norm_share"] < 0.9,
            }
        )
    return results


def tables(results: dict[str, Any], path: Path) -> None:
    """The tables as Markdown."""
    lines = []
    if "planted" in results:
        lines += [
            "| scaled by | concepts | with a feature | at 5 % false alarms | called changed | of one model only |"
            " estimate (80 %) |",
            "|---|---|---|---|---|---|---|",
        ]
        for factor, row in results["planted"]["factors"].items():
            lines.append(
                f"| {factor} | {row['planted']} | {row['has_a_feature']:.0%} | {row['beyond_cut']:.1%} |"
                f" {row['called_changed']:.1%} |"
                f" {row['called_exclusive']:.0%} |"
                f" {row['estimate']:.2f} [{row['estimate_low']:.2f}, {row['estimate_high']:.2f}] |"
            )
    if "speed" in results and "times_as_fast" in results["speed"]:
        speeds = results["speed"]
        lines += ["", "| trainer | steps a second |", "|---|---|"]
        lines += [f"| {name} | {rate:.3f} |" for name, rate in speeds["steps_per_second"].items()]
        lines += ["", f"{speeds['times_as_fast']:.1f} times as fast (median over rounds)."]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the chosen parts; results of the others are kept."""
    parser = parser_of(__doc__, "tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=("speed", "planted"), default=("planted", "speed"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results_file = (options.out or Path(__file__).parent / "results") / "crosscoder.json"
    results = {} if options.quick or not results_file.is_file() else json.loads(results_file.read_text("utf-8"))
    import torch

    torch.set_num_threads(options.threads)
    for part in options.parts:
        results[part] = (planted if part == "planted" else speed)(options)
        print(json.dumps(results[part], indent=1))
    write_results(results, "crosscoder", options, tables)
    summary: dict[str, float] = {}
    if "times_as_fast" in results.get("speed", {}):
        summary["crosscoder_vs_dictionary_learning"] = round(results["speed"]["times_as_fast"], 2)
    if "planted" in results:
        for factor, row in results["planted"]["factors"].items():
            summary[f"called_changed_{factor}"] = round(row["called_changed"], 3)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
