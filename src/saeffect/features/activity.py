"""How often and how strongly features fire on text, and the contexts where they fire most; one pass over batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import BadFile, unknown_name

__all__ = ["ActivityAccumulator", "ExampleCollector", "check_finite"]

_OUTSIDE = -1  # token id of context positions outside the sequence
_COLUMNS = {
    "feature": "int64",
    "rank": "int64",
    "activation": "float64",
    "position": "int64",
    "tokens": "object",
    "activations": "object",
    "source": "str",
}


class ActivityAccumulator:
    """Streaming counts, sums and maxima of `feature_acts` per feature; *active* means above 0.

    Results do not depend on how tokens were batched: sums are sequential, in float64. Densities are also counted for
    each of `sources`, the names of the text sources.

    Example:
        >>> activity = ActivityAccumulator(d_sae=2, sources=("general", "domain"))
        >>> activity.update(torch.tensor([[0.0, 2.0], [0.0, 4.0]]), ["general", "domain"])
        >>> activity.update(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), ["domain", "domain"])
        >>> activity.result()[["density", "mean_activation", "n_active", "density_domain"]].loc[1].tolist()
        [0.5, 3.0, 2.0, 0.3333333333333333]
    """

    def __init__(self, d_sae: int, sources: Sequence[str] = ("general", "domain")) -> None:
        self.d_sae = d_sae
        self._codes = {name: code for code, name in enumerate(sources)}
        self._tokens = np.zeros(len(sources), dtype=np.int64)
        self._active = torch.zeros(len(sources), d_sae, dtype=torch.int64)
        self._sum, self._max = torch.zeros(2, d_sae, dtype=torch.float64)

    @property
    def n_tokens(self) -> int:
        """Tokens seen so far, over all sources."""
        return int(self._tokens.sum())

    def update(self, feature_acts: Tensor, sources: Sequence[str]) -> None:
        """Add a batch: `feature_acts` [n, d_sae], any float dtype, and the name of each token's source, [n].
        UnknownName: a source that was not named on creation; BadFile: NaN or plus infinity, and nothing is counted.
        """
        acts = feature_acts.detach()
        try:
            codes = torch.tensor([self._codes[name] for name in sources], dtype=torch.int64)
        except KeyError as error:
            raise unknown_name("source", error.args[0], self._codes, at="sources") from None
        if len(acts):
            check_finite(acts.amax(dim=0))  # a NaN anywhere in a column is its maximum
        row, feature = (acts > 0).nonzero(as_tuple=True)
        value = acts[row, feature].cpu().double()
        row, feature = row.cpu(), feature.cpu()
        self._tokens += torch.bincount(codes, minlength=len(self._codes)).numpy()
        cell = codes[row] * self.d_sae + feature
        self._active += torch.bincount(cell, minlength=self._active.numel()).view_as(self._active)
        self._sum.index_add_(0, feature, value)
        self._max.scatter_reduce_(0, feature, value, "amax")

    def result(self) -> pd.DataFrame:
        """One row a feature, over all tokens so far: feature (int64); density, the share of tokens on which it is
        active; mean_activation over those tokens (in the SAE's units, NaN if n_active is 0); max_activation (0 if
        never active); n_active (int64); density_<source>, the share of that source's tokens. Densities and the
        maximum are NaN where no token was seen.
        """
        tokens, n_active = self.n_tokens, self._active.sum(dim=0).numpy()
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN that is wanted
            columns = {
                "feature": np.arange(self.d_sae, dtype=np.int64),
                "density": n_active / np.float64(tokens),
                "mean_activation": self._sum.numpy() / n_active,
                "max_activation": self._max.numpy() if tokens else np.full(self.d_sae, np.nan),
                "n_active": n_active,
            }
            for name, code in self._codes.items():
                columns[f"density_{name}"] = self._active[code].numpy() / np.float64(self._tokens[code])
        return pd.DataFrame(columns)


class ExampleCollector:
    """Keeps, for every feature, the `n_examples` sequences that activate it most.

    A sequence counts once, at its highest activation (the first of equals); of equal peaks the earlier sequence is
    kept. A context has `window` tokens before the peak and `window // 3` after it, both within the sequence. Memory:
    `d_sae × n_examples × (window + 1 + window // 3)` activations and token ids. With `beside`, each update also takes
    the activations of the same tokens in another model, and the contexts hold both.

    Example:
        >>> collector = ExampleCollector(d_sae=1, n_examples=1, window=1)
        >>> collector.update(torch.tensor([[[0.0], [3.0], [1.0]]]), torch.tensor([[0, 1, 2]]))
        >>> row = collector.result(["The", " heart", " beats"]).loc[0]
        >>> row["tokens"], row["activations"], int(row["position"])
        (['The', ' heart'], [0.0, 3.0], 1)
    """

    def __init__(self, d_sae: int, n_examples: int = 6, window: int = 24, *, beside: bool = False) -> None:
        self.d_sae, self.n_examples, self.window = d_sae, n_examples, window
        self._offsets = torch.arange(-window, window // 3 + 1)
        width = len(self._offsets)
        self._peak = torch.zeros(d_sae, n_examples)  # 0: an empty slot
        self._sequence = torch.zeros(d_sae, n_examples, dtype=torch.int64)
        self._source = torch.zeros(d_sae, n_examples, dtype=torch.int64)
        # Of this model and, with `beside`, of the other: [d_sae, n_examples, width, 1 or 2].
        self._acts = torch.zeros(d_sae, n_examples, width, 1 + beside)
        self._tokens = torch.full((d_sae, n_examples, width), _OUTSIDE, dtype=torch.int32)
        self._names: dict[str, int] = {}
        self._next = 0

    def update(
        self,
        feature_acts: Tensor,
        token_ids: Tensor,
        mask: Tensor | None = None,
        *,
        sources: Sequence[str] | None = None,
        beside: Tensor | None = None,
    ) -> None:
        """Add a batch of whole sequences; part of a sequence would count as a sequence of its own.

        Args:
            feature_acts: [B, S, d_sae], any float dtype; only values above 0 make an example.
            token_ids: int [B, S].
            mask: bool [B, S], True at positions that count, the only ones for peaks; all by default. A masked tail is
                padding and left out of contexts; other masked positions are shown with activation 0.
            sources: [B], the name of each sequence's text source; "" by default.
            beside: [B, S, d_sae], the same features on the same tokens in another model; required if `beside` is set.

        BadFile: an activation that counts is NaN or plus infinity.
        """
        acts, token_ids = feature_acts.detach(), token_ids.detach()
        n_sequences, length = token_ids.shape
        first = self._next
        self._next += n_sequences
        if n_sequences == 0 or length == 0:
            return
        last = torch.full((n_sequences,), length - 1)
        if mask is not None and not bool(mask.all()):
            acts = acts.masked_fill(~mask.to(acts.device)[..., None], 0)
            last -= mask.cpu().flip(1).int().argmax(dim=1)
        peaks, positions = acts.max(dim=1)  # [B, d_sae]; the first of equal maxima
        peaks = peaks.float().cpu().clamp(min=0).T
        check_finite(peaks)
        order = self._merge(peaks, torch.arange(first, self._next))
        new = (order >= self.n_examples) & (self._peak > 0)
        feature, slot = new.nonzero(as_tuple=True)
        sequence = order[feature, slot] - self.n_examples
        context = positions.cpu()[sequence, feature, None] + self._offsets  # [n_new, width]
        outside = (context < 0) | (context > last[sequence, None])
        context = context.clamp(0, length - 1)
        # Gathered on the batch's device: only the windows are copied.
        for model, values in enumerate((acts, beside)[: self._acts.shape[-1]]):
            assert values is not None
            windows = values[sequence[:, None], context, feature[:, None]].float().cpu()
            self._acts[feature, slot, :, model] = windows.masked_fill(outside, 0)
        tokens = token_ids.cpu()[sequence[:, None], context].int()
        self._tokens[feature, slot] = tokens.masked_fill(outside, _OUTSIDE)
        # Sources are numbered in order of appearance.
        codes = [self._names.setdefault(name, len(self._names)) for name in sources or [""] * n_sequences]
        self._source[feature, slot] = torch.tensor(codes)[sequence]

    def result(self, token_strings: Sequence[str]) -> pd.DataFrame:
        """The contexts, one row each, by feature and then rank.

        feature, rank (0 best), activation (at the peak, in the SAE's units), position (of the peak in `tokens`), tokens
        (list of str, copied unchanged), activations (list of float, one a token), source; with `beside` also
        activations_beside. A feature that fired in fewer than `n_examples` sequences has fewer rows, or none.
        """
        names = list(self._names)
        tokens, acts = self._tokens.numpy(), self._acts.numpy().astype(np.float64)
        feature, rank = np.nonzero(self._peak.numpy() > 0)
        shown = tokens[feature, rank] != _OUTSIDE  # [n_rows, width]
        rows = list(zip(feature.tolist(), rank.tolist(), shown, strict=True))
        columns = {
            "feature": feature,
            "rank": rank,
            "activation": self._peak.numpy()[feature, rank],
            "position": shown[:, : self.window].sum(axis=1),
            "tokens": [[token_strings[token] for token in tokens[f, r, inside].tolist()] for f, r, inside in rows],
            "activations": [acts[f, r, inside, 0].tolist() for f, r, inside in rows],
            "source": [names[code] for code in self._source.numpy()[feature, rank].tolist()],
        }
        table = pd.DataFrame(columns).astype(_COLUMNS)
        if acts.shape[-1] > 1:
            table["activations_beside"] = [acts[f, r, inside, 1].tolist() for f, r, inside in rows]
        return table

    def _merge(self, peaks: Tensor, numbers: Tensor) -> Tensor:
        """Merge peaks [d_sae, B]; gives int64 [d_sae, n_examples], the old slot or `n_examples` + row in the batch."""
        peak = torch.cat([self._peak, peaks], dim=1)
        sequence = torch.cat([self._sequence, numbers.expand(self.d_sae, -1)], dim=1)
        earliest = sequence.argsort(dim=1, stable=True)
        highest = peak.gather(1, earliest).argsort(dim=1, descending=True, stable=True)
        order = earliest.gather(1, highest)[:, : self.n_examples]
        self._peak, self._sequence = peak.gather(1, order), sequence.gather(1, order)
        kept_slots = order.clamp(max=self.n_examples - 1)
        self._source = self._source.gather(1, kept_slots)
        self._acts = self._acts.take_along_dim(kept_slots[..., None, None], dim=1)
        self._tokens = self._tokens.take_along_dim(kept_slots[..., None], dim=1)
        return order


def check_finite(acts: Tensor) -> None:
    """BadFile if an activation is NaN or infinite."""
    if not bool(torch.isfinite(acts).all()):
        raise BadFile(
            "an activation is NaN or infinite.",
            at="feature_acts",
            fix="check the SAE's weights and the model's precision.",
        )
