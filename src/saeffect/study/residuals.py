"""What stands at the hook on the study's text: captured once for all arms that share model and hook."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saeffect.activations.harvest import TokenRows
from saeffect.models.hooks import capture
from saeffect.models.language_model import LanguageModel

__all__ = ["Residuals"]

_BATCH = 8
_MOST_BYTES = 400_000_000  # a control and its placebo share a capture only if it fits into so much memory


class Residuals:
    """Captures activations batch by batch and remembers those of the latest model and hook."""

    def __init__(self) -> None:
        self._key: tuple[str, str, str] | None = None
        self._kept: list[Tensor] = []

    def batches(self, lm: LanguageModel, hook: str, rows: TokenRows) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Pieces of the text in order.

        Yields:
            Index of the first row; token ids, int64 `[batch, sequence]`; activations `[batch, sequence, d_model]` in
            the model's dtype, on the CPU.
        """
        key = (lm.identity, str(lm.dtype), hook)
        starts = range(0, len(rows), _BATCH)
        known = self._kept if key == self._key and lm.identity and len(self._kept) == len(starts) else None
        if known is None:
            self._key, self._kept = key, []
        remember = rows.ids.size * lm.d_model * lm.dtype.itemsize <= _MOST_BYTES
        for index, start in enumerate(starts):
            ids = torch.from_numpy(rows.ids[start : start + _BATCH].astype("int64"))
            if known is not None:
                yield start, ids, known[index]
                continue
            x = capture(lm, hook, ids).cpu()
            if remember:
                self._kept.append(x)
            yield start, ids, x
