"""What the model loses when an SAE's reconstruction stands in for the activation at the hook."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.lm.activations import NormLimit, kept_positions
from saeffect.lm.hooks import edited
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.metrics import ce_loss_score

__all__ = ["SplicedLosses", "row_losses", "spliced_losses"]


@dataclass(frozen=True)
class SplicedLosses:
    """Mean next-token cross-entropies, in nats a token.

    Attributes:
        clean: The model as it is.
        sae: The SAE's reconstruction at the hook.
        zero: Zeros at the hook.
        n_tokens: Predictions averaged over.
        clean_by_row: `clean` of each row, float64 `[n_rows]`.
    """

    clean: float
    sae: float
    zero: float
    n_tokens: int
    clean_by_row: NDArray[np.float64]

    @property
    def ce_loss_score(self) -> float:
        """See `saeffect.sae.metrics.ce_loss_score`."""
        return ce_loss_score(self.clean, self.sae, self.zero)


@torch.inference_mode()
def spliced_losses(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    hook: str,
    rows: NDArray[np.int32],
    limit: NormLimit,
    *,
    batch_size: int = 4,
) -> SplicedLosses:
    """Cross-entropy of the model clean, with the reconstruction, and with zeros at the hook.

    Positions that SAEs are not trained on (the first, and outliers of the norm) stay as they are each time. A BOS in
    front is never predicted.

    Args:
        lm: The model.
        sae: The SAE of this hook.
        hook: TransformerLens name.
        rows: Token ids, int32 `[n_rows, context_size]`.
        limit: Which positions count.
        batch_size: Rows a forward pass.
    """

    def replacing(new: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        def edit(x: Tensor) -> Tensor:
            kept = kept_positions(x, limit)[..., None]
            return torch.where(kept, new(x).to(x.dtype), x)

        return edited(lm, hook, edit)

    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "clean": nullcontext,
        "sae": lambda: replacing(sae),
        "zero": lambda: replacing(torch.zeros_like),
    }
    totals = dict.fromkeys(ways, 0.0)
    count, by_row = 0, []
    for start in range(0, len(rows), batch_size):
        ids = torch.from_numpy(rows[start : start + batch_size].astype(np.int64)).to(lm.device)
        for name, way in ways.items():
            with way():
                logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            totals[name] += float(loss)
            if name == "clean":
                by_row.append(row_losses(logits, ids))
        count += ids[:, 1:].numel()
    clean, spliced, zero = (totals[name] / count for name in ways)
    return SplicedLosses(clean, spliced, zero, count, np.concatenate(by_row))


def row_losses(logits: Tensor, ids: Tensor) -> NDArray[np.float64]:
    """Mean next-token cross-entropy of each row, in nats, float64 `[n_rows]`.

    Args:
        logits: Float `[n_rows, n - 1, d_vocab]`, of all positions but the last.
        ids: Token ids, int64 `[n_rows, n]`.
    """
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    means: NDArray[np.float64] = losses.view(len(ids), -1).double().mean(dim=1).cpu().numpy()
    return means
