"""Start training from an SAE on disk: every feature keeps its index, so that SAEs of different arms line up.

The source may be of another architecture. All of them are a JumpReLU SAE with a particular threshold at
inference, and whatever the new architecture can express of it is carried over:

| from \\ to | standard, topk | batchtopk, matryoshka | jumprelu | gated |
|---|---|---|---|---|
| standard, topk | as it is | threshold 0 | threshold of a fresh start | both biases alike |
| jumprelu | threshold dropped | median of the thresholds | as it is | exactly |
| gated | gates dropped | median of the thresholds | exactly | as it is |

Where a threshold or a gate is dropped, features fire more often at first; the penalty, or k, takes over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saeffect.errors import IncompatibleSae
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.batchtopk import BatchTopKSae
from saeffect.sae.formats.saelens import load_sae
from saeffect.sae.gated import GatedSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.trainable import TrainableSae

__all__ = ["copy_weights"]


@torch.no_grad()
def copy_weights(
    source: Path | str, sae: TrainableSae, scale: float, *, unit_decoder: bool = False, at: str | None = None
) -> None:
    """Copy an SAE's weights into one that is about to be trained on scaled inputs.

    Args:
        source: Folder of an SAE that takes unscaled activations, in any layout that `load_sae` reads.
        sae: Changed in place, buffers and leaves included; a JumpReLU SAE must have its starting thresholds.
        scale: What inputs are multiplied by in training: biases and thresholds grow by it, so that `fold_scale`
            after no step at all gives the source again.
        unit_decoder: Whether training keeps decoder rows at length 1: their lengths move into the encoder, and
            features that were ranked by activation are then ranked by activation times length.
        at: For errors.

    Raises:
        IncompatibleSae: Another d_in or d_sae, or a source that normalises or centres its inputs as `sae` does not.
        SaeffectError: The source cannot be loaded.
    """
    where = at or str(source)
    loaded = load_sae(source, at=at)
    _check_fit(loaded, sae, where)
    fresh = {name: t.clone() for name, t in sae.named_parameters() if name == "threshold"}
    if isinstance(loaded, GatedSae) and isinstance(sae, GatedSae):
        _copy_gated(loaded, sae, unit_decoder=unit_decoder)
    else:
        ranked_alike = loaded.cfg.rescale_acts_by_decoder_norm <= sae.cfg.rescale_acts_by_decoder_norm
        start = _parts(loaded, unit_rows=unit_decoder or not ranked_alike)
        _centre_as(start, loaded, sae)
        _write(start, sae)
        if start.threshold is not None:
            fresh = {}
    sae.fold_scale(1.0 / scale)
    for name, tensor in fresh.items():  # starts in units of scaled inputs, as it was
        sae.get_parameter(name).copy_(tensor)


@dataclass
class _Parts:
    """An SAE as JumpReLU has it: `relu(pre) · (pre > threshold)`, `pre = x @ W_enc + b_enc`."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None  # None: not a matter of thresholds


def _check_fit(loaded: SparseAutoencoder, sae: TrainableSae, where: str) -> None:
    for name in ("d_in", "d_sae"):
        found, expected = getattr(loaded.cfg, name), getattr(sae.cfg, name)
        if found != expected:
            raise IncompatibleSae(
                f"this SAE has {name}={found}, but the one to be trained has {name}={expected}.",
                at=where,
                fix="start from an SAE of the same size, at the same hook."
                if name == "d_in"
                else f"set d_sae to {found}: features keep their index.",
            )
    for name in ("normalize_activations", "centre_input"):
        found, expected = getattr(loaded.cfg, name), getattr(sae.cfg, name)
        if found != expected:
            raise IncompatibleSae(
                f"this SAE has {name}={found!r}, but the one to be trained has {expected!r}.",
                at=where,
                fix="start from an SAE that takes the residual stream as it is.",
            )


def _parts(loaded: SparseAutoencoder, *, unit_rows: bool) -> _Parts:
    if isinstance(loaded, GatedSae):
        # The gate is open where exp(r_mag) · (gate - b_gate) + b_mag, the magnitude, exceeds this.
        growth = loaded.r_mag.exp()
        opens_at = (loaded.b_mag - growth * loaded.b_gate).clamp_min(0.0)
        found = _Parts(loaded.W_enc * growth, loaded.b_mag, loaded.W_dec, loaded.b_dec, opens_at)
    else:
        threshold = loaded.threshold if isinstance(loaded, JumpReluSae) else None
        found = _Parts(loaded.W_enc, loaded.b_enc, loaded.W_dec, loaded.b_dec, threshold)
    if unit_rows:
        length = found.W_dec.norm(dim=1).clamp_min(1e-8)
        found.W_enc, found.b_enc = found.W_enc * length, found.b_enc * length
        found.W_dec = found.W_dec / length[:, None]
        if found.threshold is not None:
            found.threshold = found.threshold * length
    return found


def _centre_as(start: _Parts, loaded: SparseAutoencoder, sae: TrainableSae) -> None:
    """Let the encoder's bias do what taking `b_dec` off the input did, or the other way round."""
    more = int(sae.cfg.apply_b_dec_to_input) - int(loaded.cfg.apply_b_dec_to_input)
    if more:
        start.b_enc = start.b_enc + more * (start.b_dec @ start.W_enc)


def _write(start: _Parts, sae: TrainableSae) -> None:
    sae.W_enc.copy_(start.W_enc)
    sae.W_dec.copy_(start.W_dec)
    sae.b_dec.copy_(start.b_dec)
    if isinstance(sae, GatedSae):
        sae.r_mag.zero_()
        sae.b_mag.copy_(start.b_enc)
        sae.b_gate.copy_(start.b_enc if start.threshold is None else start.b_enc - start.threshold)
        return
    sae.b_enc.copy_(start.b_enc)
    if isinstance(sae, JumpReluSae) and start.threshold is not None:
        sae.threshold.copy_(start.threshold)
    if isinstance(sae, BatchTopKSae):
        threshold = torch.zeros(1) if start.threshold is None else start.threshold * _ranked_by(sae)
        sae.topk_threshold.copy_(threshold.median())


def _ranked_by(sae: BatchTopKSae) -> Tensor:
    """What a threshold is in units of: activations, or those times decoder norms."""
    return sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else torch.ones_like(sae.b_enc)


def _copy_gated(loaded: GatedSae, sae: GatedSae, *, unit_decoder: bool) -> None:
    length = loaded.W_dec.norm(dim=1).clamp_min(1e-8) if unit_decoder else torch.ones_like(loaded.b_gate)
    W_enc, b_gate, b_mag = loaded.W_enc * length, loaded.b_gate * length, loaded.b_mag * length
    more = int(sae.cfg.apply_b_dec_to_input) - int(loaded.cfg.apply_b_dec_to_input)
    shift = more * (loaded.b_dec @ W_enc)
    sae.W_enc.copy_(W_enc)
    sae.W_dec.copy_(loaded.W_dec / length[:, None])
    sae.b_dec.copy_(loaded.b_dec)
    sae.r_mag.copy_(loaded.r_mag)
    sae.b_gate.copy_(b_gate + shift)
    sae.b_mag.copy_(b_mag + shift * loaded.r_mag.exp())
