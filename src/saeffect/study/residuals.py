"""What stands at the hook on the study's text: captured once for all arms and stages that ask for the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from saeffect.lm.activations import TokenRows
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel, fused

__all__ = ["Residuals", "machine_memory"]

_BATCH = 8
# Of the machine's memory, for all captures that are kept: control, which the placebo shares, and treatment. A pass of
# the model gives them again, so what a machine keeps changes its time and no number.
_SHARE = 1 / 8
_WHERE_UNKNOWN = 4_000_000_000  # bytes, on systems that do not say how much memory they have
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Bytes of memory that this machine has, or that its container may use."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system has sysconf, or these names
        found = _WHERE_UNKNOWN
    for path in _CONTAINER_LIMITS:
        try:
            found = min(found, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such container, or "max"
            continue
    return max(found, 0)


class Residuals:
    """Captures activations batch by batch, and keeps the latest captures for as long as they fit into memory.

    Args:
        most_bytes: Of all captures that are kept; by default an eighth of the machine's memory (or of what its
            container may use).
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most_bytes = int(_SHARE * machine_memory()) if most_bytes is None else most_bytes
        self._kept: dict[tuple[str, ...], list[Tensor]] = {}  # the oldest first

    def batches(self, lm: LanguageModel, hook: str, rows: TokenRows) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Pieces of the text in order.

        Yields:
            Index of the first row; token ids, int64 `[batch, sequence]`; activations `[batch, sequence, d_model]` in
            the model's dtype, on the CPU.
        """
        key = (lm.identity, str(lm.dtype), hook, rows.identity())
        known = self._kept.get(key)
        size = rows.ids.size * lm.d_model * lm.dtype.itemsize
        remember = known is None and bool(lm.identity) and size <= self._most_bytes
        captured: list[Tensor] = []
        for index, start in enumerate(range(0, len(rows), _BATCH)):
            ids = torch.from_numpy(rows.ids[start : start + _BATCH].astype("int64"))
            if known is not None:
                yield start, ids, known[index]
                continue
            with fused(lm):
                x = capture(lm, hook, ids).cpu()
            if remember:
                captured.append(x)
            yield start, ids, x
        if remember:  # only what was captured to its end
            self._make_room(size)
            self._kept[key] = captured

    def _make_room(self, size: int) -> None:
        """Forget the oldest captures until there is room for one more."""
        while self._kept and sum(x.nbytes for some in self._kept.values() for x in some) + size > self._most_bytes:
            del self._kept[next(iter(self._kept))]
