"""Captures, edits, logits, W_U and top tokens are those of transformer-lens on the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from peer import peer

from saeffect.features.projection import project
from saeffect.lm.architectures import unembedding
from saeffect.lm.hooks import HOOK_KINDS, capture, edited
from saeffect.lm.language_model import LanguageModel

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module", params=["tiny_gpt2", "tiny_llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def raw(lm: LanguageModel) -> object:
    return peer(lm, processed=False)


@pytest.fixture(scope="module")
def processed(lm: LanguageModel) -> object:
    return peer(lm, processed=True)


def test_captures_and_logits(lm: LanguageModel, raw, token_ids: Tensor) -> None:
    with torch.no_grad():
        logits, cache = raw.run_with_cache(token_ids)
        torch.testing.assert_close(lm.model(input_ids=token_ids).logits, logits, **CLOSE)
    for layer in range(3):
        for kind in HOOK_KINDS:
            name = f"blocks.{layer}.{kind}"
            theirs = cache[name].flatten(2)  # heads beside each other
            torch.testing.assert_close(capture(lm, name, token_ids), theirs, **CLOSE)


@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_edits(lm: LanguageModel, raw, token_ids: Tensor, kind: str) -> None:
    name = f"blocks.1.{kind}"

    def edit(x: Tensor) -> Tensor:
        return 0.5 * x + torch.linspace(-1, 1, 32)

    with torch.no_grad():
        expected = raw.run_with_hooks(token_ids, fwd_hooks=[(name, lambda x, hook: edit(x.flatten(2)).view(x.shape))])
        with edited(lm, name, edit):
            logits = lm.model(input_ids=token_ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_processed_residuals_are_ours_centred(lm: LanguageModel, processed, token_ids: Tensor) -> None:
    with torch.no_grad():
        _, cache = processed.run_with_cache(token_ids)
    for name in ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"):
        x = capture(lm, name, token_ids)
        if lm.name == "tiny-gpt2":
            x = x - x.mean(dim=-1, keepdim=True)
        torch.testing.assert_close(x, cache[name], **CLOSE)


def test_unembedding(lm: LanguageModel, processed) -> None:
    W_U = unembedding(lm)
    assert W_U.shape == (32, 320)
    assert W_U.dtype == torch.float32
    torch.testing.assert_close(W_U, processed.W_U.detach(), rtol=1e-5, atol=1e-6)
    assert (W_U - lm.model.get_output_embeddings().weight.T).abs().max() > 0.1, "the folding did nothing"


@pytest.mark.parametrize("projection", ["dot", "cosine"])
def test_top_tokens(lm: LanguageModel, processed, projection: str) -> None:
    W_dec = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    product = W_dec @ processed.W_U.detach()
    if projection == "cosine":
        product = product / processed.W_U.detach().norm(dim=0)
    expected = product.topk(10, dim=1)
    found = project(W_dec, unembedding(lm), top_k=10, projection=projection)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.weights, expected.values, rtol=1e-4, atol=1e-5)
