"""Wrong pairings of a model and an SAE, each of which is named, and right ones, which are not accused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learnt_pair import HOOK, KINDS, activations, learnt, read_as, text, trained_sae
from saeffect.lm.activations import TokenRows
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.mismatch import Mismatch, Reading, find_mismatch, mended, scan_hooks
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae


@pytest.fixture(scope="module")
def lm(tiny_llama: LanguageModel) -> LanguageModel:
    return learnt(tiny_llama)


@pytest.fixture(scope="module")
def x(lm: LanguageModel) -> Tensor:
    return activations(lm, HOOK, text(lm, 32, seed=2))


@pytest.fixture(scope="module")
def saes(x: Tensor) -> dict[str, SparseAutoencoder]:
    return {name: trained_sae(x, kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def find(lm: LanguageModel) -> Callable[..., Mismatch]:
    ids = text(lm, 16, seed=5)
    return lambda sae, hook=HOOK: find_mismatch(lm, sae, hook, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_pairing_is_not_accused(kind: str, saes: Any, find: Any) -> None:
    found = find(saes[kind])
    assert not found, found.changes
    assert found.before == found.after > 0.6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"])
def test_another_hook(kind: str, hook: str, saes: Any, find: Any) -> None:
    found = find(saes[kind], hook)
    assert [change.name for change in found.changes] == ["hook"]
    assert found.hook == HOOK
    assert HOOK in found.changes[0].fix


def test_the_other_name_of_a_place_is_no_mismatch(saes: Any, find: Any) -> None:
    assert not find(saes["topk"], "blocks.1.hook_resid_post")


def _names(found: Mismatch) -> list[str]:
    return [change.name for change in found.changes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["unfolded", "twice"])
def test_scaling(kind: str, way: str, x: Tensor, saes: Any, find: Any) -> None:
    scale = 32**0.5 / float(x.norm(dim=1).mean())
    if way == "unfolded":
        sae = trained_sae(x, KINDS[kind], seen=lambda x: x * scale)
    else:
        sae = copy.deepcopy(saes[kind])
        sae.W_enc.data.mul_(scale)
        sae.W_dec.data.div_(scale)
        sae.b_dec.data.div_(scale)
    found = find(sae)
    assert _names(found) == ["scale"]
    assert "sqrt(d_in)" in found.changes[0].found
    assert ("twice" in found.changes[0].found) == (way == "twice")
    again = mended(found)
    assert not find(again)
    assert torch.allclose(again(x), found.reading(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_centring_and_normalisation(kind: str, x: Tensor, saes: Any, find: Any) -> None:
    centred = trained_sae(x, KINDS[kind], seen=lambda x: x - x.mean(1, keepdim=True))
    found = find(centred)
    assert _names(found) == ["centring"]
    assert "missing" in found.changes[0].found
    assert mended(found).cfg.metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    needless = copy.copy(saes[kind])
    needless.cfg = dataclasses.replace(needless.cfg, normalize_activations="layer_norm")
    assert _names(find(needless)) == ["normalisation"]
    standardised = trained_sae(
        x, KINDS[kind], seen=lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    )
    assert _names(find(standardised)) == ["normalisation"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_bias(kind: str, saes: Any, find: Any) -> None:
    sae = copy.copy(saes[kind])
    sae.cfg = dataclasses.replace(sae.cfg, apply_b_dec_to_input=False)
    assert _names(find(sae)) == ["decoder bias"]


@pytest.mark.parametrize("kind", [StandardSae, JumpReluSae])
def test_topk_read_as_relu(kind: type[Any], saes: Any, find: Any) -> None:
    found = find(read_as(saes["topk"], kind))
    assert _names(found) == ["architecture"]
    assert "TopK read as" in found.changes[0].found
    assert isinstance(mended(found), TopKSae)


def test_unrelated_sae_gets_no_change(x: Tensor, find: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(x.shape, generator=generator)[:, torch.randperm(32, generator=generator)]
    found = find(trained_sae(noise * 1e-3, steps=20))
    assert found.after < 0.6


def test_ways_are_compared_where_tokens_count(lm: LanguageModel, saes: Any) -> None:
    ids = text(lm, 32, seed=5)
    counts = np.zeros(ids.shape, dtype=bool)
    counts[:, 1::2] = True
    found = find_mismatch(lm, saes["topk"], HOOK, ids, counts=counts)
    whole = find_mismatch(lm, saes["topk"], HOOK, ids)
    assert not found
    assert found.before != whole.before and abs(found.before - whole.before) < 0.1


def test_the_likeliest_hook(lm: LanguageModel, saes: Any) -> None:
    found = scan_hooks(
        lm, Reading(saes["topk"]), TokenRows(text(lm, 16, seed=5), np.zeros(16, dtype=np.int64), ("text",))
    )
    assert max(found, key=lambda hook: found[hook]) == HOOK


def test_bos(tiny_gpt2: LanguageModel) -> None:
    """A model that looks at its BOS all the time, and an SAE that was trained with it."""
    model = copy.deepcopy(tiny_gpt2.model)
    lm = dataclasses.replace(tiny_gpt2, model=model, prepend_bos=True)
    with torch.no_grad():
        block = model.transformer.h[0]
        at = block.ln_1(model.transformer.wte.weight + model.transformer.wpe.weight[:1])
        keys = (at @ block.attn.c_attn.weight + block.attn.c_attn.bias)[:, 32:64]
        block.attn.c_attn.bias[:32] = 40 * (keys[0] - keys.mean(0)) / keys.std()
        block.attn.c_proj.weight.mul_(6.0)
    ids = text(lm, 24, seed=5)
    sae = trained_sae(activations(lm, "blocks.1.hook_resid_pre", ids))
    without = dataclasses.replace(lm, prepend_bos=False)
    assert not find_mismatch(lm, sae, "blocks.1.hook_resid_pre", ids)
    found = find_mismatch(without, sae, "blocks.1.hook_resid_pre", text(without, 24, seed=5))
    assert _names(found) == ["bos"]
    assert found.prepend_bos is True
    assert mended(found).cfg.metadata["prepend_bos"] is True


@pytest.mark.real
def test_the_embedded_pair(real_model: LanguageModel) -> None:
    from saeffect.config import TextConfig
    from saeffect.lm.loading import bundled_path
    from saeffect.sae.formats import load_sae
    from saeffect.study.texts import study_rows

    hook = "blocks.26.hook_resid_pre"
    some = TextConfig(bundled="smollm2-sampled", tokens=256)
    ids: Any = study_rows(some, lambda: real_model, prepend_bos=None).ids[:, :64]
    sae = load_sae(bundled_path("saes", "smollm2-control"))
    assert not find_mismatch(real_model, sae, hook, ids)
    near = find_mismatch(real_model, sae, "blocks.25.hook_resid_pre", ids)
    assert (_names(near), near.hook) == (["hook"], hook)
    scale = np.sqrt(576) / 531.45
    unfolded = copy.deepcopy(sae)
    unfolded.W_enc.data.div_(scale)
    unfolded.W_dec.data.mul_(scale)
    unfolded.b_dec.data.mul_(scale)
    found = find_mismatch(real_model, unfolded, hook, ids)
    assert _names(found) == ["scale"]
    assert found.reading.scale == pytest.approx(scale, rel=0.05)
