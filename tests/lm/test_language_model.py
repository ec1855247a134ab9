from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm import language_model
from saeffect.lm.corpora import interleave
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel, causal_attention, fused, probe_logits
from saeffect.lm.tokens import separator_id


def test_sizes(tiny_llama: LanguageModel, tiny_gpt2: LanguageModel) -> None:
    for lm in (tiny_llama, tiny_gpt2):
        assert (lm.d_model, lm.n_layers, lm.d_vocab) == (32, 3, 320)
        assert (lm.device.type, lm.dtype) == ("cpu", torch.float32)


def test_text_to_ids_and_back(tiny_llama: LanguageModel) -> None:
    for text in ("The patient had a fever.", " two  spaces , kept", "Müller 🩺 \u200b"):
        assert tiny_llama.decode(tiny_llama.encode(text)) == text


def test_special_tokens_are_neither_added_nor_shown(tiny_llama: LanguageModel) -> None:
    ids = tiny_llama.encode("The patient")
    assert 0 not in ids
    assert tiny_llama.decode([0, *ids, 0]) == "The patient"


def test_token_strings_keep_spaces(tiny_llama: LanguageModel) -> None:
    strings = tiny_llama.token_strings()
    assert len(strings) == tiny_llama.d_vocab
    assert " patient" in strings
    assert strings[0] == "<|endoftext|>"
    assert "\ufffd" in strings  # a byte that is no character by itself


def test_padding_rows_are_not_plain_tokens(tiny_llama: LanguageModel) -> None:
    padded = SimpleNamespace(
        get_output_embeddings=lambda: SimpleNamespace(weight=torch.zeros(len(tiny_llama.tokenizer) + 2, 4))
    )
    lm = LanguageModel(padded, tiny_llama.tokenizer, "padded")
    assert lm.token_strings()[-2:] == [f"<unused {i}>" for i in range(lm.d_vocab - 2, lm.d_vocab)]
    plain = lm.plain_tokens()
    assert plain.dtype == torch.bool
    assert not plain[-2:].any()
    assert not plain[0]  # <|endoftext|>
    assert plain[1:-2].all()


def test_rows_and_prompts_begin_with_bos_once(tiny_llama: LanguageModel) -> None:
    assert tiny_llama.bos_id is None, "its tokenizer has the name and does not use it"
    lm = dataclasses.replace(tiny_llama, prepend_bos=True)
    plain = lm.encode("The patient")
    assert lm.encode_prompt("The patient") == [0, *plain]
    assert lm.encode_prompt("<|endoftext|>The patient") == [0, *plain]
    assert tiny_llama.encode_prompt("The patient") == plain
    assert [lm.n_bos(ids) for ids in ([0, 5], [5, 0], [])] == [1, 0, 0]
    assert tiny_llama.n_bos([0, 5]) == 0
    rows = list(lm.pack(["The patient had a fever."] * 4, 8))
    assert all(row[0] == 0 and len(row) == 8 for row in rows)


LETTERS = SimpleNamespace(
    encode=lambda text, add_special_tokens: [ord(letter) for letter in text],
    get_vocab=dict,
    eos_token_id=0,
    bos_token_id=1,
)


def _pack(texts: Iterable[str], context_size: int, bos: bool = False) -> Iterator[NDArray[np.int32]]:
    return LanguageModel(None, LETTERS, "letters", prepend_bos=bos).pack(texts, context_size)


def _packed(*texts: str, context_size: int, bos: bool = False) -> list[list[int]]:
    return [row.tolist() for row in _pack(texts, context_size, bos)]


def test_documents_are_joined_and_the_rest_dropped() -> None:
    a, b, c = 97, 98, 99
    assert _packed("ab", "c", "abc", context_size=3) == [[a, b, 0], [c, 0, a], [b, c, 0]]
    assert _packed("ab", "c", "abc", context_size=4) == [[a, b, 0, c], [0, a, b, c]]
    assert [len(row) for row in _packed("a" * 10, context_size=3)] == [3, 3, 3]
    assert next(_pack(["abc"], 2)).dtype == np.int32


