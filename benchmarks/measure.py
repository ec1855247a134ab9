"""Peak memory of a process, and the machine's limits: products and copies a second."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = [
    "adam_bytes",
    "copy_rate",
    "encoder_flop",
    "limit_tokens_per_second",
    "median_seconds",
    "parameters",
    "peak_rss",
    "product_rate",
]


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes.

    Read from VmHWM where there is one: ru_maxrss of a child starts at what its parent held when it was started.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that is not timed."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def product_rate(n: int, d_in: int, d_sae: int, dtype: torch.dtype, repeats: int = 4) -> float:
    """FLOP a second of the encoder's product `[n, d_in] @ [d_in, d_sae]` into allocated memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d_in, generator=generator).to(dtype)
    w = torch.randn(d_in, d_sae, generator=generator).to(dtype)
    out = torch.empty(n, d_sae, dtype=dtype)
    return encoder_flop(n, d_in, d_sae) / median_seconds(lambda: torch.mm(x, w, out=out), repeats)


def copy_rate(n_bytes: int, repeats: int = 4) -> float:
    """Bytes a second of a copy into allocated memory; bytes read and written both count."""
    source = torch.zeros(n_bytes // 4)
    target = torch.ones(n_bytes // 4)
    return 2 * n_bytes / median_seconds(lambda: target.copy_(source), repeats)


def parameters(d_in: int, d_sae: int) -> int:
    """Number of an SAE's parameters."""
    return 2 * d_in * d_sae + d_sae + d_in


def encoder_flop(n: int, d_in: int, d_sae: int) -> float:
    """FLOP of one dense encoder product."""
    return 2.0 * n * d_in * d_sae


def adam_bytes(d_in: int, d_sae: int) -> float:
    """Bytes that Adam must move in float32: parameter, gradient and two moments in, all but the gradient out."""
    return 7.0 * 4 * parameters(d_in, d_sae)


def limit_tokens_per_second(n: int, d_in: int, d_sae: int, flop_rate: float, byte_rate: float) -> float:
    """Speed of a step with one dense encoder product and Adam only, at the machine's rates.

    Example:
        >>> limit = limit_tokens_per_second(1024, 768, 24576, 140e9, 29e9)
        >>> 3200 < limit < 3300
        True
    """
    return n / (encoder_flop(n, d_in, d_sae) / flop_rate + adam_bytes(d_in, d_sae) / byte_rate)
