"""How well an SAE fits a model at a hook, overall and by position in the text. Read `measure_fit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.errors import Undefined
from saeffect.lm.activations import NormLimit, kept_positions
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.metrics import ReconstructionSums, SplicedLosses, spliced_losses

__all__ = ["Fit", "PositionSums", "measure_fit"]


@dataclass(frozen=True, eq=False)
class Fit:
    """Measures of an SAE on a model and a text.

    Attributes:
        explained_variance: Of the activations that count, about their mean.
        losses: Cross-entropies, in nats a token.
        l0: Mean number of active features a token.
        l2_ratio: Mean length of the reconstruction over that of the activation.
        mean_norm: Mean length of the activations that count.
        first_norm: Mean length at the first position of a row, which never counts.
        sink_share: Share of the other positions that do not count because their activations are outliers.
        features_fired: Number of features that were active at least once.
        tokens: Number of activations that count.
        positions: The measures by position.
    """

    explained_variance: float
    losses: SplicedLosses
    l0: float
    l2_ratio: float
    mean_norm: float
    first_norm: float
    sink_share: float
    features_fired: int
    tokens: int
    positions: PositionSums

    def values(self) -> dict[str, float]:
        """All measures over the whole text, by their names in a gate's table; ce_loss_score is NaN where undefined."""
        try:
            score = self.losses.ce_loss_score
        except Undefined:
            score = float("nan")
        return {
            "explained_variance": self.explained_variance,
            "ce_loss_score": score,
            "ce_clean": self.losses.clean,
            "ce_sae": self.losses.sae,
            "ce_zero": self.losses.zero,
            "l0": self.l0,
            "l2_ratio": self.l2_ratio,
            "mean_norm": self.mean_norm,
            "first_norm": self.first_norm,
            "sink_share": self.sink_share,
            "features_fired": self.features_fired,
            "tokens": self.tokens,
        }


class PositionSums:
    """Sums by position in a row, from which ranges of positions are pooled exactly. `ce_increase`: how much splicing
    in the SAE raises the loss of the next token, nats, float64 `[context_size - 1]`.
    """

    def __init__(self, context_size: int, d_in: int) -> None:
        self.n_rows = 0
        self.ce_increase: NDArray[np.float64] = np.full(context_size - 1, np.nan)
        self._kept, self._counted, self._error, self._squared, self._active, self._norm = torch.zeros(
            6, context_size, dtype=torch.float64
        )
        self._all_norm = torch.zeros(context_size, dtype=torch.float64)
        self._total = torch.zeros(context_size, d_in, dtype=torch.float64)

    def add(self, x: Tensor, sae_out: Tensor, feature_acts: Tensor, kept: Tensor, counts: Tensor | None = None) -> None:
        """Add rows: activations and reconstructions `[B, S, d_in]`, feature activations `[B, S, d_sae]`, and the masks
        `[B, S]` of positions that count (`counts`, None for all) and of those that are also no outliers (`kept`).
        """
        x, sae_out, on = x.double(), sae_out.double(), kept.double()
        self.n_rows += len(x)
        norm = x.norm(dim=-1)
        self._kept += on.sum(0)
        self._counted += (torch.ones_like(on) if counts is None else counts.to(on)).sum(0)
        self._error += ((x - sae_out).square().sum(-1) * on).sum(0)
        self._squared += (norm.square() * on).sum(0)
        self._active += ((feature_acts > 0).sum(-1) * on).sum(0)
        self._norm += (norm * on).sum(0)
        self._all_norm += norm.sum(0)
        self._total += (x * on[..., None]).sum(0)

    @property
    def first_norm(self) -> float:
        return float(self._all_norm[0]) / self.n_rows if self.n_rows else float("nan")

    @property
    def sink_share(self) -> float:
        """Share of outliers among the positions that count, without the first of each row."""
        n = float(self._counted[1:].sum())
        return 1.0 - float(self._kept[1:].sum()) / n if n else float("nan")

    def table(self, starts: tuple[int, ...] | None = None) -> pd.DataFrame:
        """A row for each range of positions that begins at one of `starts` (by default 0, 1, 2, 4, 8, ...): first,
        last; explained_variance (1 - squared error / squared distance from the mean over all positions; NaN where no
        activation counts); l0; mean_norm (of all activations); sink_share; ce_increase (NaN where none counts).
        """
        size = len(self._kept)
        starts = starts or tuple(start for start in (0, *(2**i for i in range(size.bit_length()))) if start < size)
        mean = self._total.sum(0) / self._kept.sum()
        # Sum over tokens of |x - mean|^2, without a second pass.
        scatter = self._squared - 2 * self._total @ mean + self._kept * mean.square().sum()
        rows: list[dict[str, Any]] = []
        for first, stop in zip(starts, (*starts[1:], size), strict=True):
            part = slice(first, stop)
            n_kept, n_counted = float(self._kept[part].sum()), float(self._counted[part].sum())
            variance = float(scatter[part].sum())
            losses = self.ce_increase[part]
            rows.append(
                {
                    "first": first,
                    "last": stop - 1,
                    "explained_variance": 1.0 - float(self._error[part].sum()) / variance if variance > 0 else np.nan,
                    "l0": float(self._active[part].sum()) / n_kept if n_kept else np.nan,
                    "mean_norm": float(self._all_norm[part].sum()) / (self.n_rows * (stop - first)),
                    "sink_share": 1.0 - n_kept / n_counted if n_counted else np.nan,
                    "ce_increase": float(losses.mean()) if n_kept and len(losses) else np.nan,
                }
            )
        return pd.DataFrame(rows)


@torch.inference_mode()
def measure_fit(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    hook: str,
    ids: NDArray[np.int32],
    limit: NormLimit,
    *,
    counts: NDArray[np.bool_] | None = None,
) -> Fit:
    """Measure an SAE on rows of text, token ids int32 `[n_rows, context_size]`, at the positions in `counts`, bool of
    the same shape (None: all), without the first of each row.

    Undefined if all activations are equal; errors as `capture`.
    """
    sums = ReconstructionSums(sae.cfg.d_in)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    positions = PositionSums(ids.shape[1], sae.cfg.d_in)

    def reconstruct(_: Tensor, x: Tensor) -> Tensor:
        rows = slice(positions.n_rows, positions.n_rows + len(x))
        on = None if counts is None else torch.from_numpy(counts[rows])
        kept = kept_positions(x, limit, on)
        sae_in, there = x.float(), sae.on(x.device)
        feature_acts, sae_out = there.encode(sae_in), there(sae_in)
        sums.add(sae_in[kept], sae_out[kept], feature_acts[kept])
        fired.logical_or_((feature_acts[kept] > 0).any(0).cpu())
        positions.add(sae_in.cpu(), sae_out.cpu(), feature_acts.cpu(), kept.cpu(), on)
        return sae_out

    losses = spliced_losses(lm, reconstruct, hook, ids, limit, counts=counts)
    positions.ce_increase = losses.by_position["sae"] - losses.by_position["clean"]
    kept = positions._kept.sum()
    return Fit(
        explained_variance=sums.explained_variance(),
        losses=losses,
        l0=sums.l0(),
        l2_ratio=sums.l2_ratio(),
        mean_norm=float(positions._norm.sum() / kept),
        first_norm=positions.first_norm,
        sink_share=positions.sink_share,
        features_fired=int(fired.sum()),
        tokens=sums.n_tokens,
        positions=positions,
    )
