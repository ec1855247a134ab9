"""Activations of two models at one hook on the same tokens: concatenated for a crosscoder, or their difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.errors import ConfigError, EmptySelection
from saeffect.io import fingerprint
from saeffect.lm.activations import StreamedActivations, kept_positions
from saeffect.lm.harvest import ActivationStore, ShardSource, read_shard, shard_places
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.lm.tokens import known_tokens

__all__ = [
    "Combination",
    "PairedStore",
    "PairedStream",
    "combined",
    "paired_identity",
    "paired_width",
    "refuse_unlike",
]

Combination = Literal["both", "difference"]
"""both: base and tuned concatenated, twice as wide; difference: tuned minus base."""


def paired_width(d_model: int, how: Combination | None) -> int:
    """Width of an SAE's input: twice `d_model` for "both", else `d_model`; None: activations of one model."""
    return d_model * (2 if how == "both" else 1)


def combined(base: Tensor, tuned: Tensor, how: Combination) -> Tensor:
    """Activations of both models, `[..., d_model]` each, as one input: `[..., 2 · d_model]`, or their difference,
    float32.

    Example:
        >>> combined(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), "both").tolist()
        [1.0, 2.0, 4.0, 8.0]
        >>> combined(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), "difference").tolist()
        [3.0, 6.0]
    """
    if how == "difference":
        return tuned.float() - base.float()
    if base.dtype != tuned.dtype:
        base, tuned = base.float(), tuned.float()
    return torch.cat([base, tuned], dim=-1)


def paired_identity(base: str, tuned: str, how: Combination) -> str:
    """Identity of paired activations, from the identity of each model's."""
    return fingerprint([base, tuned, how])


def refuse_unlike(base: LanguageModel, tuned: LanguageModel) -> None:
    """ConfigError if the models differ in width or in the meaning of a token id."""
    if base.d_model != tuned.d_model:
        raise ConfigError(
            f"{base.name} is {base.d_model} wide, {tuned.name} {tuned.d_model}.",
            at="tuned",
            fix="give a fine-tuned version of the same model.",
        )
    base_tokens, tuned_tokens = known_tokens(base.tokenizer), known_tokens(tuned.tokenizer)
    other = next((i for i, token in base_tokens.items() if tuned_tokens.get(i) != token), None)
    if other is not None:
        raise ConfigError(
            f"token {other} is {base_tokens[other]!r} in {base.name} and {tuned_tokens.get(other)!r} in {tuned.name},"
            " so the two cannot read the same text.",
            at="tuned",
            fix="give a fine-tuned version with the same tokenizer.",
        )


@dataclass(frozen=True)
class PairedStore(ShardSource):
    """Two harvests of the same rows; only tokens that count in both models are used."""

    base: ActivationStore
    tuned: ActivationStore
    how: Combination

    @classmethod
    def open(cls, base: ActivationStore, tuned: ActivationStore, how: Combination) -> PairedStore:
        """Two harvests: ConfigError if they are not of the same text; EmptySelection if no token counts in both."""
        notes = [store.note["made_by"] for store in (base, tuned)]
        for key in ("text", "hook", "rows_per_shard"):
            if notes[0].get(key) != notes[1].get(key):
                raise ConfigError(
                    f"the harvests {base.folder.name} and {tuned.folder.name} differ in {key}.",
                    at=str(tuned.folder),
                    fix="harvest both models at one hook on one text.",
                )
        store = cls(base, tuned, how)
        if not sum(store.lengths()):
            raise EmptySelection("no token counts in both models.", at=str(tuned.folder))
        return store

    @property
    def d_in(self) -> int:
        return paired_width(self.base.d_in, self.how)

    def identity(self) -> str:
        return paired_identity(self.base.identity(), self.tuned.identity(), self.how)

    def lengths(self) -> Sequence[int]:
        return [int(kept.sum()) for kept, _ in self._kept]

    def shard(self, index: int) -> Tensor:
        parts = [
            read_shard(store.shards()[index])["activations"][kept]
            for store, kept in zip((self.base, self.tuned), self._kept[index], strict=True)
        ]
        return combined(parts[0], parts[1], self.how)

    @cached_property
    def _kept(self) -> list[tuple[Tensor, Tensor]]:
        """For each shard, masks of the base and tuned model's tokens that the other model has too."""
        masks = []
        for paths in zip(self.base.shards(), self.tuned.shards(), strict=True):
            base, tuned = (shard_places(path) for path in paths)
            masks.append((torch.isin(base, tuned, assume_unique=True), torch.isin(tuned, base, assume_unique=True)))
        return masks


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedStream(StreamedActivations):
    """Both models run over the text; only tokens that count in both are used."""

    tuned: StreamedActivations
    how: Combination

    @classmethod
    def from_streams(cls, base: StreamedActivations, tuned: StreamedActivations, how: Combination) -> PairedStream:
        """Pair two streams of the same text, hook and pool size."""
        shared = {name: getattr(base, name) for name in ("lm", "hook", "text", "limit", "pool_rows", "rows_a_pass")}
        return cls(**shared, tuned=tuned, how=how)

    @property
    def d_in(self) -> int:
        return paired_width(self.lm.d_model, self.how)

    @property
    def dtype(self) -> torch.dtype:
        same_dtype = self.lm.dtype == self.tuned.lm.dtype
        return self.lm.dtype if self.how == "both" and same_dtype else torch.float32

    def identity(self) -> str:
        return paired_identity(super().identity(), self.tuned.identity(), self.how)

    def run(self, ids: NDArray[np.int32]) -> Tensor:
        rows = torch.from_numpy(ids.astype(np.int64))
        both = [capture(stream.lm, self.hook, rows).cpu() for stream in (self, self.tuned)]
        mask = kept_positions(both[0], self.limit) & kept_positions(both[1], self.tuned.limit)
        return combined(both[0][mask], both[1][mask], self.how)

    def _run_rows(self, ids: NDArray[np.int32]) -> Tensor:
        with fused(self.tuned.lm):
            return super()._run_rows(ids)
