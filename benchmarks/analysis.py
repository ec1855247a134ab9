# ruff: noqa: T201
"""Time to find every feature's top tokens and to score its coherence, beside the bare matrix product.

    python benchmarks/analysis.py                about 3 minutes on two cores
    python benchmarks/analysis.py --quick        small matrices, one round: seconds

`W_dec` (24,576 × 768) times `W_U` (768 × 50,257) with the ten best tokens on both scales and four moments, beside the
bare float32 product in chunks of 512 into allocated memory. Each side runs in its own process, whose peak memory
is read at its end; sides alternate, so that a busy machine slows all. Then the coherence of all those
features with the bundled GloVe. Writes analysis.json, .svg and .png; the last line of stdout is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from analysis_figure import draw
from measure import peak_rss
from running import parser_of, write_results

LABELS = {
    "bare": "the product alone, float32",
    "float32": "saeffect, float32",
    "bfloat16": "saeffect, bfloat16 (exact float32 top tokens)",
}
SIZES = {"full": (24_576, 768, 50_257), "quick": (512, 64, 3_001)}
CHUNK = 512
TOP_K = 10


def main() -> None:
    """Measure, check, write, draw, print."""
    parser = parser_of(__doc__, "small matrices")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        print(json.dumps(run_side(options.worker[0], Path(options.worker[1]))))
        return
    results = measure(options)
    write_results(results, "analysis", options, lambda rows, stem: draw(rows, LABELS, stem))
    for side, row in results["projection"].items():
        print(f"{LABELS[side]:<50}{row['seconds']:8.2f} s{row['ratio']:7.2f}×{row['peak_gb']:7.2f} GB")
    print(f"{'coherence':<50}{results['coherence']['seconds']:8.3f} s")
    print(json.dumps(results["summary"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, and the summary of the last line."""
    # Imported here, or the memory of these imports would count for the sides.
    from analysis_checks import check_moments, check_top_tokens, coherence_times

    from saeffect.features.projection import PRODUCT_DTYPES
    from saeffect.io import versions
    from saeffect.lm.loading import resolve_dtype

    d_sae, d_in, d_vocab = SIZES["quick" if options.quick else "full"]
    default = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    sides = ("bare", *(name for name in PRODUCT_DTYPES if name in {"float32", default}))
    rounds = options.rounds or (1 if options.quick else 3)
    W_dec, W_U = weights(d_sae, d_in, d_vocab)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, matrix in (("W_dec.npy", W_dec), ("W_U.npy", W_U)):
            np.save(folder / file, matrix.numpy())
        for _ in range(rounds):
            for side in sides:
                runs[side].append(_run_in_process(side, folder, options.threads))
        ours = [side for side in sides if side != "bare"]
        tokens_by_side = {side: torch.load(folder / f"{side}.pt", weights_only=True) for side in ours}
    bare = statistics.median(run["seconds"] for run in runs["bare"])
    results = {
        "task": {"d_sae": d_sae, "d_in": d_in, "d_vocab": d_vocab, "top_k": TOP_K, "chunk": CHUNK},
        "threads": options.threads,
        "default_dtype": default,
        "versions": versions(),
        "projection": {
            side: {
                "seconds": statistics.median(run["seconds"] for run in runs_of_side),
                "all_seconds": [run["seconds"] for run in runs_of_side],
                "ratio": statistics.median(run["seconds"] for run in runs_of_side) / bare,
                "peak_gb": max(run["peak"] for run in runs_of_side) / 1e9,
            }
            for side, runs_of_side in runs.items()
        },
        "top_tokens": check_top_tokens(W_dec, W_U, tokens_by_side),
        "moments": check_moments(W_dec, W_U, tokens_by_side),
        "coherence": coherence_times(tokens_by_side["float32"], d_vocab),
    }
    results["summary"] = summarise(results)
    return results


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The last line. `projection_vs_matmul` is of the dtype that "auto" takes here; peak memory is the higher one."""
    ours = {side: row for side, row in results["projection"].items() if side != "bare"}
    moments = results["moments"]
    return {
        "coherence_24576_s": round(results["coherence"]["seconds"], 3),
        "projection_vs_matmul": round(ours[results["default_dtype"]]["ratio"], 3),
        "projection_peak_gb": round(max(row["peak_gb"] for row in ours.values()), 3),
        "default_dtype": results["default_dtype"],
        "projection_vs_matmul_by_dtype": {side: round(row["ratio"], 3) for side, row in ours.items()},
        "projection_s": {side: round(row["seconds"], 2) for side, row in results["projection"].items()},
        "exact_rows": results["top_tokens"]["exact_rows"],
        "checked_rows": results["top_tokens"]["checked_rows"],
        "dtypes_agree": results["top_tokens"]["dtypes_agree"],
        "kurtosis_error": {side: float(f"{row['kurtosis']:.2g}") for side, row in moments.items()},
    }


def weights(d_sae: int, d_in: int, d_vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W_dec and W_U as trained models have them, from a seed.

    Tokens belong to topics, share an uneven spectrum and have lengths of log-normal spread; the unembedding is centred,
    as `saeffect.lm.unembedding` gives it. Half of the features point at a topic, with noise, the rest anywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    n_topics = max(2, d_vocab // 50)
    spectrum = torch.linspace(1.5, 0.3, d_in)
    topics = torch.randn(n_topics, d_in, generator=generator)
    topic = torch.randint(n_topics, (d_vocab,), generator=generator)
    W_U = torch.randn(d_vocab, d_in, generator=generator).add_(topics[topic]).mul_(spectrum)
    W_U *= torch.randn(d_vocab, 1, generator=generator).mul_(0.25).exp_()
    W_U -= W_U.mean(dim=0)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec[::2] += 2 * topics[torch.randint(n_topics, (len(W_dec[::2]),), generator=generator)]
    W_dec *= spectrum
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec, W_U.T.contiguous()


def _run_in_process(side: str, folder: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--threads", str(threads), "--worker", side, str(folder)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def run_side(side: str, folder: Path) -> dict[str, Any]:
    """One run of one side; writes its tensors to the folder. Returns seconds and the peak bytes of this process."""
    # numpy reads a matrix into its own memory and nothing else, so that the peak is not that of loading.
    W_dec, W_U = (torch.from_numpy(np.load(folder / file)) for file in ("W_dec.npy", "W_U.npy"))
    if side == "bare":
        seconds = _time_bare_product(W_dec, W_U)
        return {"seconds": seconds, "peak": peak_rss()}
    from saeffect.features.projection import project_both

    project_both(W_dec[:8], W_U[:, :64].clone(), TOP_K, dtype=side)  # warms up threads and kernels
    started = time.perf_counter()
    pair = project_both(W_dec, W_U, TOP_K, chunk=CHUNK, dtype=side)
    seconds = time.perf_counter() - started
    peak = peak_rss()
    tensors = {f"{name}_{field}": getattr(pair[name], field) for name in ("dot", "cosine") for field in _FIELDS}
    torch.save(tensors, folder / f"{side}.pt")
    return {"seconds": seconds, "peak": peak}


_FIELDS = ("indices", "weights", "mean", "std", "skewness", "kurtosis")


def _time_bare_product(W_dec: Tensor, W_U: Tensor) -> float:
    """Seconds of the product alone; nothing is done with it."""
    out = torch.zeros(min(CHUNK, len(W_dec)), W_U.shape[1])
    torch.mm(W_dec[:8], W_U, out=out[:8])
    started = time.perf_counter()
    for start in range(0, len(W_dec), CHUNK):
        chunk = W_dec[start : start + CHUNK]
        torch.mm(chunk, W_U, out=out[: len(chunk)])
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
