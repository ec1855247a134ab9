"""Activations at a hook, batch by batch, cached in memory for the next read of the same text by the same model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from saeffect.lm.activations import TokenRows
from saeffect.lm.architectures import hook_width
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel, fused

__all__ = ["READ_ROWS", "Residuals", "machine_memory"]

READ_ROWS = 8
"""Rows of text that a model reads at once."""
# Share of memory for cached activations (control with placebo, treatment). It changes the time, not the numbers.
_MEMORY_SHARE = 1 / 8
_DEFAULT_MEMORY = 4_000_000_000  # bytes, on systems that do not say how much memory they have
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Memory of this machine, or of its container if that is limited to less, in bytes."""
    try:
        n_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system has sysconf, or these names
        n_bytes = _DEFAULT_MEMORY
    for path in _CONTAINER_LIMITS:
        try:
            n_bytes = min(n_bytes, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such container, or "max"
            continue
    return max(n_bytes, 0)


class Residuals:
    """Captures activations batch by batch and keeps the latest, up to `most_bytes` (default: an eighth of memory)."""

    def __init__(self, most_bytes: int | None = None) -> None:
        self.most_bytes = int(_MEMORY_SHARE * machine_memory()) if most_bytes is None else most_bytes
        self._kept: dict[tuple[str | bytes, ...], Tensor] = {}  # the oldest first
        self._bytes = 0

    def batches(self, lm: LanguageModel, hook: str, rows: TokenRows) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Pieces of the text: first row, ids int64 `[batch, sequence]`, activations `[batch, sequence, d_model]`.

        Activations have the model's dtype and are on the CPU.
        """
        # Of a text that does not fit, the beginning would be evicted before the next read.
        fits = rows.ids.size * hook_width(lm, hook) * lm.dtype.itemsize <= self.most_bytes
        for start in range(0, len(rows), READ_ROWS):
            ids = torch.from_numpy(rows.ids[start : start + READ_ROWS].astype("int64"))
            x = self._kept.get(_key(lm, hook, ids))
            if x is None:
                with fused(lm):
                    x = capture(lm, hook, ids).cpu()
                if fits:
                    self.keep(lm, hook, ids, x)
            yield start, ids, x

    def keep(self, lm: LanguageModel, hook: str, ids: Tensor, x: Tensor) -> None:
        """Cache a batch captured elsewhere, on the CPU in the model's dtype; the oldest ones are evicted."""
        key = _key(lm, hook, ids)
        if not lm.identity or key in self._kept or x.nbytes > self.most_bytes:
            return
        while self._bytes + x.nbytes > self.most_bytes:
            self._bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        self._kept[key] = x
        self._bytes += x.nbytes


def _key(lm: LanguageModel, hook: str, ids: Tensor) -> tuple[str | bytes, ...]:
    return lm.identity, str(lm.dtype), hook, str(list(ids.shape)), ids.numpy().tobytes()
