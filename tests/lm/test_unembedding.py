from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from saeffect.errors import ConfigError
from saeffect.lm.architectures import final_norm, unembedding
from saeffect.lm.language_model import LanguageModel

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


def test_a_norm_that_centres_by_another_name(random_model: Callable[..., Any]) -> None:
    """OLMo's norm is a LayerNorm without weights that is no torch LayerNorm: W_U gives the odd part of the logits."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    model = random_model(transformers.OlmoConfig(**sizes))
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)) + 0.7
    logits = [model.lm_head(model.model.norm(sign * x[None]))[0] for sign in (1, -1)]
    true = (logits[0] - logits[1]) / 2
    centred = x - x.mean(1, keepdim=True)
    ours = (centred / centred.std(1, keepdim=True, correction=0)) @ unembedding(LanguageModel(model, None, "olmo"))
    torch.testing.assert_close(
        ours - ours.mean(1, keepdim=True), true - true.mean(1, keepdim=True), rtol=1e-3, atol=1e-3
    )
    assert unembedding(LanguageModel(model, None, "olmo")).mean(0).abs().max() < 1e-6


def test_a_norm_that_is_neither(
    random_model: Callable[..., Any], complains: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(transformers.LlamaConfig(**SIZES))
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: torch.tanh(x) * self.weight)
    with complains(ConfigError, "LlamaRMSNorm, neither scales nor centres"):
        unembedding(LanguageModel(model, None, "tanh"))


def test_an_adapter_on_the_unembedding_that_is_not_merged(
    random_model: Callable[..., Any], complains: Callable[..., Any]
) -> None:
    import peft

    model = random_model(transformers.LlamaConfig(**SIZES))
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).get_base_model()
    with complains(ConfigError, "does more than multiply by its weight", "merge the adapter"):
        unembedding(LanguageModel(adapted, None, "adapted"))


def test_no_known_norm(complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "Linear keeps its final norm in none of"):
        final_norm(nn.Linear(2, 2))
