"""How well an SAE fits a model at a hook, over all and by position in the text: read `measure_fit`."""

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
    """What an SAE does on one model, on some text.

    Attributes:
        explained_variance: Of the activations that count, about their mean.
        losses: Cross-entropies, in nats a token.
        l0: Mean number of active features a token.
        l2_ratio: Mean length of the reconstruction over that of the activation.
        mean_norm: Mean length of the activations that count.
        first_norm: Mean length at the first position of a row, which never counts.
        sink_share: Share of the other positions that would count, were their activations not too long.
        features_fired: Number of features that were active at least once.
        tokens: Number of activations that count.
        positions: The same by position.
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
        """All numbers over the whole text, by the names of a gate's table; ce_loss_score is NaN where undefined."""
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
    """Sums by position in a row, from which ranges of positions are pooled exactly. `ce_increase`: by how much the
    SAE in its place raises the loss of the next token, nats, float64 `[n - 1]`.
    """

    def __init__(self, context_size: int, d_in: int) -> None:
        self.n_rows = 0
        self.ce_increase: NDArray[np.float64] = np.full(context_size - 1, np.nan)
        self._kept, self._asked, self._error, self._squared, self._active, self._norm = torch.zeros(
            6, context_size, dtype=torch.float64
        )
        self._all_norm = torch.zeros(context_size, dtype=torch.float64)
        self._total = torch.zeros(context_size, d_in, dtype=torch.float64)

    def add(self, x: Tensor, sae_out: Tensor, feature_acts: Tensor, kept: Tensor, counts: Tensor | None = None) -> None:
        """Add rows: activations and reconstructions `[B, S, d_in]`, `[B, S, d_sae]`, and which are `kept`, `[B, S]`:
        those that count and are no outliers; `counts`, None for all, is the first alone.
        """
        x, sae_out, on = x.double(), sae_out.double(), kept.double()
        self.n_rows += len(x)
        norm = x.norm(dim=-1)
        self._kept += on.sum(0)
        self._asked += (torch.ones_like(on) if counts is None else counts.to(on)).sum(0)
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
        """Share of the positions that count, but for the first, whose activations are outliers."""
        n = float(self._asked[1:].sum())
        return 1.0 - float(self._kept[1:].sum()) / n if n else float("nan")

    def table(self, starts: tuple[int, ...] | None = None) -> pd.DataFrame:
        """A row for each range of positions that begins at one of `starts` (by default 0, 1, 2, 4, 8, ...): first,
        last; explained_variance (1 - squared error over squared distance from the mean of all positions; NaN where
        no activation counts); l0; mean_norm (of all); sink_share; ce_increase (NaN as well).
        """
        size = len(self._kept)
        starts = starts or tuple(start for start in (0, *(2**i for i in range(size.bit_length()))) if start < size)
        mean = self._total.sum(0) / self._kept.sum()
        # Sum over tokens of |x - mean|^2, without a second pass.
        scatter = self._squared - 2 * self._total @ mean + self._kept * mean.square().sum()
        found: list[dict[str, Any]] = []
        for first, stop in zip(starts, (*starts[1:], size), strict=True):
            part = slice(first, stop)
            n, asked = float(self._kept[part].sum()), float(self._asked[part].sum())
            about = float(scatter[part].sum())
            losses = self.ce_increase[part]
            found.append(
                {
                    "first": first,
                    "last": stop - 1,
                    "explained_variance": 1.0 - float(self._error[part].sum()) / about if about > 0 else np.nan,
                    "l0": float(self._active[part].sum()) / n if n else np.nan,
                    "mean_norm": float(self._all_norm[part].sum()) / (self.n_rows * (stop - first)),
                    "sink_share": 1.0 - n / asked if asked else np.nan,
                    "ce_increase": float(losses.mean()) if n and len(losses) else np.nan,
                }
            )
        return pd.DataFrame(found)


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
    """Measure an SAE on rows of text, token ids int32 `[n_rows, context_size]`; each row's first position never counts,
    nor what `counts`, bool of the same shape, leaves out.

    Undefined if all activations are equal; errors as `capture`.
    """
    sums = ReconstructionSums(sae.cfg.d_in)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    positions = PositionSums(ids.shape[1], sae.cfg.d_in)

    def rebuilt(_: Tensor, x: Tensor) -> Tensor:
        rows = slice(positions.n_rows, positions.n_rows + len(x))
        on = None if counts is None else torch.from_numpy(counts[rows])
        kept = kept_positions(x, limit, on)
        sae_in = x.float().to(sae.W_dec.device)
        feature_acts, sae_out = sae.encode(sae_in), sae(sae_in)
        sums.add(sae_in[kept], sae_out[kept], feature_acts[kept])
        fired.logical_or_((feature_acts[kept] > 0).any(0).cpu())
        positions.add(sae_in, sae_out, feature_acts, kept, on)
        return sae_out

    losses = spliced_losses(lm, rebuilt, hook, ids, limit, counts=counts)
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
