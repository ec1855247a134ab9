from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from saeffect.errors import ConfigError
from saeffect.models.language_model import LanguageModel
from saeffect.models.unembedding import final_norm, unembedding

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("kind", ["GemmaConfig", "Gemma2Config", "Gemma3TextConfig", "Qwen3NextConfig"])
def test_norms_that_store_the_scale_less_one(random_model: Callable[..., Any], kind: str) -> None:
    model = random_model(getattr(transformers, kind)(**SIZES))
    W = model.get_output_embeddings().weight.T
    folded = W * (1 + model.model.norm.weight)[:, None]
    expected = folded - folded.mean(dim=1, keepdim=True)
    torch.testing.assert_close(unembedding(LanguageModel(model, None, kind)), expected)


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config", "Olmo2Config"])
def test_norms_that_store_the_scale(random_model: Callable[..., Any], kind: str) -> None:
    config = getattr(transformers, kind)(**{k: v for k, v in SIZES.items() if k != "head_dim"})
    model = random_model(config)
    folded = model.get_output_embeddings().weight.T * model.model.norm.weight[:, None]
    expected = folded - folded.mean(dim=1, keepdim=True)
    torch.testing.assert_close(unembedding(LanguageModel(model, None, kind)), expected)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_it_scores_tokens_as_the_model_does(request: pytest.FixtureRequest, name: str) -> None:
    """On a normalised residual without the norm's bias, W_U gives the model's logits but for a constant."""
    lm = request.getfixturevalue(name)
    norm = final_norm(lm.model)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    bias = norm(torch.zeros(1, 32))
    logits = lm.model.get_output_embeddings()(norm(x) - bias)
    plain = type(norm)(32, eps=1e-6)  # the same norm with a scale of one
    ours = plain(x) @ unembedding(lm)
    torch.testing.assert_close(
        ours - ours.mean(1, keepdim=True), logits - logits.mean(1, keepdim=True), rtol=1e-3, atol=1e-4
    )


def test_the_models_own_weights_stay(tiny_llama: LanguageModel) -> None:
    before = tiny_llama.model.get_output_embeddings().weight.clone()
    unembedding(tiny_llama)
    assert torch.equal(tiny_llama.model.get_output_embeddings().weight, before)


def test_no_known_norm(complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "Linear keeps its final norm in none of"):
        final_norm(nn.Linear(2, 2))
