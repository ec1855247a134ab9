# ruff: noqa: T201
"""Matching two SAEs of 24,576 features: minutes, and under 4 GB.

    python benchmarks/matching.py            # about a minute on two cores; --d-sae 4096 for a quick look

Two decoders that share three features of four, and their activations on 100,000 tokens with 32 active a token, are
matched by both measures, paired one to one, and judged beside one more seed. The last line is JSON:
`decoder_match_s`, `activity_match_s`, `assign_s`, `fates_s` (decoders, one placebo), `peak_gb`, `recovered` (share of
the shared features whose nearest neighbour is their true partner).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import peak_rss

from saeffect.diffing.coactivity import FiringLog, match_activity
from saeffect.diffing.fates import fates
from saeffect.diffing.matching import assign, match_decoders


def decoders(d_sae: int, d_in: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder, and another of the same model: the first three quarters shared but for noise, the rest new."""
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    generator.manual_seed(seed)
    noise = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    new = torch.arange(d_sae) >= 3 * d_sae // 4
    return a, torch.where(new[:, None], noise, torch.nn.functional.normalize(a + 0.5 * noise, dim=1))


def logs(d_sae: int, n_tokens: int, active: int, seed: int) -> tuple[FiringLog, FiringLog]:
    """Activations of both, features of Zipfian frequency, three of four shared."""
    rng = np.random.default_rng(seed)
    frequency = 1.0 / np.arange(10, d_sae + 10)
    edges = np.cumsum(frequency / frequency.sum())
    both_logs = FiringLog(d_sae), FiringLog(d_sae)
    for start in range(0, n_tokens, 1024):
        n = min(1024, n_tokens - start)
        drawn = np.minimum(np.searchsorted(edges, rng.random((n, active))), d_sae - 1)
        features_a = torch.from_numpy(_without_repeats(drawn))
        values = torch.rand(n, active) + 0.1
        values[features_a < 0] = 0.0
        features_b = torch.where(features_a < 3 * d_sae // 4, features_a, d_sae - 1 - (features_a - 3 * d_sae // 4))
        values_b = values * (1 + 0.2 * torch.rand(n, active))
        for log, feature, value in zip(both_logs, (features_a, features_b), (values, values_b), strict=True):
            log.update(torch.zeros(n, d_sae).scatter_add(1, feature.clamp(min=0), value))
    return both_logs


def _without_repeats(drawn: np.ndarray) -> np.ndarray:
    ordered = np.sort(drawn, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    return ordered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=100_000)
    options = parser.parse_args()
    a, b = decoders(options.d_sae, options.d_in, 1)
    _, c = decoders(options.d_sae, options.d_in, 2)
    seconds: dict[str, float] = {}

    def timed(name: str, work):
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 2)
        print(f"{name}: {seconds[name]} s, peak {peak_rss() / 1e9:.2f} GB", flush=True)
        return result

    matching = timed("decoder_match_s", lambda: match_decoders(a, b))
    placebo = match_decoders(a, c)
    timed("assign_s", lambda: assign(matching))
    table = pd.DataFrame({"density": np.random.default_rng(0).random(options.d_sae), "decoder_norm": 1.0})
    timed(
        "fates_s",
        lambda: fates(matching, [placebo], control_features=table, treatment_features=table, placebo_features=[table]),
    )
    pair = logs(options.d_sae, options.tokens, 32, 0)
    timed("activity_match_s", lambda: match_activity(*pair))
    shared = np.arange(3 * options.d_sae // 4)
    recovered = float((matching.forward.match[shared] == shared).mean())
    print(json.dumps({**seconds, "peak_gb": round(peak_rss() / 1e9, 2), "recovered": recovered}))


if __name__ == "__main__":
    main()
