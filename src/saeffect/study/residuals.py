"""What stands at the hook on the study's text: captured once for all arms and stages that ask for the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saeffect.activations.harvest import TokenRows
from saeffect.models.fused import fused
from saeffect.models.hooks import capture
from saeffect.models.language_model import LanguageModel

__all__ = ["Residuals"]

_BATCH = 8
_MOST_BYTES = 400_000_000  # of all captures that are kept: control, which the placebo shares, and treatment


class Residuals:
    """Captures activations batch by batch, and keeps the latest captures for as long as they fit into memory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], list[Tensor]] = {}  # the oldest first

    def batches(self, lm: LanguageModel, hook: str, rows: TokenRows) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Pieces of the text in order.

        Yields:
            Index of the first row; token ids, int64 `[batch, sequence]`; activations `[batch, sequence, d_model]` in
            the model's dtype, on the CPU.
        """
        key = (lm.identity, str(lm.dtype), hook, rows.digest())
        known = self._kept.get(key)
        size = rows.ids.size * lm.d_model * lm.dtype.itemsize
        remember = known is None and bool(lm.identity) and size <= _MOST_BYTES
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
        while self._kept and sum(x.nbytes for some in self._kept.values() for x in some) + size > _MOST_BYTES:
            del self._kept[next(iter(self._kept))]
