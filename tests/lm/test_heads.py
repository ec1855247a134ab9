"""Attention heads side by side: read, edited, and carried to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saeffect.errors import ConfigError
from saeffect.lm.architectures import heads_to_residual, hook_width, output_projection
from saeffect.lm.hooks import Rest, capture, edited, parse_hook
from saeffect.lm.language_model import LanguageModel, probe_logits

HOOK = "blocks.1.attn.hook_z"
OUT = "blocks.1.hook_attn_out"
IDS = torch.tensor([[5, 9, 40, 77, 12]])


def _model(kind: str, tokenizer: Any) -> LanguageModel:
    """Heads that are together wider than the stream, where the architecture allows it."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"vocab_size": 320, "max_position_embeddings": 32}
    config = {
        "llama": lambda: LlamaConfig(**small, head_dim=8, num_key_value_heads=2),
        "gemma2": lambda: Gemma2Config(**small, head_dim=8, num_key_value_heads=2),
        "gpt2": lambda: GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=320, n_positions=32),
        "gpt_neox": lambda: GPTNeoXConfig(**small, use_parallel_residual=False),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return LanguageModel(model.requires_grad_(False), tokenizer, kind)


KINDS = ("llama", "gemma2", "gpt2", "gpt_neox")


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_what_the_output_projection_reads(kind: str, tiny_tokenizer: Any) -> None:
    lm = _model(kind, tiny_tokenizer)
    width = 32 if kind in ("llama", "gemma2") else 24
    z, out = capture(lm, HOOK, IDS), capture(lm, OUT, IDS)
    assert hook_width(lm, HOOK) == z.shape[-1] == width
    assert hook_width(lm, OUT) == lm.d_model == 24
    projected = output_projection(lm.model, 1)(z)
    if kind != "gemma2":
        torch.testing.assert_close(projected, out)
    # A direction of heads adds its image to what attention adds, in Gemma up to each token's own norm.
    push = torch.randn(width, generator=torch.Generator().manual_seed(1))
    with edited(lm, HOOK, lambda x: x + push):
        pushed = capture(lm, OUT, IDS)
    image = heads_to_residual(lm, HOOK, push[None])[0]
    if kind == "gemma2":
        norm = dict(lm.model.model.layers[1].named_children())["post_attention_layernorm"]
        length = projected.square().mean(-1, keepdim=True)
        longer = (projected + push @ output_projection(lm.model, 1).weight.T).square().mean(-1, keepdim=True)
        expected = out * (length + norm.eps).sqrt() + image
        torch.testing.assert_close(pushed * (longer + norm.eps).sqrt(), expected, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(pushed - out, image.expand_as(out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_of_transformer_lens(kind: str, tiny_tokenizer: Any) -> None:
    """TransformerLens has heads apart, in this order: `z [..., n_heads, d_head]`, times W_O and summed, is the output."""
    lm = _model(kind, tiny_tokenizer)
    z = capture(lm, HOOK, IDS)
    matrix = heads_to_residual(lm, HOOK, torch.eye(z.shape[-1]))
    apart = torch.einsum("bshd,hdm->bsm", z.unflatten(-1, (4, -1)), matrix.unflatten(0, (4, -1)))
    torch.testing.assert_close(apart, heads_to_residual(lm, HOOK, z[0])[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_heads_change_nothing(kind: str, tiny_tokenizer: Any) -> None:
    lm = _model(kind, tiny_tokenizer)
    plain = lm.model(input_ids=IDS).logits
    torch.testing.assert_close(Rest(lm, HOOK).logits(IDS, capture(lm, HOOK, IDS)), plain)
    assert parse_hook(HOOK, lm.n_layers).layer == 1
    assert torch.isfinite(probe_logits(lm.model)).all()


def test_other_hooks_are_as_they_were(tiny_tokenizer: Any, complains: Callable[..., Any]) -> None:
    lm = _model("llama", tiny_tokenizer)
    rows = torch.randn(3, 24)
    assert heads_to_residual(lm, "blocks.0.hook_resid_post", rows) is rows
    with complains(ConfigError, "needs block 2"):
        parse_hook("blocks.2.attn.hook_z", 2)
    with complains(ConfigError, "is not supported"):
        parse_hook("blocks.1.attn.hook_q")
    del lm.model.model.layers[1].self_attn.o_proj
    with complains(ConfigError, "has no attention whose output projection is known", at=HOOK):
        hook_width(lm, HOOK)
