"""Proof on planted truth: simulated tables with known effects, and fine-tunes that were taught a known concept.

    python benchmarks/planted/run.py --work <folder>

Everything is kept in the folder, so an interrupted run resumes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from concepts import CONCEPTS
from fine_tunes import NULLS, Planted, train
from null_studies import NULL_STUDIES, null_rates
from plan import SAE, Plan
from probe import Instrument, compare
from scoring import named_features
from simulations import SETTINGS, simulate
from verdicts import judge
from write_up import headline, write_results

from saeffect.io import fingerprint, hash_file, hash_folder, read_json, write_json
from saeffect.lm.loading import bundled_path
from saeffect.progress import Log

_HERE = Path(__file__).parent
_MODELS = (_HERE / "concepts.py", _HERE / "fine_tunes.py")
_INPUTS = {"models": _MODELS, "compared": (*_MODELS, _HERE / "probe.py", bundled_path("saes", SAE))}
_STARTED = time.monotonic()


def report(line: str) -> None:
    print(f"[{time.monotonic() - _STARTED:6.0f} s] {line}", flush=True)  # noqa: T201


def main() -> None:
    """Simulate, fine-tune, compare, judge, write."""
    options = _options()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes that simulate
    torch.set_num_threads(options.threads)
    plan = Plan().quick() if options.quick else Plan()
    simulated = simulations(options.work / "simulations", options.studies, options.threads)
    nothing = null_studies(options.work / "simulations", options.null_studies, options.threads)
    models = planted_models(plan, options.work)
    write_results(simulated, nothing, models, plan, options.out)
    print(json.dumps(headline(simulated, nothing, models)))  # noqa: T201


def simulations(folder: Path, n: int, processes: int) -> list[dict[str, Any]]:
    """Rates of every setting, in their order."""
    code = hash_file(_HERE / "simulations.py")
    paths = [folder / f"{fingerprint([setting.name, n, code])[:16]}.json" for setting in SETTINGS]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_simulated, number, n): number for number in missing}
        for future in as_completed(pending):
            rates = future.result()
            write_json(paths[pending[future]], rates)
            line = f"alarms {rates['alarms']:.3f}, coverage {rates['coverage']:.3f}"
            report(f"{rates['setting']}: {line} ({rates['seconds']:.0f} s)")
    return [read_json(path) for path in paths]


def _simulated(number: int, n: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    started = time.monotonic()
    return {**simulate(SETTINGS[number], n, number), "seconds": time.monotonic() - started}


def null_studies(folder: Path, n: int, processes: int) -> list[dict[str, Any]]:
    """Rates of every design of studies of nothing, in their order."""
    code = hash_file(_HERE / "null_studies.py")
    paths = [folder / f"{fingerprint([number, n, code])[:16]}.json" for number in range(len(NULL_STUDIES))]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(null_rates, NULL_STUDIES[number], n, number): number for number in missing}
        for future in as_completed(pending):
            rates = future.result()
            write_json(paths[pending[future]], rates)
            report(f"studies of nothing, {rates['design']}: {rates['any']:.3f} credit fine-tuning with something")
    return [read_json(path) for path in paths]


def planted_models(plan: Plan, work: Path) -> dict[str, Any]:
    """Fine-tunes, comparisons and verdicts."""
    # Folders are named by the hash of their inputs: with other SAEs the adapters stay, the comparisons are made again.
    trained, compared = (work / f"{kind}-{_key(plan, *inputs)}" for kind, inputs in _INPUTS.items())
    instrument = Instrument(plan, trained, compared, Log(report))
    candidates = named_features(instrument.top_tokens, CONCEPTS, plan.min_matches)
    clear = named_features(instrument.top_tokens, CONCEPTS, plan.clear_matches)
    counts = {name: int(members.sum()) for name, members in clear.items()}
    admitted = plan.admitted(counts)
    report(f"features clearly about each candidate: {counts}; planted: {', '.join(admitted)}")
    changes = {}
    for name in (*admitted, *NULLS):
        started = time.monotonic()
        planted = Planted(name, trained / name)
        train(planted, plan, lambda: instrument.base, Log(report))
        between = time.monotonic()
        changes[name] = compare(planted, instrument)
        report(f"{name}: fine-tuned in {between - started:.0f} s, compared in {time.monotonic() - between:.0f} s")
    named = {name: candidates[name] for name in admitted}
    perplexity = {name: read_json(trained / name / "adapter" / "training.json")["perplexity"] for name in changes}
    return {"candidates": counts, "perplexity": perplexity, **judge(changes, named, instrument.top_tokens, plan)}


def _key(plan: Plan, *inputs: Path) -> str:
    return fingerprint([plan.record, [hash_folder(path) for path in inputs]])[:12]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for adapters and tables (about 100 MB)")
    parser.add_argument("--out", type=Path, default=_HERE, help="where results.json, results.md and figure go")
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies a setting")
    parser.add_argument("--null-studies", type=int, default=500, help="whole studies of nothing a design")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="run every line on almost nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
