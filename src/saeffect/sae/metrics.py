"""How well an SAE reconstructs activations, and how much the reconstruction raises the model's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.errors import ShapeMismatch, Undefined
from saeffect.lm.activations import NormLimit, kept_positions
from saeffect.lm.hooks import Rest, recorded
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SparseAutoencoder

__all__ = [
    "ReconstructionSums",
    "SplicedLosses",
    "ce_loss_score",
    "explained_variance",
    "reconstruction",
    "row_losses",
    "spliced_losses",
]


def explained_variance(sae_in: Tensor, sae_out: Tensor) -> float:
    """Share of the variance about the mean that the reconstruction keeps: R² pooled over tokens and dimensions.

    Both are `[n_tokens, d_in]` of any float dtype, summed in float64. At most 1; 0 for predicting the mean; negative
    when worse. ShapeMismatch if the shapes differ; Undefined if all rows of `sae_in` are equal.

    Example:
        >>> explained_variance(torch.tensor([[2., 0.], [0., 4.]]), torch.tensor([[2., 1.], [0., 3.]]))
        0.8
    """
    sums = ReconstructionSums(sae_in.shape[-1])
    sums.add(sae_in, sae_out)
    return sums.explained_variance()


def ce_loss_score(clean: float, sae: float, zero: float) -> float:
    """(zero - sae) / (zero - clean): 1 is perfect, 0 no better than zeros; Undefined if zeros do not change the loss.

    All are cross-entropies in nats a token: `clean` of the model as it is, `sae` with the SAE's output at the hook,
    `zero` with zeros there.

    Example:
        >>> ce_loss_score(clean=3.0, sae=3.5, zero=8.0)
        0.9
    """
    if zero == clean:
        raise Undefined("zeroing the hook does not change the loss, so there is nothing to save.")
    return (zero - sae) / (zero - clean)


class ReconstructionSums:
    """Explained variance, l2 ratio and l0, summed over batches."""

    def __init__(self, d_in: int) -> None:
        self.n_tokens = 0
        self._squared_in = self._squared_error = self._ratio = self._active = 0.0
        self._total = torch.zeros(d_in, dtype=torch.float64)

    def add(self, sae_in: Tensor, sae_out: Tensor, feature_acts: Tensor | None = None) -> None:
        """Add a batch `[n_tokens, d_in]` (and its feature activations `[n_tokens, d_sae]`, for l0)."""
        if sae_in.shape != sae_out.shape or sae_in.ndim != 2:
            raise ShapeMismatch(
                f"activations have shape {tuple(sae_in.shape)} and reconstructions {tuple(sae_out.shape)};"
                " expected the same [n_tokens, d_in]."
            )
        x, y = sae_in.double(), sae_out.double()
        self.n_tokens += len(x)
        self._squared_in += float(x.square().sum())
        self._squared_error += float((x - y).square().sum())
        self._total += x.sum(0).cpu()
        self._ratio += float((y.norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)).sum())
        if feature_acts is not None:
            self._active += float((feature_acts > 0).sum())

    def explained_variance(self) -> float:
        n = self.n_tokens
        about_mean = self._squared_in - float(self._total.square().sum()) / n if n else 0.0
        if about_mean <= 1e-12 * self._squared_in or not n:
            raise Undefined("all activations are equal, so there is no variance to explain.")
        return 1.0 - self._squared_error / about_mean

    def l2_ratio(self) -> float:
        """Mean over tokens of the reconstruction's norm / the input's; below 1 the SAE shrinks."""
        return self._ratio / self.n_tokens if self.n_tokens else float("nan")

    def l0(self) -> float:
        """Mean number of active features a token."""
        return self._active / self.n_tokens if self.n_tokens else float("nan")


@torch.inference_mode()
def reconstruction(sae: SparseAutoencoder, activations: Tensor) -> dict[str, float]:
    """How well an SAE (in unscaled units) reconstructs activations, float32 `[n_tokens, d_in]`: explained_variance;
    l2_ratio (mean of norm out over norm in); l0 (mean active features a token); dead_share (of features that never
    fire); mean_log10_density (mean of log10(firing rate + 1e-10)); n_tokens. For a crosscoder also
    explained_variance_base and explained_variance_tuned, of each model's half.
    """
    sums = ReconstructionSums(sae.cfg.d_in)
    by_side = [ReconstructionSums(sae.cfg.d_in // len(sae.sides)) for _ in sae.sides]
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    for x in activations.split(1024):
        feature_acts = sae.encode(x)
        sae_out = sae(x)
        sums.add(x, sae_out, feature_acts)
        if by_side:
            for side_sums, half_in, half_out in zip(by_side, x.chunk(2, dim=1), sae_out.chunk(2, dim=1), strict=True):
                side_sums.add(half_in, half_out)
        fired += (feature_acts > 0).sum(0)
    density = fired.double() / sums.n_tokens
    return {
        "explained_variance": sums.explained_variance(),
        "l2_ratio": sums.l2_ratio(),
        "l0": sums.l0(),
        "dead_share": float((fired == 0).double().mean()),
        "mean_log10_density": float((density + 1e-10).log10().mean()),
        "n_tokens": sums.n_tokens,
        **{
            f"explained_variance_{side}": side_sums.explained_variance()
            for side, side_sums in zip(sae.sides, by_side, strict=True)
        },
    }


@dataclass(frozen=True)
class SplicedLosses:
    """Mean next-token cross-entropies, in nats a token."""

    clean: float  # the model as it is
    sae: float  # the SAE's reconstruction at the hook
    zero: float  # zeros at the hook
    n_tokens: int  # predictions averaged over
    by_row: dict[str, NDArray[np.float64]]  # `clean`, `sae` and `zero` of each row, [n_rows]
    by_position: dict[str, NDArray[np.float64]]  # the same at each position but the last, [context_size - 1]

    @property
    def ce_loss_score(self) -> float:
        return ce_loss_score(self.clean, self.sae, self.zero)


@torch.inference_mode()
def spliced_losses(
    lm: LanguageModel,
    sae: SparseAutoencoder | Callable[[Tensor, Tensor], Tensor],
    hook: str,
    rows: NDArray[np.int32],
    limit: NormLimit,
    *,
    batch_size: int = 8,
    seen: Callable[[Tensor], None] | None = None,
    counts: NDArray[np.bool_] | None = None,
) -> SplicedLosses:
    """Cross-entropy of the clean model, with the reconstruction, and with zeros at the hook.

    `rows` are token ids, int32 `[n_rows, context_size]`. Replaced are the positions in `counts`, bool as `rows` (None:
    all), without the first of each row and norm outliers. A BOS in front is never predicted. `seen` is called with each
    batch's activations that count, `[n_kept, d_model]`, of the model's dtype. In place of the SAE, `sae` may be a
    function that makes reconstructions from ids, int64 `[B, S]`, and activations `[B, S, d_in]`.
    """
    rest = Rest(lm, hook)
    replacements: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sae": (lambda _, x: sae.on(x.device)(x)) if isinstance(sae, SparseAutoencoder) else sae,
        "zero": lambda _, x: torch.zeros_like(x),
    }
    totals = dict.fromkeys(("clean", *replacements), 0.0)
    count, by_row = 0, {name: list[NDArray[np.float64]]() for name in totals}
    by_position = {name: np.zeros(rows.shape[1] - 1) for name in totals}

    def record(name: str, logits: Tensor, ids: Tensor) -> None:
        losses = _token_losses(logits[:, :-1].float(), ids)
        by_row[name].append(losses.mean(dim=1).cpu().numpy())
        by_position[name] += losses.sum(0).cpu().numpy() / len(rows)

    for start in range(0, len(rows), batch_size):
        ids = torch.from_numpy(rows[start : start + batch_size].astype(np.int64)).to(lm.device)
        with recorded(lm, hook) as captured:
            record("clean", lm.model(input_ids=ids, use_cache=False).logits, ids)
        x = captured[hook]
        on = None if counts is None else torch.from_numpy(counts[start : start + batch_size])
        kept = kept_positions(x, limit, on)
        if seen is not None:
            seen(x[kept])
        for name, replacement in replacements.items():
            logits = rest.logits(ids, torch.where(kept[..., None], replacement(ids, x).to(x.dtype), x))
            record(name, logits, ids)
        for name, losses in by_row.items():
            totals[name] += float(losses[-1].sum()) * (ids.shape[1] - 1)
        count += ids[:, 1:].numel()
    clean, spliced, zero = (total / count for total in totals.values())
    of_rows = {name: np.concatenate(parts) for name, parts in by_row.items()}
    return SplicedLosses(clean, spliced, zero, count, of_rows, by_position)


def row_losses(logits: Tensor, ids: Tensor) -> NDArray[np.float64]:
    """Mean next-token cross-entropy of each row, in nats, float64 `[n_rows]`, of ids int64 `[n_rows, n]`; `logits`
    are float `[n_rows, n - 1, d_vocab]`, of all positions but the last.
    """
    means: NDArray[np.float64] = _token_losses(logits, ids).mean(dim=1).cpu().numpy()
    return means


def _token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token cross-entropies, float64 `[n_rows, n - 1]`; arguments as `row_losses`."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).double()