def test_every_row_begins_with_one_bos() -> None:
    assert _packed("abcd", "ef", context_size=3, bos=True) == [[1, 97, 98], [1, 99, 100], [1, 0, 101], [1, 102, 0]]
    assert _packed("\x01abcd", context_size=3, bos=True) == [[1, 97, 98], [1, 99, 100]], "the text brings its own"


def test_texts_are_read_no_further_than_needed() -> None:
    read: list[str] = []

    def texts() -> Iterator[str]:
        for text in ("abc", "def", "ghi"):
            read.append(text)
            yield text

    next(_pack(texts(), 4))
    assert read == ["abc"]


@pytest.mark.parametrize(("texts", "tokens"), [(["ab"], 3), ([], 0)])
def test_too_little_text(texts: list[str], tokens: int) -> None:
    with pytest.raises(EmptySelection, match=f"has {tokens} tokens, fewer than one context of 8"):
        list(_pack(texts, 8))


def test_interleave_ends_with_the_first_stream() -> None:
    one, two = ([np.array([10 * s + i]) for i in range(n)] for s, n in ((0, 5), (1, 2)))
    taken = [(i, int(row[0])) for i, row in interleave(iter(one), iter(two))]
    assert taken == [(0, 0), (1, 10), (0, 1), (1, 11), (0, 2)]


@pytest.mark.parametrize(
    ("vocabulary", "named", "expected"),
    [
        ({"<|endoftext|>": 7}, {"eos_token_id": 2}, 7),
        ({"</s>": 2}, {"eos_token_id": 2}, 2),
        ({}, {"eos_token_id": None, "sep_token_id": 102}, 102),
    ],
)
def test_separator(vocabulary: dict[str, int], named: dict[str, int | None], expected: int) -> None:
    assert separator_id(SimpleNamespace(get_vocab=lambda: vocabulary, **named)) == expected


def test_tokenizer_without_a_separator() -> None:
    with pytest.raises(ConfigError, match="no end-of-text token"):
        separator_id(SimpleNamespace(get_vocab=dict, eos_token_id=None))


HOOK = "blocks.2.hook_resid_post"


def _heads(batch: int, heads: int, shared: int, length: int, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, n, length, width, generator=generator) for n in (heads, shared, shared)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_attention_is_pytorchs(monkeypatch: pytest.MonkeyPatch, length: int, heads: int, shared: int) -> None:
    monkeypatch.setattr(language_model, "_BLOCK", 4)
    q, k, v = _heads(2, heads, shared, length)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.2)
    torch.testing.assert_close(causal_attention(q, k, v, scaling=0.2), expected.transpose(1, 2))
    usual = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v), usual.transpose(1, 2))


def test_a_token_does_not_see_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "_BLOCK", 4)
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


@torch.inference_mode()
@pytest.mark.parametrize("with_bias", [False, True])
def test_unembedding_in_pieces_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: LanguageModel,
    random_model: Callable[..., Any],
    token_ids: torch.Tensor,
    with_bias: bool,
) -> None:
    lm = _as(tiny_llama, torch.float32, random_model)
    head = lm.model.get_output_embeddings()
    if with_bias:
        head.bias = torch.nn.Parameter(torch.arange(float(lm.d_vocab)))
    expected = lm.model(input_ids=token_ids).logits
    monkeypatch.setattr(language_model, "_PIECE", 100)  # 320 tokens: three whole pieces and a part
    with fused(lm):
        assert "forward" in vars(head)
        torch.testing.assert_close(lm.model(input_ids=token_ids).logits, expected, rtol=2e-6, atol=2e-6)
    with fused(lm, gradients=True):
        assert "forward" not in vars(head)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_fused_bfloat16_is_as_near_to_float32(
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
    monkeypatch.setattr(language_model, "causal_attention", lambda *a, **k: used.append(1) or real(*a, **k))
    with fused(lm):
        fast = capture(lm, HOOK, ids)
    assert len(used) == 3, "once a block"
    assert (fast - exact).norm() < 1.1 * (plain - exact).norm()


def test_fused_is_undone_after_an_exception(
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


def test_sliding_window_is_left_to_transformers(random_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
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


def test_probe_logits_keep_no_graph(random_model: Callable[..., Any], tiny_llama: LanguageModel) -> None:
    model = random_model(tiny_llama.model.config).requires_grad_(True)
    assert not probe_logits(model).requires_grad
