"""Matryoshka BatchTopK SAE: nested SAEs (the first `widths[0]` features, the first `widths[1]`, ...) each reconstruct
the input, so that general features come first instead of being absorbed by specific ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saeffect.sae.batchtopk import BatchTopKSae
from saeffect.sae.entries import DenseEntries, Entries, SparseEntries
from saeffect.sae.trainable import StepInputs, squared_error
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = ["MatryoshkaSae"]


class MatryoshkaSae(BatchTopKSae):
    """Selects like BatchTopK, over all features; the loss is the sum of the nested SAEs' squared errors."""

    architecture, label, saelens_name = "matryoshka", "Matryoshka BatchTopK", "matryoshka_batchtopk"
    keys = (*BatchTopKSae.keys, "matryoshka_widths")
    loss_parts = (*BatchTopKSae.loss_parts, ("inner_mse_", "mse of "))
    leaves_out_parallel = False  # a row's gradient is a sum over several reconstructions

    @classmethod
    def in_words(cls, config: SaeTrainingConfig) -> list[str]:
        return [*super().in_words(config), f"nested widths {', '.join(f'{w:,}' for w in config.widths)}"]

    def reconstruct(
        self, entries: Entries, x: Tensor, centred: Tensor, step: StepInputs
    ) -> tuple[dict[str, Tensor], Tensor]:
        """See `BatchTopKSae`. "mse" is the whole SAE's; each smaller one adds "inner_mse_<width>".

        A feature is part of its own group's reconstruction and of all wider ones (each adds `b_dec`), so its gradient
        comes from the sum of their errors. Source: Bussmann et al. (2025), Learning Multi-Level Features with
        Matryoshka SAEs; SAELens' MatryoshkaBatchTopKTrainingSAE.
        """
        widths = step.config.widths
        groups = list(_groups(entries, widths))
        errors = []
        sae_out = self.b_dec.data.expand_as(x)
        for rows, group in groups:
            sae_out = sae_out + group.decode(group.values, self.W_dec.data[rows])
            errors.append(sae_out - x)
        losses = {"mse": squared_error(errors[-1]) / step.n_tokens}
        for width, error in zip(widths[:-1], errors[:-1], strict=True):
            losses[f"inner_mse_{width}"] = squared_error(error) / step.n_tokens
        d_out = torch.zeros_like(x)
        for rows, group in reversed(groups):
            d_out.add_(errors.pop(), alpha=2.0 / step.n_tokens)
            d_hidden = group.inner(d_out, self.W_dec.data[rows]).mul_(group.values > 0)
            group.outer(group.values, d_out, self.gradient("W_dec")[rows])
            group.outer(d_hidden, centred, self.gradient("W_enc")[rows])
            self.gradient("b_enc")[rows] = group.feature_sums(d_hidden)
        self.gradient("b_dec").copy_(d_out.sum(0))
        self.backward_to_b_dec(self.gradient("b_enc"))
        return losses, sae_out


def _groups(entries: Entries, widths: Sequence[int]) -> Iterator[tuple[slice, Entries]]:
    """(the group's features, their entries with features numbered from the group's first), from the inside out."""
    n_tokens = entries.shape[0]
    start = 0
    for end in widths:
        if isinstance(entries, SparseEntries):
            inside = (entries.feature >= start) & (entries.feature < end)
            token, feature, values = entries.token[inside], entries.feature[inside], entries.values[inside]
            yield slice(start, end), SparseEntries(token, feature - start, values, (n_tokens, end - start))
        else:
            yield slice(start, end), DenseEntries(entries.values[:, start:end])
        start = end
