"""An architecture that the package does not know is read after one call."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from saeffect.errors import ConfigError
from saeffect.lm.architectures import HOOK_MAPPINGS, HookMapping, final_norm, register_hook_mapping, unembedding
from saeffect.lm.hooks import HOOK_KINDS, capture, edited
from saeffect.lm.language_model import LanguageModel

HOOKS = [f"blocks.1.{kind}" for kind in HOOK_KINDS if kind != "attn.hook_z"]
MAPPING = HookMapping(
    blocks=("trunk.stages",), final_norm=("trunk.last",), attn_out=("mixer",), mlp_out=("wide",), resid_mid=("scale",)
)


class Stage(nn.Module):
    """A block with names of its own; its mixer looks at what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.scale, self.wide = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x.cumsum(1))
        return x + self.wide(self.scale(x))


class Stranger(nn.Module):
    """A causal language model of a type that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="stranger", num_hidden_layers=2)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.trunk = nn.ModuleDict({"stages": nn.ModuleList([Stage(), Stage()]), "last": nn.LayerNorm(8)})

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        x = self.embed(input_ids)
        for stage in self.trunk["stages"]:
            x = stage(x)
        return SimpleNamespace(logits=self.head(self.trunk["last"](x)))


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setattr("saeffect.lm.architectures.HOOK_MAPPINGS", dict(HOOK_MAPPINGS))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(Stranger().eval().requires_grad_(False), None, "stranger")


def test_unknown_architecture_says_how_to_register_it(lm: LanguageModel, complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "Stranger keeps its blocks in none", "register_hook_mapping"):
        capture(lm, HOOKS[0], torch.tensor([[1, 2, 3]]))


def test_registered_architecture_is_captured_and_edited(lm: LanguageModel, complains: Callable[..., Any]) -> None:
    register_hook_mapping("stranger", MAPPING)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    pre, mid, post, attention, mlp = (capture(lm, hook, ids) for hook in HOOKS)
    torch.testing.assert_close(pre + attention, mid)
    torch.testing.assert_close(mid + mlp, post)
    with edited(lm, "blocks.1.hook_mlp_out", lambda x: x + 1):
        torch.testing.assert_close(capture(lm, "blocks.1.hook_resid_post", ids), post + 1)
    assert unembedding(lm).shape == (8, 20)
    with complains(ConfigError, "a hook mapping for 'stranger' already"):
        register_hook_mapping("stranger", MAPPING)


def test_wrong_mapping_is_found_out(lm: LanguageModel, complains: Callable[..., Any]) -> None:
    register_hook_mapping("stranger", HookMapping(blocks=("trunk.stages",), attn_out=("scale",), mlp_out=("wide",)))
    with complains(ConfigError, "Stage does not add up by its hook_attn_out"):
        capture(lm, "blocks.1.hook_attn_out", torch.tensor([[1, 2, 3]]))


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


def test_unmerged_adapter_on_the_unembedding_is_refused(
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
