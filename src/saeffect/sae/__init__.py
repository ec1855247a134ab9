"""Sparse autoencoders: the base class (`base`), one architecture a file, file formats, training, and metrics.

`ARCHITECTURES` has every architecture by name: importing this package defines those below, and a class defined
elsewhere registers itself.
"""

# ruff: noqa: I001 - the order in which messages list them
from saeffect.sae.base import ARCHITECTURES, SaeConfig, SparseAutoencoder
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.batchtopk import BatchTopKSae
from saeffect.sae.gated import GatedSae
from saeffect.sae.matryoshka import MatryoshkaSae
from saeffect.sae.matching_pursuit import MatchingPursuitSae
from saeffect.sae.crosscoder import CrosscoderSae, JumpReluCrosscoderSae, L1CrosscoderSae

__all__ = [
    "ARCHITECTURES",
    "BatchTopKSae",
    "CrosscoderSae",
    "GatedSae",
    "JumpReluCrosscoderSae",
    "JumpReluSae",
    "L1CrosscoderSae",
    "MatchingPursuitSae",
    "MatryoshkaSae",
    "SaeConfig",
    "SparseAutoencoder",
    "StandardSae",
    "TopKSae",
]
