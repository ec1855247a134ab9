"""Activations made of known features, as a harvest would leave them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.checksums import save_tensors
from saeffect.io import write_json
from saeffect.lm.activations import ActivationSource
from saeffect.lm.harvest import ActivationStore, shard_name
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.train import SaeJob, train_saes

D_IN, N_TRUE, K_TRUE = 16, 24, 2


def true_features() -> Tensor:
    """Unit vectors, float32 `[N_TRUE, D_IN]`."""
    x = torch.randn(N_TRUE, D_IN, generator=torch.Generator().manual_seed(0))
    return x / x.norm(dim=1, keepdim=True)


def planted(n_tokens: int, seed: int) -> Tensor:
    """Each token is a sum of `K_TRUE` features of size 4 to 8, plus the same offset everywhere."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(n_tokens, N_TRUE, generator=generator).topk(K_TRUE, dim=1).indices
    size = 4 + 4 * torch.rand(n_tokens, K_TRUE, generator=generator)
    acts = torch.zeros(n_tokens, N_TRUE).scatter_(1, which, size)
    return acts @ true_features() + 0.5


def planted_store(folder: Path, n_tokens: int, *, seed: int = 1, n_shards: int = 4) -> ActivationStore:
    """A harvest of planted tokens."""
    write_json(folder / "harvest.json", {"made_by": {"text": f"planted {n_tokens} {seed}"}})
    for i, part in enumerate(planted(n_tokens, seed).chunk(n_shards)):
        save_tensors(folder / shard_name(i), {"activations": part.clone()})
    return ActivationStore.open(folder)


def train_one(
    source: ActivationSource,
    config: SaeTrainingConfig,
    out: Path,
    *,
    metadata: Mapping[str, Any],
    dtype: str = "float16",
    **more: Any,
) -> SparseAutoencoder:
    """`train_saes` for a single SAE; `more` are its other arguments."""
    return train_saes(source, [SaeJob(config, out, metadata, dtype)], **more)[0]
