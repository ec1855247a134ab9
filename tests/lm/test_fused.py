from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from saeffect.lm import language_model as fused_module
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel, causal_attention, fused

HOOK = "blocks.2.hook_resid_post"


def _heads(batch: int, heads: int, shared: int, length: int, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, n, length, width, generator=generator) for n in (heads, shared, shared)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_attention_is_pytorchs(monkeypatch: pytest.MonkeyPatch, length: int, heads: int, shared: int) -> None:
    monkeypatch.setattr(fused_module, "_BLOCK", 4)
    q, k, v = _heads(2, heads, shared, length)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.2)
    torch.testing.assert_close(causal_attention(q, k, v, scaling=0.2), expected.transpose(1, 2))
    usual = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v), usual.transpose(1, 2))


def test_a_token_does_not_see_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "_BLOCK", 4)
    q, k, v = _heads(1, 2, 2, 10)
    before = causal_attention(q, k, v)
    k[:, :, 6:] += 5
    v[:, :, 6:] -= 5
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def _as(lm: LanguageModel, dtype: torch.dtype, random_model: Callable[..., Any]) -> LanguageModel:
    model = random_model(lm.model.config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return LanguageModel(model, lm.tokenizer, lm.name, lm.identity)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_float32_stays_but_for_rounding(
    request: pytest.FixtureRequest, name: str, token_ids: torch.Tensor, random_model: Callable[..., Any]
) -> None:
    lm = _as(request.getfixturevalue(name), torch.float32, random_model)
    expected = capture(lm, HOOK, token_ids)
    with fused(lm):
        torch.testing.assert_close(capture(lm, HOOK, token_ids), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(capture(lm, HOOK, token_ids), expected), "outside the model is as it was"


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_bfloat16_is_as_near_to_float32_as_before(
    request: pytest.FixtureRequest,
    name: str,
    random_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.randint(1, 320, (4, 100), generator=torch.Generator().manual_seed(0))
    exact = capture(_as(request.getfixturevalue(name), torch.float32, random_model), HOOK, ids)
    lm = _as(request.getfixturevalue(name), torch.bfloat16, random_model)
    plain = capture(lm, HOOK, ids)
    used = []
    real = causal_attention
    monkeypatch.setattr(fused_module, "causal_attention", lambda *a, **k: used.append(1) or real(*a, **k))
    with fused(lm):
        fast = capture(lm, HOOK, ids)
    assert len(used) == 3, "once a block"
    assert (fast - exact).norm() < 1.1 * (plain - exact).norm()


def test_the_model_is_as_before_after_an_exception(
    tiny_gpt2: LanguageModel, random_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    lm = _as(tiny_gpt2, torch.bfloat16, random_model)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"], capture(lm, HOOK, token_ids)
    with contextlib.suppress(KeyError), fused(lm):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before[0]
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before[0]
    assert not [m for m in lm.model.modules() if "forward" in vars(m)]
    assert torch.equal(capture(lm, HOOK, token_ids), before[1])


def test_what_is_not_plain_causal_attention_is_left_to_transformers(
    random_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """A sliding window shorter than the text comes as a mask: the window must still hold."""
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    lm = _as(LanguageModel(random_model(config), tiny_tokenizer, "m", "m"), torch.bfloat16, random_model)
    ids = torch.randint(1, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = capture(lm, HOOK, ids)
    with fused(lm):
        assert (capture(lm, HOOK, ids) - expected).abs().max() < 0.01 * expected.abs().max()
