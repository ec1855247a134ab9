"""A tiny model that knows its text, and SAEs trained on it: the smallest pair for which "it fits" means something."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conftest import SENTENCES
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae

HOOK = "blocks.2.hook_resid_pre"
CONTEXT = 48


@functools.cache
def learnt(lm: LanguageModel, steps: int = 72) -> LanguageModel:
    """A copy of a tiny model that was trained on `SENTENCES`; do not change it. Its activations have a mean."""
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.3)
    known = LanguageModel(model.requires_grad_(True), lm.tokenizer, "learnt", "learnt")
    rows = torch.from_numpy(text(known, 96, seed=1).astype(np.int64))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        part = rows[torch.arange(8) + 8 * (step % 12)]
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    return known


def text(lm: LanguageModel, n_rows: int, seed: int = 0) -> NDArray[np.int32]:
    picks = np.random.default_rng(seed).integers(len(SENTENCES), size=20 * n_rows)
    packed = lm.pack((SENTENCES[i] for i in picks), CONTEXT)
    return np.stack([row for _, row in zip(range(n_rows), packed, strict=False)])


def activations(lm: LanguageModel, hook: str, ids: NDArray[np.int32]) -> Tensor:
    return capture(lm, hook, torch.from_numpy(ids.astype(np.int64)))[:, 1:].flatten(0, 1).float()


def trained_sae(
    x: Tensor,
    kind: type[Any] = TopKSae,
    *,
    steps: int = 180,
    seen: Callable[[Tensor], Tensor] = lambda x: x,
    **cfg: Any,
) -> SparseAutoencoder:
    """An SAE trained on what `seen` makes of activations; its configuration does not say that."""
    x = seen(x)
    d_in, d_sae = x.shape[1], 96
    config = SaeConfig(kind.architecture, d_in, d_sae, k=5 if kind is TopKSae else None, metadata={"hook_name": HOOK})
    sae = kind(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rows = torch.randn(d_sae, d_in, generator=generator)
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(x.mean(0))
        if kind is JumpReluSae:
            sae.threshold.fill_(0.05 * float(x.std()))
    learnable = [p for n, p in sae.named_parameters() if n != "threshold"]
    optimizer = torch.optim.Adam(learnable, lr=1e-2 * float(x.std()) if kind is not TopKSae else 1e-2)
    penalty = 0.0 if kind is TopKSae else 0.3 * float(x.var(0).sum()) / math.sqrt(d_in) / float(x.std())
    for _ in range(steps):
        part = x[torch.randint(len(x), (256,), generator=generator)]
        acts = sae.encode(part)
        out = sae.decode(acts)
        loss = (out - part).square().sum(1).mean() + penalty * 0.05 * (acts * sae.W_dec.norm(dim=1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sae.cfg = dataclasses.replace(sae.cfg, **cfg)
    return sae.eval().requires_grad_(False)


def read_as(sae: SparseAutoencoder, kind: type[Any]) -> SparseAutoencoder:
    """The weights of one architecture under another."""
    other = kind(dataclasses.replace(sae.cfg, architecture=kind.architecture, k=None))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(other, name).data.copy_(getattr(sae, name))
    return other.eval().requires_grad_(False)


KINDS = {"topk": TopKSae, "standard": StandardSae, "jumprelu": JumpReluSae}
