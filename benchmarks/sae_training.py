# ruff: noqa: T201
"""Speed, memory and exactness of a training step, beside the peers' own trainers.

    python benchmarks/sae_training.py                    everything: about 50 minutes on two cores
    python benchmarks/sae_training.py --parts speed --cases l1-24576-1024     one case; the others stay as they were
    python benchmarks/sae_training.py --quick            tiny shapes, our side only: seconds

Writes sae_training.json, .svg and .png into the results folder; the last line of stdout is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from contenders import Contender, Worker, available_contenders
from sae_summary import print_tables, summarise, surroundings

D_IN = 768
L0 = 58.0  # of the L1 start; typical for SAEs of this width, between 30 and 100
K = 32
L1_WEIGHT = 1.0
SPEED_LR = 1e-5  # so small that sparsity does not change during the measurement; speed does not depend on it
CURVE_LR = 3e-4  # SAELens' default
# Another optimizer; the arithmetic of the uncompiled one; all in bfloat16, which is no library's default.
NO_CURVE = ("sparsify", "sae_lens_compiled", "sae_lens_autocast")


@dataclass(frozen=True)
class Case:
    """One shape of one architecture."""

    architecture: str
    d_sae: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.d_sae}-{self.batch}"


def cases(quick: bool) -> list[Case]:
    """Shapes to measure; the first of each architecture is the one that takes every contender."""
    shapes = [(128, 64)] if quick else [(24_576, 1_024), (12_288, 1_024), (24_576, 4_096)]
    return [Case(a, d_sae, batch) for d_sae, batch in shapes for a in ("l1", "topk")]


class Setting:
    """Shared by all contenders of a case: files with start weights and batches, and the numbers of the task."""

    def __init__(self, case: Case, options: argparse.Namespace, folder: Path, *, n_batches: int, lr: float) -> None:
        import torch
        from feed import Weights, reconstruction_error
        from safetensors.torch import save_file
        from synthetic import Planted, l1_start, topk_start

        torch.set_num_threads(options.threads)
        d_in, self._folder = (32, folder) if options.quick else (D_IN, folder)
        k = None if case.architecture == "l1" else (8 if options.quick else K)
        planted = Planted(d_in, case.d_sae)
        pool = planted.activations(n_batches * case.batch).view(n_batches, case.batch, d_in)
        start = l1_start(planted, pool[0], 12.0 if options.quick else L0) if k is None else topk_start(planted)
        self.mse, self.l0 = reconstruction_error(Weights(**start), pool[0][:256], k)
        files = {
            "start": folder / f"{case.name}-start.safetensors",
            "activations": folder / f"{case.name}-x.safetensors",
        }
        save_file(start, files["start"])
        save_file({"x": pool}, files["activations"])
        self.task = {name: str(path) for name, path in files.items()} | {
            "batch": case.batch,
            "d_in": d_in,
            "d_sae": case.d_sae,
            "k": k,
            "lr": lr,
            "l1": L1_WEIGHT,
            "threads": options.threads,
        }

    def worker(self, contender: Contender, **changed: Any) -> Worker:
        """Start a contender's process."""
        task = {**self.task, "runner": contender.runner, "options": {**contender.options, **changed}}
        log = self._folder / f"{contender.architecture}-{contender.key}.log"
        return Worker(contender.module, task, log)

    def machine(self) -> Worker:
        """Start the process that measures the machine itself."""
        return Worker("torch", {**self.task, "runner": "machine"}, self._folder / "machine.log")


