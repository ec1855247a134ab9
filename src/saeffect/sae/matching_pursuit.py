"""Matching pursuit SAE: features are chosen one at a time, each from the residual so far (Costa et al. 2025)."""

from __future__ import annotations

from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae
from saeffect.sae.base import SaeConfig, SparseAutoencoder

__all__ = ["MatchingPursuitSae"]

_CHUNK = 4096  # tokens whose products with all features are in memory at once


class MatchingPursuitSae(SparseAutoencoder):
    """Cannot be trained here. The encoder is the decoder's transpose; features are added until the residual is small.

    Settings, kept in the metadata, with SAELens' defaults: `residual_threshold` (0.01: stop below this norm of the
    residual; 0 never), `max_iterations` (`d_in`), `stop_on_duplicate_support` (True: stop when a feature is chosen
    again). Source: SAELens' MatchingPursuitSAE, which gives the same activations.
    """

    architecture, label = "matching_pursuit", "Matching pursuit"
    vectors = ()
    settings: ClassVar[tuple[str, ...]] = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")

    def __init__(self, cfg: SaeConfig) -> None:
        super().__init__(cfg)
        threshold = cfg.metadata.get("residual_threshold", 1e-2)
        max_iterations = cfg.metadata.get("max_iterations")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise BadFile(f"residual_threshold is {threshold!r}; expected a number.")
        if max_iterations is not None and (
            isinstance(max_iterations, bool) or not isinstance(max_iterations, int) or max_iterations < 1
        ):
            raise BadFile(f"max_iterations is {max_iterations!r}; expected a whole number above 0, or null.")
        self._threshold, self._max_iterations = float(threshold), max_iterations or cfg.d_in
        self._stops_at_repeats = bool(cfg.metadata.get("stop_on_duplicate_support", True))

    @classmethod
    def shapes(cls, cfg: SaeConfig) -> dict[str, tuple[int, ...]]:
        return {"W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        """The decoder's transpose."""
        return self.W_dec.T

    def as_start(self) -> NoReturn:
        """Always raises IncompatibleSae: features are chosen one after another, without an encoder."""
        raise IncompatibleSae("a matching pursuit SAE has no encoder to begin a training with.")

    def activation(self, hidden_pre: Tensor) -> Tensor:
        """Activations of the first step only, before anything is subtracted."""
        return hidden_pre.relu()

    def hidden_pre(self, sae_in: Tensor) -> Tensor:
        return self._centred(sae_in) @ self.W_dec.T

    def acts(self, sae_in: Tensor) -> Tensor:
        flat = self._centred(sae_in).reshape(-1, self.cfg.d_in)
        parts = [self._pursue(part) for part in flat.split(_CHUNK)]
        return torch.cat(parts).reshape(*sae_in.shape[:-1], self.cfg.d_sae)

    def decode(self, feature_acts: Tensor) -> Tensor:
        # A tied SAE adds b_dec only if it was subtracted.
        out = feature_acts @ self.W_dec
        return out + self.b_dec if self.cfg.apply_b_dec_to_input else out

    def _centred(self, sae_in: Tensor) -> Tensor:
        return sae_in - self.b_dec if self.cfg.apply_b_dec_to_input else sae_in

    def _pursue(self, residual: Tensor) -> Tensor:
        """Feature activations `[n, d_sae]` of centred inputs `[n, d_in]`."""
        acts = residual.new_zeros(len(residual), self.cfg.d_sae)
        active = torch.arange(len(residual), device=residual.device)
        for _ in range(self._max_iterations):
            best = (residual @ self.W_dec.T).relu().max(dim=1).indices
            rows = self.W_dec[best]
            values = (residual * rows).sum(dim=1).relu()
            new = (acts[active, best] == 0) & (values != 0)
            acts[active, best] += values
            residual = residual - values[:, None] * rows
            done = torch.zeros_like(new)
            if self._stops_at_repeats:
                done |= ~new
            if self._threshold > 0:
                done |= residual.norm(dim=1) < self._threshold
            active, residual = active[~done], residual[~done]
            if not len(active):
                break
        return acts
