"""Small files in the layouts of published SAEs, and SAELens as the peer that reads them too."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeffect.published import PublishedSae, published_saes
from saeffect.sae.formats import load_sae

__all__ = ["D", "N", "X", "agree", "drawn", "first", "npz", "pt", "theirs_of"]

D, N = 6, 20
X = torch.randn(7, D, generator=torch.Generator().manual_seed(3))


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t.abs() if "threshold" in name else t for name, t in found.items()}


def npz(arrays: dict[str, Tensor]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **{name: tensor.numpy() for name, tensor in arrays.items()})
    return out.getvalue()


def pt(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def first(release: str, part: str = "") -> PublishedSae:
    return next(sae for sae in published_saes(release=release) if part in sae.id)


def theirs_of(sae: PublishedSae, monkeypatch: pytest.MonkeyPatch) -> Any:
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    original = loaders.hf_hub_download

    def local(repo: str = "", name: str = "", **options: Any) -> str:
        """As the hub, which tells offline only that it does not know whether a file exists."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        repo, name = options.pop("repo_id", repo), options.pop("filename", name)
        try:
            return str(original(repo, name, **options))
        except LocalEntryNotFoundError as error:
            raise EntryNotFoundError(name) from error

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    found = SAE.from_pretrained(sae.release, sae.id)
    return found[0] if isinstance(found, tuple) else found


def agree(sae: PublishedSae, monkeypatch: pytest.MonkeyPatch, x: Tensor = X) -> Any:
    """Ours, after comparing activations, reconstruction, hook and model with SAELens'."""
    ours, theirs = load_sae(sae.name), theirs_of(sae, monkeypatch)
    with torch.no_grad():
        given = x.unflatten(-1, (2, -1)) if theirs.hook_z_reshaping_mode else x
        acts, out = theirs.encode(given), theirs(given)
    torch.testing.assert_close(ours.encode(x), acts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x), out.reshape(x.shape), rtol=1e-4, atol=1e-4)
    assert (acts > 0).any() and not (acts > 0).all()
    assert ours.cfg.hook_name == sae.hook
    assert ours.cfg.metadata.get("prepend_bos", True) == theirs.cfg.metadata.prepend_bos
    return ours
