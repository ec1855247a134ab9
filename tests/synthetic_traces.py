"""Traces of fine-tunes without a model: Gaussian log ratios, the same spread in nulls and fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saeffect.diffing.trace import Trace

D_SAE, D_VOCAB, N_ROWS, CONTEXT = 60, 80, 6, 8
TOP_TOKENS = (np.arange(D_SAE)[:, None] + np.arange(3) - 5) % D_VOCAB  # of features 10 to 19: tokens 5 to 16


def trace(
    seed: int,
    *,
    name: str = "",
    made_by: str = "same",
    moved: Mapping[str, tuple[Sequence[int], float]] | None = None,
    spread: float = 0.2,
    kl: float = 0.1,
    numbers: Mapping[str, float] | None = None,
) -> Trace:
    """A fine-tune whose log ratios scatter by `spread`, plus `moved`: by basis, members and the log ratio added."""
    rng = np.random.default_rng([seed, 11])
    common = 0.3 * spread * rng.normal()  # what moves all features of one fine-tune together
    arrays: dict[str, Any] = {}
    for basis, n, rows in (("read", D_SAE, 4), ("written", D_SAE, 4), ("expected", D_VOCAB, 2)):
        base = np.linspace(0.1, 2, n) if basis != "expected" else np.full(n, 1 / n)
        ratio = common + spread * rng.normal(size=n)
        members, by = (moved or {}).get(basis, ((), 0.0))
        ratio[list(members)] += by
        values = np.stack([base, base * np.exp(ratio)])
        arrays[basis] = np.concatenate([values, values])[:rows].astype(np.float32)
    kls = np.full((N_ROWS, CONTEXT), kl, dtype=np.float32)
    kls[:, 0] = np.nan
    return Trace(
        name or f"null-{seed}",
        made_by,
        positions=np.zeros((CONTEXT, 4), np.float32),
        halves=np.zeros((2, 4), np.float32),
        early=np.zeros((2, 2, 4), np.float32),
        openings=np.zeros(2, np.float32),
        kl=kls,
        layers=np.zeros(3, np.float32),
        texts=np.zeros((100, 30), np.int32),
        base_texts=np.zeros((2, 3), np.int32),
        numbers={"n_tokens": 3000.0, "loss_base": 2.0, "loss_tuned": 2.0, **(numbers or {})},
        **arrays,
    )


def nulls(n: int, *, first: int = 1, **how: Any) -> list[Trace]:
    return [trace(first + k, **how) for k in range(n)]