def measure_speed(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds over all contenders of a case, one running at a time.

    Returns:
        Seconds a step, tokens a second (from the median over all timed steps), peak memory and final sparsity of each
        contender, and the machine's rates in the same rounds.
    """
    setting = Setting(case, options, folder, n_batches=options.warmup + options.steps, lr=SPEED_LR)
    every = case.name in [c.name for c in cases(options.quick)[:2]]
    contenders = available_contenders(case.architecture, every=every, peers=options.peers)
    if options.only:
        contenders = [c for c in contenders if c.key in options.only]
    workers, machine = {c.key: setting.worker(c) for c in contenders}, setting.machine()
    seconds: dict[str, list[float]] = {key: [] for key in workers}
    peaks: dict[str, int] = {}
    rates: list[dict[str, Any]] = []
    try:
        for round_number in range(options.rounds):
            rates.append(machine.ask("run"))
            for key, worker in workers.items():
                # The first steps touch fresh memory, compile, and choose kernels.
                warmup = options.warmup if round_number == 0 else 1
                answer = worker.ask("run", steps=warmup + options.steps)
                seconds[key] += answer["seconds"][warmup:]
                peaks[key] = answer["peak_rss"]
                _log(
                    f"{case.name} round {round_number + 1}: {key} {statistics.median(answer['seconds'][warmup:]):.3f} s"
                )
        states = {key: worker.ask("state") for key, worker in workers.items()}
    finally:
        for worker in (*workers.values(), machine):
            worker.close()
    by_contender: dict[str, Any] = {
        c.key: {
            "label": c.label,
            "ours": c.ours,
            "product_dtype": c.options.get("encoder_dtype", "float32"),
            "tokens_per_second": case.batch / statistics.median(seconds[c.key]),
            "seconds": seconds[c.key],
            "peak_rss": peaks[c.key],
            "peak_rss_before_training": workers[c.key].peak_at_start,
            "l0_after": states[c.key]["l0"],
        }
        for c in contenders
    }
    return {
        "contenders": by_contender,
        "peers": {name: version for w in workers.values() for name, version in w.peers.items()},
        "machine": {name: statistics.median(r[name] for r in rates) for name in rates[0]},
        "l0_start": setting.l0,
        "batch": case.batch,
        "d_in": setting.task["d_in"],
        "d_sae": case.d_sae,
    }


def measure_curves(architecture: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The loss of each contender over the same steps: same start, batches, learning rate, optimizer.

    Every peer's loss is defined in its own way, so the curves show one quantity for all, computed by the same code
    from the weights: squared error summed over dimensions, mean over the tokens of the batch that comes next.
    """
    d_sae, batch = (128, 64) if options.quick else (options.curve_d_sae, options.curve_batch)
    steps = 20 if options.quick else options.curve_steps
    case = Case(architecture, d_sae, batch)
    setting = Setting(case, options, folder, n_batches=steps, lr=CURVE_LR)
    curves: dict[str, Any] = {}
    for contender in available_contenders(architecture, every=True, peers=options.peers):
        if contender.key in NO_CURVE or (options.only and contender.key not in options.only):
            continue
        worker = setting.worker(contender)
        try:
            answer = worker.ask("curve", steps=steps, every=max(1, steps // 60))
        finally:
            worker.close()
        curves[contender.key] = {"label": contender.label, "ours": contender.ours, "losses": answer["losses"]}
        _log(f"curve {architecture}: {contender.key} {answer['losses'][0][1]:.2f} to {answer['losses'][-1][1]:.4f}")
    return {"d_sae": d_sae, "batch": batch, "steps": steps, "lr": CURVE_LR, "contenders": curves}


def measure_exactness(architecture: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Gradients against dense autograd, and the active features with and without a bfloat16 encoder."""
    case = next(c for c in cases(options.quick) if c.architecture == architecture)
    setting = Setting(case, options, folder, n_batches=1, lr=SPEED_LR)
    ours = next(c for c in available_contenders(architecture, every=True, peers=False) if c.ours)
    worker = Worker(ours.module, {**setting.task, "runner": "exactness", "options": {}}, folder / "exactness.log")
    try:
        return worker.ask("exactness")
    finally:
        worker.close()


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen parts, merge them into the results, and print them."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "sae_training.json"
    results: dict[str, Any] = {"speed": {}, "curves": {}, "exactness": {}}
    if file.is_file() and not options.fresh:
        results |= json.loads(file.read_text(encoding="utf-8"))
    results["surroundings"] = surroundings(options.threads)

    with tempfile.TemporaryDirectory(prefix="sae-training-") as temporary:
        folder = Path(temporary)
        for case in cases(options.quick):
            if "speed" in options.parts and (not options.cases or case.name in options.cases):
                _merge(results["speed"], case.name, measure_speed(case, options, folder))
                _save(results, file)
        for architecture in ("l1", "topk"):
            included = not options.cases or any(name.startswith(architecture) for name in options.cases)
            if "curves" in options.parts and included:
                _merge(results["curves"], architecture, measure_curves(architecture, options, folder))
                _save(results, file)
            if "exactness" in options.parts and included:
                results["exactness"][architecture] = measure_exactness(architecture, options, folder)

    results["summary"] = summarise(results)
    _save(results, file)
    print_tables(results)
    if not options.no_figure:
        from sae_figure import draw

        draw(results, options.out / "sae_training")
    print(json.dumps(results["summary"]))
    return 0


def _merge(into: dict[str, Any], name: str, measured: dict[str, Any]) -> None:
    """Replace the measured contenders of a case; the others keep their results."""
    earlier = into.get(name, {}).get("contenders", {})
    into[name] = measured | {"contenders": earlier | measured["contenders"]}


def _save(results: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(results) + "\n", encoding="utf-8")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round, without peers unless --peers")
    parser.add_argument("--parts", nargs="+", choices=("speed", "curves", "exactness"), help="default: all")
    parser.add_argument("--cases", nargs="+", help="such as l1-24576-1024; default: all")
    parser.add_argument("--only", nargs="+", help="keys of contenders; ratios then mix runs, so for trying out only")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, help="measure other people's trainers too")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (3)")
    parser.add_argument("--steps", type=int, help="timed steps a round (4)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before the first round; 1 before others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--curve-steps", type=int, default=300)
    parser.add_argument("--curve-d-sae", type=int, default=12_288, help="24,576 takes four times as long")
    parser.add_argument("--curve-batch", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results instead of adding to them")
    parser.add_argument("--no-figure", action="store_true")
    options = parser.parse_args(arguments)
    options.parts = options.parts or ["speed", "curves", "exactness"]
    options.peers = not options.quick if options.peers is None else options.peers
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.steps = options.steps or (2 if options.quick else 4)
    valid = [c.name for c in cases(options.quick)]
    if unknown := set(options.cases or ()) - set(valid):
        parser.error(f"no case {', '.join(sorted(unknown))}; valid: {', '.join(valid)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
